"""What `freeze` returned copies and pickles whole; a model that is no longer what was frozen is
refused, never half believed.
"""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from miue_fast import freeze, models

IMAGES = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Constants(nn.Module):
    """Everything that a refold reads: batch norms, parameters and buffers as operands, and what is
    computed from them.
    """

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.alone = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.gain = nn.Parameter(torch.linspace(0.5, 2, 8)[:, None, None])
        self.register_buffer("mean", torch.tensor([0.4, 0.5, 0.6])[:, None, None])
        self.register_buffer("shift", torch.linspace(-1, 1, 8)[:, None, None])
        self.plain = torch.ones(8, 1, 1)
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d(2), nn.Linear(32, 4)

    def forward(self, x):
        x = F.relu(self.norm(self.conv((x - self.mean) / 0.25)))
        x = F.relu(
            self.alone(
                x * torch.exp(self.gain.view(1, 8, 1, 1)) + self.shift.abs() + self.plain * 0.5
            )
        )
        return self.fc(self.avgpool(x).flatten(1))


MODELS = {
    "small_resnet": lambda: models.build("small_resnet", 4),
    "densenet": lambda: models.build("densenet121", 4, width=4),
    "constants": Constants,
}
TAKEN = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda net: pickle.loads(pickle.dumps(net)),
    "torch.save": lambda net: saved(net),
}


def saved(net):
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def changed(model, seed):
    """Other weights, buffers and running statistics, in place."""
    gen = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in [
            *model.parameters(),
            *model.buffers(),
            *([model.plain] if hasattr(model, "plain") else []),
        ]:
            if tensor.is_floating_point():
                tensor.mul_(1 + 0.1 * torch.rand(tensor.shape, generator=gen))
    return model


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "autograd"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("taken", TAKEN)
def test_a_copy_is_whole_and_apart(name, taken, fused):
    """It computes the same, follows the weights of its own model, and nobody else's."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    net = freeze(model, fused=fused)
    assert net.fused == fused
    before = net.forward(IMAGES)  # waits for its gradient, which a copy does not
    twin = TAKEN[taken](net)
    with pytest.raises(ValueError, match="a forward before each input_grad"):
        twin.input_grad(before)
    assert torch.equal(twin.forward(IMAGES), before) and twin.model is not model
    assert torch.equal(twin.input_grad(before), net.input_grad(before))
    changed(twin.model, 1)
    changed(model, 2)
    for other in (twin, net):
        other.refold()
        fresh = freeze(other.model, fused=fused)
        assert torch.equal(other.forward(IMAGES), fresh.forward(IMAGES)) and not torch.equal(
            other.forward(IMAGES), before
        )
        assert torch.equal(other.input_grad(before), fresh.input_grad(before))


def hook(*args):
    return None


LATER = {
    "another layer": (
        lambda m: setattr(m, "conv1", nn.Conv2d(3, 8, 3, padding=1)),
        "another conv1",
    ),
    "another block": (lambda m: m.layers.__setitem__(1, nn.Identity()), "another 1"),
    "another norm inside": (
        lambda m: setattr(m.layers[0], "bn2", nn.BatchNorm2d(8)),
        "another bn2",
    ),
    "another container": (
        lambda m: setattr(m, "layers", nn.Sequential(*m.layers)),
        "another layers",
    ),
    "no layer": (lambda m: delattr(m, "bn1"), "another bn1"),
    "forward hook": (
        lambda m: m.bn1.register_forward_hook(lambda m, i, o: o * 2),
        "bn1 with hooks",
    ),
    "forward pre-hook": (lambda m: m.layers[0].register_forward_pre_hook(hook), "0 with hooks"),
    "backward hook": (lambda m: m.conv1.register_full_backward_hook(hook), "conv1 with hooks"),
    "hook of the model": (
        lambda m: m.register_forward_pre_hook(lambda m, i: (i[0] * 0,)),
        "a model with hooks",
    ),
    "forward of its own": (
        lambda m: setattr(m.conv1, "forward", lambda x: x),
        "conv1 with a forward of its own",
    ),
}


@pytest.mark.parametrize("case", LATER)
def test_what_changed_since_is_refused(case):
    change, words = LATER[case]
    model = models.build("small_resnet", 4).eval()
    net = freeze(model)
    net.forward(IMAGES)
    change(model)
    for call in (lambda: net.forward(IMAGES), net.refold):
        with pytest.raises(ValueError) as error:
            call()
        assert f"got {words}; call freeze again" in str(error.value) and "\n" not in str(
            error.value
        )


def test_a_new_classifier_is_no_change_of_the_features():
    model = models.build("small_resnet", 4).eval()
    net = freeze(model)
    before = net.forward(IMAGES)
    model.fc = nn.Linear(32, 9)
    model.fc.register_forward_hook(hook)
    net.refold()
    assert torch.equal(net.forward(IMAGES), before)


OTHER = [
    ("stride", (2, 2), "geometry of conv1 as they were frozen, {'stride': [1, 1]"),
    (
        "weight",
        nn.Parameter(torch.ones(1, 3, 3, 3)),
        "weights of conv1 as they were frozen, [8, 3, 3, 3]",
    ),
]


@pytest.mark.parametrize(
    "change, words",
    [(lambda m, n=name, v=value: setattr(m.conv1, n, v), words) for name, value, words in OTHER],
)
def test_a_refold_takes_no_other_geometry(change, words):
    model = models.build("small_resnet", 4).eval()
    net = freeze(model)
    change(model)
    with pytest.raises(ValueError) as error:
        net.refold()
    assert words in str(error.value)


def test_a_refold_takes_a_new_parameter():
    model = models.build("small_resnet", 4).eval()
    net = freeze(model)
    model.conv1.weight = nn.Parameter(torch.rand(8, 3, 3, 3))
    model.bn1.eps = 0.1
    net.refold()
    assert torch.equal(net.forward(IMAGES), freeze(model).forward(IMAGES))


def test_the_autograd_form_follows_the_model():
    """It runs the model itself: replaced layers and hooks take part."""
    torch.manual_seed(0)
    model = models.build("small_resnet", 4).eval()
    net = freeze(model, fused=False)
    model.conv1, model.avgpool = (
        nn.Conv2d(3, 8, 3, padding=1).eval(),
        nn.AdaptiveMaxPool2d(1).eval(),
    )
    model.bn1.register_forward_hook(lambda m, i, o: o * 2)
    assert torch.equal(net.forward(IMAGES), freeze(model, fused=False).forward(IMAGES))
    del model.avgpool
    with pytest.raises(
        ValueError, match="a layer 'avgpool', as it was frozen, got none; call freeze again"
    ):
        net.forward(IMAGES)


def test_hooks_of_all_modules():
    """Before: the autograd form, where they run. Later: refused."""
    model = models.build("small_resnet", 4).eval()
    earlier = freeze(model)
    plain = earlier.forward(IMAGES)
    handle = nn.modules.module.register_module_forward_hook(
        lambda m, i, o: o * 2 if isinstance(m, nn.Conv2d) else None
    )
    try:
        net = freeze(model)
        assert not net.fused and net.reason == "hooks of all modules (torch.nn.modules.module)"
        model.fc = nn.Identity()
        wanted = model(IMAGES)
        assert torch.equal(net.forward(IMAGES), wanted) and not torch.allclose(
            wanted, plain, rtol=1e-2
        )
        with pytest.raises(
            ValueError, match=r"no hooks of all modules .*, got some; freeze it with fused=False"
        ):
            earlier.forward(IMAGES)
    finally:
        handle.remove()
    assert torch.equal(earlier.forward(IMAGES), plain)


class Looking(Constants):
    """A forward that looks at the value of a buffer."""

    def forward(self, x):
        return self.avgpool(
            F.relu(self.conv(x if float(self.shift[0, 0, 0]) < 0 else -x)) * self.shift
        )


def test_a_forward_that_looks_at_its_buffers_is_lowered_all_the_same():
    torch.manual_seed(0)
    model = Looking().eval()
    net, plain = freeze(model), freeze(model, fused=False)
    assert net.fused
    torch.testing.assert_close(net.forward(IMAGES), plain.forward(IMAGES), rtol=1e-5, atol=1e-6)
