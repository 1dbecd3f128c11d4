"""Token counts of an image under a patch size and a dropout rate, in exact arithmetic."""

from __future__ import annotations

import math

from schedulers.counts import exact
from schedulers.errors import UsageError

MOST_PIXELS = 1 << 14  # on a side of an image; larger numbers are slips of the pen


def patch_tokens(image_size: int, patch: int) -> int:
    """Patches of `patch` x `patch` pixels in a square image of `image_size` pixels: (image_size / patch)².

    The class token is not counted. Raises UsageError for more than MOST_PIXELS, and unless `patch` divides
    `image_size`, naming the patches that do.
    """
    image_size, patch = _whole("image_size", image_size), _whole("patch", patch)
    if image_size > MOST_PIXELS:
        raise UsageError(f"image_size={image_size}: images have at most {MOST_PIXELS:,} pixels on a side")
    if image_size % patch:
        divisors = ", ".join(str(p) for p in range(1, image_size + 1) if image_size % p == 0)
        raise UsageError(
            f"patch={patch} does not divide image_size={image_size}; patches that do: {divisors} "
            "(or choose another image size)"
        )
    return int((image_size // patch) ** 2)


def kept_tokens(tokens: int, dropout: float) -> int:
    """Patch tokens left when the fraction `dropout` is dropped: floor(tokens · (1 − dropout)), exactly.

    100 tokens at 0.9 keep 10, where `int(100 * (1 - 0.9))` keeps 9. Raises UsageError when dropout is
    not in [0, 1) or no token would be left.
    """
    if not 0 <= dropout < 1:
        raise UsageError(f"dropout={dropout} is not in [0, 1): it is the fraction of tokens that is dropped")
    kept = math.floor(_whole("tokens", tokens) * (1 - exact(dropout)))
    if kept < 1:
        raise UsageError(f"dropout={dropout} leaves none of {tokens} tokens; lower the dropout or the patch size")
    return kept


def _whole(name: str, value: float) -> int:
    if isinstance(value, bool) or int(value) != value or value < 1:
        raise UsageError(f"{name}={value!r} is not a whole number of at least 1")
    return int(value)
