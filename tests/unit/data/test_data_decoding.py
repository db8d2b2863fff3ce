from __future__ import annotations

import errno
import itertools
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from lowmem.config.sections import DataConfig
from lowmem.core.errors import DataError
from lowmem.data import decoding, load
from lowmem.data.folder import read

FITS = ("crop", "stretch")
RNG_SHAPE = (48, 80, 3)


def noise(shape: tuple[int, ...] = RNG_SHAPE, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def decode(path: str, fit: str) -> np.ndarray:
    return decoding.decode(path, fit, 32)


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def middle(picture: Image.Image) -> np.ndarray:
    """The middle square of the shorter side, resized."""
    side = min(picture.size)
    left, top = ((length - side) // 2 for length in picture.size)
    square = (left, top, left + side, top + side)
    return np.asarray(picture.resize((32, 32), Image.Resampling.BICUBIC, box=square)).astype(int)


@pytest.mark.parametrize("kind", ["png", "jpg", "webp", "tiff"])
@pytest.mark.parametrize("size", [RNG_SHAPE, (32, 32, 3)])
def test_a_picture_is_seen_as_viewers_show_it(tmp_path: Path, kind: str, size: tuple[int, ...]) -> None:
    for orientation in range(1, 9):
        path = tmp_path / f"{orientation}.{kind}"
        Image.fromarray(noise(size)).save(path, exif=turned(orientation))
        with Image.open(path) as picture:
            shown = middle(ImageOps.exif_transpose(picture))
        # Turned after resizing: the filter's two passes round in another order.
        assert abs(decode(str(path), "crop") - shown).max() <= 2, orientation


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_stops_no_picture(tmp_path: Path) -> None:
    Image.fromarray(noise()).save(tmp_path / "a.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f", quality=95)
    Image.fromarray(noise()).save(tmp_path / "b.jpg", quality=95)
    assert np.array_equal(decode(str(tmp_path / "a.jpg"), "crop"), decode(str(tmp_path / "b.jpg"), "crop"))


@pytest.mark.parametrize("size", [(32, 32, 3), (20, 20, 3), (97, 97, 3)])
def test_square_pictures_are_the_same_either_way(tmp_path: Path, size: tuple[int, ...]) -> None:
    Image.fromarray(noise(size)).save(tmp_path / "a.png")
    crop, stretch = (decode(str(tmp_path / "a.png"), fit) for fit in FITS)
    assert np.array_equal(crop, stretch)


def test_proportions_are_kept(tmp_path: Path) -> None:
    """A white square in the middle of a wide black picture stays one."""
    pixels = np.zeros((100, 300, 3), np.uint8)
    pixels[25:75, 125:175] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    crop, stretch = (decode(str(tmp_path / "a.png"), fit)[..., 0] > 127 for fit in FITS)
    assert (crop.any(0).sum(), crop.any(1).sum()) == (16, 16)
    assert stretch.any(0).sum() < stretch.any(1).sum()


@pytest.mark.parametrize("size", [(5000, 1), (1, 5000), (1, 1), (7, 3), (33, 32)])
def test_any_size(tmp_path: Path, size: tuple[int, int]) -> None:
    Image.new("RGB", size, (1, 2, 3)).save(tmp_path / "a.png")
    for fit in FITS:
        pixels = decode(str(tmp_path / "a.png"), fit)
        assert pixels.shape == (32, 32, 3)
        assert (pixels == (1, 2, 3)).all()


def _palette(clear: int | bytes) -> tuple[Image.Image, dict[str, object]]:
    picture = Image.new("P", (40, 40), 0)
    picture.putpalette([200, 10, 10, 0, 0, 255])
    return picture, {"transparency": clear}


def _transparent(mode: str) -> tuple[Image.Image, dict[str, object]]:
    if mode == "P, an index":
        return _palette(0)
    if mode == "P, a table":
        return _palette(b"\0\xff")
    if mode == "RGB, a colour":
        return Image.new("RGB", (40, 40), (200, 10, 10)), {"transparency": (200, 10, 10)}
    if mode == "L, a level":
        return Image.new("L", (40, 40), 9), {"transparency": 9}
    return Image.new(mode, (40, 40), (200, 10, 10, 0) if mode == "RGBA" else (77, 0)), {}


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P, an index", "P, a table", "RGB, a colour", "L, a level"])
def test_colours_under_full_transparency_are_not_seen(tmp_path: Path, mode: str) -> None:
    picture, how = _transparent(mode)
    picture.save(tmp_path / "a.png", **how)  # type: ignore[arg-type]
    assert (decode(str(tmp_path / "a.png"), "crop") == 255).all()
    assert not (decode(str(tmp_path / "a.png"), "stretch") == 255).all()


def test_half_transparent_is_half_white(tmp_path: Path) -> None:
    Image.new("RGBA", (32, 32), (0, 0, 0, 128)).save(tmp_path / "a.png")
    assert (abs(decode(str(tmp_path / "a.png"), "crop").astype(int) - 127) <= 1).all()


@pytest.mark.parametrize("fit", FITS)
def test_what_cameras_and_scanners_write(tmp_path: Path, fit: str) -> None:
    grey = Image.fromarray(noise((32, 32)))
    for name, picture in (("grey.jpg", grey), ("bits.png", grey.convert("1")), ("cmyk.jpg", grey.convert("CMYK"))):
        picture.save(tmp_path / name)
        assert decode(str(tmp_path / name), fit).shape == (32, 32, 3)
    frames = [Image.new("RGB", (32, 32), colour) for colour in ((200, 0, 0), (0, 200, 0))]
    for kind in ("gif", "webp"):
        frames[0].save(tmp_path / f"a.{kind}", save_all=True, append_images=frames[1:], duration=100)
        first = decode(str(tmp_path / f"a.{kind}"), fit)
        assert (abs(first.astype(int) - (200, 0, 0)) < 8).all()


def _bomb(path: Path) -> None:
    Image.new("1", (20_000, 20_000)).save(path)


def _cut(path: Path) -> None:
    Image.fromarray(noise()).save(path)
    path.write_bytes(path.read_bytes()[:-900])


def _sixteen(path: Path) -> None:
    Image.fromarray(np.full((32, 32), 40_000, np.uint16)).save(path)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: path.write_text("text"), "no picture"),
        (_cut, "damaged: .*truncated"),
        (_sixteen, r"more than 8 bits a channel, I;16: convert it"),
        (_bomb, "damaged: Image size .*exceeds limit"),
        (lambda path: None, "cannot be read: No such file"),
    ],
)
def test_what_is_no_picture_is_said(tmp_path: Path, make: object, words: str) -> None:
    make(tmp_path / "a.png")  # type: ignore[operator]
    for fit in FITS:
        with pytest.raises(DataError, match=words) as caught:
            decode(str(tmp_path / "a.png"), fit)
        assert "\n" not in str(caught.value)


def test_large_pictures_are_no_matter_of_warnings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # Pillow warns above it, and refuses twice that
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / "pets" / part / name).mkdir(parents=True)
            Image.fromarray(noise((40, 40, 3))).save(tmp_path / "pets" / part / name / "0.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(DataConfig(source=f"folder:{tmp_path / 'pets'}", cache=str(tmp_path / "cache")), 0)


def test_old_runs_have_their_pictures(tmp_path: Path) -> None:
    """`stretch` without val/ gives, byte for byte, what was trained on before there was a choice: the fingerprints are
    those of dbb49d4."""
    rng = np.random.default_rng(7)
    for part in ("train", "test", "val"):
        for name in ("cat", "dog"):
            folder = tmp_path / "odd" / part / name
            folder.mkdir(parents=True)
            wide = Image.fromarray(rng.integers(0, 256, (40, 90, 3), dtype=np.uint8))
            wide.save(folder / "0.png", exif=turned(6))
            clear = Image.fromarray(rng.integers(0, 256, (50, 50, 4), dtype=np.uint8))
            clear.save(folder / "1.png")
            indexed = Image.fromarray(rng.integers(0, 16, (30, 60), dtype=np.uint8))
            indexed.putpalette(rng.integers(0, 256, 48, dtype=np.uint8).tobytes())
            indexed.save(folder / "2.png", transparency=3)
            wide.resize((32, 32)).convert("L").save(folder / "3.png")

    def fingerprint(seed: int, **settings: object) -> str:
        config = DataConfig(source=f"folder:{tmp_path}/odd", cache=str(tmp_path / "cache"), **settings)  # type: ignore[arg-type]
        return load(config, seed).fingerprint

    old = {"fit": "stretch", "val_folder": False}
    chosen = {"train_subset": 7, "val_split": 3, "test_subset": 5}
    assert fingerprint(0, **old) == "4eb89405cd03d7e471df02378b28be0adf06a3b7f00566bb89a3b93dac6da80c"
    assert fingerprint(3, **old, **chosen) == "21bb91afed2a17c2123c517cbd0b8d24f0fbcb853b735319013f379e7f3d937f"
    assert fingerprint(0) != fingerprint(0, **old)


def test_a_machine_that_fails_takes_no_picture_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another time the picture would be read: --skip-damaged is not for it, and what was decoded is kept."""
    root = tmp_path / "pets"
    for part, name in itertools.product(("train", "test"), ("a", "b")):
        (root / part / name).mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(root / part / name / "1.png")
    config = DataConfig(source=f"folder:{root}", cache=str(tmp_path / "cache"), skip_damaged=True)
    opened = Image.open

    def flaky(path: str) -> Image.Image:
        if "test" in path and "b" in Path(path).parent.name:
            raise OSError(errno.EIO, "Input/output error")
        return opened(path)

    monkeypatch.setattr(Image, "open", flaky)
    with pytest.raises(DataError, match=r"1\.png cannot be read \(Input/output error"):
        read(config)
    monkeypatch.setattr(Image, "open", opened)
    assert len(read(config).train.labels) == 2
