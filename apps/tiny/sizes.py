"""Sizes of clips in training: frames × height × width, and how often each is drawn."""

from __future__ import annotations

Size = tuple[int, int, int]


def parse_sizes(text: str) -> list[tuple[Size, float]]:
    """ "17x64x64:2,33x96x96:1" -> [((17, 64, 64), 2.0), …]: frames × height × width and its share of the tokens."""
    sizes = []
    for item in text.split(","):
        try:
            shape, weight = item.split(":")
            f, h, w = (int(n) for n in shape.split("x"))
            sizes.append(((f, h, w), float(weight)))
        except ValueError:
            raise SystemExit(f"error: sizes: {item!r} is not FRAMESxHEIGHTxWIDTH:SHARE, such as 17x64x64:2") from None
        if f % 4 != 1 or h % 16 or w % 16:
            raise SystemExit(f"error: sizes: {item!r}: frames must be 4k+1, height and width multiples of 16")
    return sizes


def tokens(size: Size) -> int:
    """Of one clip: a token is 4 frames × 8 × 8 pixels."""
    return (size[0] + 3) // 4 * (size[1] // 8) * (size[2] // 8)
