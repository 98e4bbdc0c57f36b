"""How much memory the bits of a ReLU take."""


def mask_bytes(count: int) -> int:
    """The bytes of a ReLU mask of `count` values: one bit for each value, in words of 64 bits."""
    return -(-count // 64) * 8
