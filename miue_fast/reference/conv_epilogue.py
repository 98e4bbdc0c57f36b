import torch
import torch.nn.functional as F


def mask_bytes(count):
    """Bytes of a ReLU mask of `count` values: one bit each, in words of 64."""
    return -(-count // 64) * 8


def in_memory_order(y):
    """The values of a dense channels-last [B, C, H, W] or contiguous [B, C] tensor as a flat view,
    in the order of its memory.
    """
    return (y.permute(0, 2, 3, 1) if y.dim() == 4 else y).reshape(-1)


def pack(bits):
    """Flat bools -> uint8 [mask_bytes]; bit k of byte b belongs to value 8 b + k, bits past the end
    are 0.
    """
    padded = bits.new_zeros(8 * mask_bytes(len(bits)), dtype=torch.uint8)
    padded[: len(bits)] = bits
    return (padded.view(-1, 8) << torch.arange(8, dtype=torch.uint8, device=bits.device)).sum(
        1, dtype=torch.uint8
    )


def unpack(mask, like):
    """The mask's bits as bools in the shape and memory order of `like`."""
    bits = (
        (mask[:, None] >> torch.arange(8, dtype=torch.uint8, device=mask.device) & 1)
        .view(-1)[: like.numel()]
        .bool()
    )
    if like.dim() != 4:
        return bits.view(like.shape)
    b, c, h, w = like.shape
    return bits.view(b, h, w, c).permute(0, 3, 1, 2)


def _wide(y):
    return y.to(torch.promote_types(y.dtype, torch.float32))


def finished(v, dtype, bias, residual, relu, mask):
    """relu(v + bias + residual) of wide values, rounded once to dtype; writes the ReLU's bits."""
    if bias is not None:
        v = v + bias[:, None, None] if v.dim() == 4 else v + bias
    if residual is not None:
        v = v + _wide(residual)
    v = v.to(dtype)
    if relu:
        v = F.threshold(v, 0, 0)  # v <= 0 becomes 0; NaN stays
    if mask is not None:
        mask.copy_(pack(in_memory_order(~(v <= 0))))
    return v


def finished_grad(v, dtype, addend, mask):
    v = v.to(dtype) if addend is None else (v + _wide(addend)).to(dtype)
    return v if mask is None else torch.where(unpack(mask, v), v, 0)


def conv_epilogue_(y, bias, residual, relu, mask):
    y.copy_(finished(_wide(y), y.dtype, bias, residual, relu, mask))


def conv_grad_epilogue_(grad, addend, mask):
    grad.copy_(finished_grad(_wide(grad), grad.dtype, addend, mask))
