"""Rows of the image and poison stores: one program serves one block of one row."""

import triton
import triton.language as tl


@triton.jit
def split_program(span, UNITS: tl.constexpr, BLOCK: tl.constexpr):
    """(row, unit, offsets in [0, span)) of this program; rows vary slowest. One grid axis: y and z
    end at 65535.
    """
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(span, BLOCK)
    offsets = program % blocks * BLOCK + tl.arange(0, BLOCK)
    return program // (blocks * UNITS), program // blocks % UNITS, offsets


@triton.jit
def store_row(index, row, count):
    """(row of the store, whether it exists)."""
    if index is not None:
        row = tl.load(index + row)
    return row, (row >= 0) & (row < count)


@triton.jit
def load_image(images, flip, row, offsets, column, W: tl.constexpr, live):
    """Image values on the [0, 1] scale in fp32, mirrored along W where flip[row]; column = offsets'
    place along W.
    """
    if flip is None:
        x = tl.load(images + offsets, mask=live, other=0)
    else:
        if tl.load(flip + row) != 0:
            x = tl.load(images + offsets + (W - 1 - 2 * column), mask=live, other=0)
        else:
            x = tl.load(images + offsets, mask=live, other=0)
    if images.dtype.element_ty == tl.uint8:
        return tl.div_rn(x.to(tl.float32), 255.0)
    else:
        return x


@triton.jit
def seen_pixel(view, row, p, H, W: tl.constexpr, TRANSPOSE: tl.constexpr):
    """(where pixel p of a viewed plane is in the plane itself, whether it is there at all)."""
    if view is None:
        return p, p >= 0
    else:
        down = tl.load(view + 3 * row).to(tl.int64)
        right = tl.load(view + 3 * row + 1).to(tl.int64)
        mirrored = tl.load(view + 3 * row + 2) != 0
        if TRANSPOSE:
            down = -down
            right = tl.where(mirrored, right, -right)
        h = p // W - down
        w = p % W - right
        inside = (h >= 0) & (h < H) & (w >= 0) & (w < W)
        return h * W + tl.where(mirrored, W - 1 - w, w), inside


@triton.jit
def to_scale(delta, level):
    """fp32 value of a poison element; int8 holds levels."""
    if delta.dtype == tl.int8:
        return delta.to(tl.float32) * level
    else:
        return delta.to(tl.float32)
