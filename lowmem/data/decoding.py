"""A picture file as square RGB, or grey (the luma of that), with Pillow and its BICUBIC filter (which widens with the
scale, so shrinking does not alias), and many of them in threads.

`crop` gives what a viewer shows: upright by the EXIF orientation, transparency over white (the page of nearly every
viewer; what an editor left under full transparency is nobody's picture), and of that the middle square, so that
proportions are kept. `stretch` is how pictures were made before: the stored pixels squeezed to a square, the alpha
channel dropped. Of a square picture with neither they give the same bytes.

Of a JPEG that is more than four times as large as wanted (from side 64 on) the decoder makes a half, a quarter or an
eighth, by its own cosine transform, and Pillow goes on from there: some times faster, and hardly another picture.

Known limitations: one frame of an animation is read; more than 8 bits a channel are refused.
"""

from __future__ import annotations

import errno
import os
import struct
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from lowmem.core.errors import DataError
from lowmem.core.reading import shorten
from lowmem.data.pictures import CHANNELS, MAPPED_FROM, Progress

FILTER = Image.Resampling.BICUBIC
CHUNK = 256  # pictures a task: few enough for a smooth progress, many enough that tasks cost nothing
_ORIENTATION = 0x0112  # of EXIF
_TURN = Image.Transpose
_UPRIGHT = {
    2: _TURN.FLIP_LEFT_RIGHT, 3: _TURN.ROTATE_180, 4: _TURN.FLIP_TOP_BOTTOM, 5: _TURN.TRANSPOSE,
    6: _TURN.ROTATE_270, 7: _TURN.TRANSVERSE, 8: _TURN.ROTATE_90,
}  # fmt: skip
# What its readers raise for damaged files.
_DAMAGE = (
    OSError, ValueError, SyntaxError, EOFError, LookupError, TypeError, AttributeError, ArithmeticError,
    NotImplementedError, struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip


# What the system says of a file. All else is the machine's: another time it would be read.
_OF_THE_FILE = {errno.EACCES, errno.EPERM, errno.ENOENT, errno.ELOOP, errno.EISDIR}


def decode(path: str, fit: str, side: int, channels: int = CHANNELS) -> NDArray[np.uint8]:
    """A picture file as uint8 [side, side, channels]. Raises DataError saying what it is instead, without its name, and
    OSError where the machine fails."""
    try:
        with Image.open(path) as picture:
            if side >= MAPPED_FROM:
                picture.draft(None, (2 * side, 2 * side))  # never below that
            return squared(picture, fit, side, channels)
    except UnidentifiedImageError:
        raise DataError("no picture, or of a kind that cannot be read here") from None
    except _DAMAGE as error:
        if isinstance(error, OSError) and error.strerror:  # the system's, not the reader's
            if error.errno not in _OF_THE_FILE:
                raise OSError(error.errno, error.strerror, path) from error
            raise DataError(f"cannot be read: {error.strerror}") from error
        raise DataError(f"damaged: {shorten(error, 120) or type(error).__name__}") from error


def squared(picture: Image.Image, fit: str, side: int, channels: int = CHANNELS) -> NDArray[np.uint8]:
    """As `decode`, of a picture that is open. Raises DataError for one of more than 8 bits, and what Pillow raises."""
    if picture.mode.startswith(("I", "F")):
        raise DataError(f"more than 8 bits a channel, {picture.mode}: convert it to 8 bits")
    rgb = _cropped(picture, side) if fit == "crop" else _stretched(picture, side)
    return np.asarray(rgb) if channels == CHANNELS else np.asarray(rgb.convert("L"))[..., None]


def is_picture(path: str) -> bool:
    """Whether its first bytes are a picture's, whatever its name says."""
    try:
        with Image.open(path):
            return True
    except _DAMAGE:
        return False


def _stretched(picture: Image.Image, side: int) -> Image.Image:
    # RGB before resizing: palette indices must not be interpolated.
    rgb = picture if picture.mode == "RGB" else picture.convert("RGB")
    return rgb if rgb.size == (side, side) else rgb.resize((side, side), FILTER)


def _cropped(picture: Image.Image, side: int) -> Image.Image:
    picture.load()  # which turns a TIFF upright by itself
    if picture.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in picture.info:
        over = picture.convert("RGBA")
        rgb = Image.alpha_composite(Image.new("RGBA", over.size, "white"), over).convert("RGB")
    else:
        rgb = picture if picture.mode == "RGB" else picture.convert("RGB")
    if rgb.size != (side, side):
        middle = min(rgb.size)
        left, top = ((length - middle) / 2 for length in rgb.size)
        rgb = rgb.resize((side, side), FILTER, box=(left, top, left + middle, top + middle))
    turn = _UPRIGHT.get(_orientation(picture) or 0)  # the middle square stays the middle one, and is quicker to turn
    return rgb if turn is None else rgb.transpose(turn)


def _orientation(picture: Image.Image) -> int | None:
    try:
        return picture.getexif().get(_ORIENTATION)
    except _DAMAGE:  # of what the camera wrote beside the picture
        return None


def decode_all(
    paths: Sequence[str], fit: str, side: int, put: Callable[[int, NDArray[np.uint8]], None], *,
    channels: int = CHANNELS, progress: Progress | None, until: float | None,
) -> tuple[dict[int, str], int]:  # fmt: skip
    """Decodes in threads (Pillow lets others run while it decodes) and hands each picture to `put`, with its number.
    Returns what is wrong with the others, by number, and how many were looked at: those that were begun before `until`
    (of the monotonic clock, in seconds)."""
    enough = threading.Event()  # a large picture takes a second, and nobody who stops waits for 256 of them

    def chunk(start: int) -> list[NDArray[np.uint8] | str]:
        decoded: list[NDArray[np.uint8] | str] = []
        for path in paths[start : start + CHUNK]:
            if enough.is_set() or (until is not None and time.monotonic() >= until):
                break
            decoded.append(_decode_or_say(path, fit, side, channels))
        return decoded

    troubles: dict[int, str] = {}
    starts = range(0, len(paths), CHUNK)
    done = 0
    pool = ThreadPoolExecutor(max_workers=min(32, (os.cpu_count() or 1) + 1))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, of large pictures and odd palettes: decoded all the same
            for start, decoded in zip(starts, pool.map(chunk, starts), strict=True):
                for number, one in enumerate(decoded, start):
                    if isinstance(one, str):
                        troubles[number] = one
                    else:
                        put(number, one)
                done += len(decoded)
                if progress is not None:
                    progress("decoding pictures", done, len(paths))
    finally:
        enough.set()
        pool.shutdown(cancel_futures=True)
    return troubles, done


def decode_ahead(
    files: Iterable[tuple[str, str]], fit: str, side: int, ahead: int, channels: int = CHANNELS
) -> Iterator[tuple[str, NDArray[np.uint8] | str]]:
    """In threads, in order, each with its path: the picture, or what is wrong with it. `files`: paths, and why they
    cannot be read at all, if so. While `ahead` of them are taken the next as many are decoded, and `files` is not read
    further."""

    def one(file: tuple[str, str]) -> tuple[str, NDArray[np.uint8] | str]:
        path, trouble = file
        try:
            return path, trouble or _decode_or_say(path, fit, side, channels)
        except OSError as error:
            return path, str(error.strerror or error)

    left = iter(files)
    taken: Iterator[tuple[str, NDArray[np.uint8] | str]] = iter(())
    with ThreadPoolExecutor(max_workers=min(32, (os.cpu_count() or 1) + 1)) as pool, warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")  # of large pictures and odd palettes, as above
        while group := list(islice(left, ahead)):
            begun = pool.map(one, group)
            yield from taken
            taken = begun
        yield from taken


def _decode_or_say(path: str, fit: str, side: int, channels: int) -> NDArray[np.uint8] | str:
    try:
        return decode(path, fit, side, channels)
    except DataError as error:
        return str(error)
