"""Tracing follows a forward as Python runs it, on twins of the modules, and says where it
cannot.
"""

import pytest
import torch
from torch import nn
from torch.fx import wrap

from miue_fast import freeze
from miue_fast.frozen.plan import plan
from miue_fast.frozen.trace import NotLowered
from miue_fast.models.resnet import ResNet

IMAGES = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@wrap
def whole(x):
    return x + 1 if isinstance(x, torch.Tensor) else x


def helper(x):
    return whole(x)


class Wrapping(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.avgpool = nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1)

    def forward(self, x):
        return self.avgpool(helper(self.conv(x)))


class Held(nn.Module):
    """Layers that are also held in plain lists, closures and bound methods, and a shared one;
    parameters as operands.
    """

    def __init__(self):
        super().__init__()
        self.a, self.b, self.norm = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.order = [self.a, (self.norm, {"b": self.b})]
        self.step = lambda x: torch.relu(self.b(x))
        self.bound = self.twice
        self.gain = nn.Parameter(torch.full((4, 1, 1), 1.5))
        self.avgpool = nn.AdaptiveAvgPool2d(2)
        self.again = self.b

    def twice(self, x):
        return self.again(self.order[1][1]["b"](x)) * self.gain

    def forward(self, x):
        assert type(self.a) is nn.Conv2d and isinstance(self, Held)
        self.last = x  # a side effect that must not reach the model
        return self.avgpool(self.bound(self.step(self.order[1][0](self.order[0](x)))))


def test_a_trace_follows_what_holds_the_layers_and_leaves_nothing_behind():
    torch.manual_seed(0)
    model = Held().eval()
    before = set(vars(model))
    net, plain = freeze(model), freeze(model, fused=False)
    assert net.fused and set(vars(model)) == before and model.order[0] is model.a
    torch.testing.assert_close(net.forward(IMAGES), plain.forward(IMAGES), rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        model.gain.mul_(-2)
    net.refold()
    torch.testing.assert_close(net.forward(IMAGES), plain.forward(IMAGES), rtol=1e-5, atol=1e-6)


def test_a_function_that_wants_to_be_whole_is_named():
    """torch.fx.wrap: with a stand-in for the tensor this one would take the other branch."""
    with pytest.raises(NotLowered, match=r"whole, which torch.fx.wrap keeps whole"):
        plan(Wrapping().eval(), "avgpool")


class Calling(ResNet):
    def __call__(self, x):
        return super().__call__(1 - x)


def test_a_call_of_its_own_is_named():
    model = Calling([4, 8], 1, 3, True, 3).eval()
    net = freeze(model)
    assert not net.fused and net.reason == "the model: a __call__ of its own"
    model.fc = nn.Identity()
    assert torch.equal(net.forward(IMAGES), model(IMAGES))
