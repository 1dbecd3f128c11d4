"""One picture of any kind, from its file to 8-bit RGB crops, by Pillow.

Sizes and boxes are in pixels of the picture as it is meant to be seen, turned as its EXIF data say.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

Pixels = NDArray[np.uint8]

_RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
_JPEG = ("JPEG", "MPO")
_ORIENTATION = 0x0112  # EXIF tag
_QUARTERS = (
    Image.Transpose.TRANSPOSE,
    Image.Transpose.ROTATE_270,
    Image.Transpose.TRANSVERSE,
    Image.Transpose.ROTATE_90,
)
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class PictureError(Exception):
    """A picture that cannot be read; the message tells the reason."""


@dataclass(frozen=True)
class Cut:
    """A box (top, left, height, width) and what is made of it: `size` x `size` pixels, low-passed by Pillow."""

    box: Sequence[float]
    size: int
    interpolation: str

    @property
    def reduction(self) -> float:
        """How many pixels of the picture make one of the output, on the side where they are fewer."""
        return min(self.box[2], self.box[3]) / self.size


class Picture:
    """An opened picture: its header is read, its pixels are not. Raises PictureError where there is none."""

    def __init__(self, path: Path) -> None:
        try:
            self._image: Image.Image = Image.open(io.BytesIO(path.read_bytes()))
            self._turn = _turn(self._image)
        except Exception as error:  # decoders raise errors of many types for files that are broken
            raise _picture_error(error) from error
        width, height = self._image.size
        turned = self._turn in _QUARTERS
        self.height, self.width = (width, height) if turned else (height, width)

    def cut(self, cuts: list[Cut]) -> list[Pixels]:
        """The pixels (size, size, 3) of each cut. Raises PictureError where the file is broken.

        As the box cut out and then resized. A JPEG file is decoded at a half, a quarter or an eighth of its
        size where every cut keeps at least two decoded pixels for one of its own.
        """
        try:
            reduction = min((cut.reduction for cut in cuts), default=1.0) / 2
            if self._image.format in _JPEG and reduction >= 2:
                width, height = self._image.size
                self._image.draft(None, (math.floor(width / reduction), math.floor(height / reduction)))
            image = _rgb_or_gray(self._image)
        except Exception as error:  # as above
            raise _picture_error(error) from error
        # The last row and column of a reduced picture may stand for fewer pixels than the others.
        whole = max(self.height, self.width)
        times = next(times for times in (1, 2, 4, 8) if -(-whole // times) == max(image.size))
        if self._turn is not None:
            image = image.transpose(self._turn)
        return [_resized(image, cut, times) for cut in cuts]


def _resized(image: Image.Image, cut: Cut, times: int) -> Pixels:
    """A cut of a picture that was decoded `times` smaller."""
    top, left, height, width = (value / times for value in cut.box)
    lower, end = min(top + height, image.height), min(left + width, image.width)
    outer = (math.floor(left), math.floor(top), math.ceil(end), math.ceil(lower))
    inner = (left - outer[0], top - outer[1], end - outer[0], lower - outer[1])
    part = image if outer == (0, 0, *image.size) else image.crop(outer)
    small = part.resize((cut.size, cut.size), _RESAMPLING[cut.interpolation], box=inner)
    return np.asarray(small if small.mode == "RGB" else small.convert("RGB"))


def _picture_error(error: Exception) -> PictureError:
    if isinstance(error, UnidentifiedImageError):
        return PictureError("no picture of a kind that Pillow knows")
    return error if isinstance(error, PictureError) else PictureError(f"{type(error).__name__}: {error}")


def _turn(image: Image.Image) -> Image.Transpose | None:
    """How the decoded pixels have to be turned. Data about it that mean nothing or are broken count as none."""
    if image.format in _JPEG and "exif" not in image.info and "xmp" not in image.info:
        return None
    try:
        return _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # of many types; the pixels may be whole
        return None


def _rgb_or_gray(image: Image.Image) -> Image.Image:
    """Decode, to mode RGB, or L where all channels are equal. Alpha is dropped, 16 bits become their upper 8."""
    image.load()
    if image.mode in ("RGB", "L"):
        return image
    if image.mode.startswith("I"):  # 16 bits, also where Pillow holds them in 32
        values = np.asarray(image)
        return Image.fromarray((values.clip(0, 65535) >> 8).astype(np.uint8))
    if image.mode == "F":
        raise PictureError("floating-point pixels have no agreed range; convert the file to 8 or 16 bits")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")
