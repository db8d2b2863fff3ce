"""Ways to damage a checkpoint, and what must come of each: a good generation, bit for bit, and a word about it."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from lowmem.core.errors import CorruptCheckpoint
from lowmem.runs import checkpoint as checkpoints

FILES = ("manifest.json", "model.safetensors", "optimizer.safetensors", "state.json")


@dataclass(frozen=True)
class Damage:
    """`inflict(newest)` is given the folder of the newest checkpoint; `newest.parent` holds the others."""

    name: str
    inflict: Callable[[Path], object]


def _cut(name: str, size: Callable[[int], int]) -> Callable[[Path], None]:
    def inflict(newest: Path) -> None:
        data = (newest / name).read_bytes()
        (newest / name).write_bytes(data[: size(len(data))])

    return inflict


def _replace(name: str, make: Callable[[Path, bytes], object]) -> Callable[[Path], None]:
    def inflict(newest: Path) -> None:
        file = newest / name
        data = file.read_bytes()
        file.unlink()
        make(file, data)

    return inflict


def _before(newest: Path) -> Path:
    return checkpoints.checkpoint_folders(newest.parent)[1]


def of_files(foreign: Path) -> Iterator[Damage]:
    """Each file of a checkpoint in each way. `foreign`: the checkpoint of the same step of another run."""
    for name in FILES:
        cuts: dict[str, Callable[[int], int]] = {
            "emptied": lambda n: 0,
            "cut to 1 byte": lambda n: 1,
            "cut to 8 bytes": lambda n: 8,
            "cut to a half": lambda n: n // 2,
            "cut by 1 byte": lambda n: n - 1,
            "cut by 512 bytes": lambda n: max(0, n - 512),
        }
        for what, size in cuts.items():
            yield Damage(f"{name} {what}", _cut(name, size))
        made: dict[str, Callable[[Path, bytes], object]] = {
            "deleted": lambda file, data: None,
            "a byte longer": lambda file, data: file.write_bytes(data + b"\n"),
            "zeroed": lambda file, data: file.write_bytes(bytes(len(data))),
            "a folder": lambda file, data: file.mkdir(),
            "a link to nothing": lambda file, data: file.symlink_to("nowhere"),
            "a link to the one before": lambda file, data: file.symlink_to(_before(file.parent) / file.name),
            "of the step before": lambda file, data: shutil.copy(_before(file.parent) / file.name, file),
            "of another run": lambda file, data: shutil.copy(foreign / file.name, file),
            "upper case": lambda file, data: file.write_bytes(data.upper()),
        }
        for what, make in made.items():
            if "link" not in what or os.name != "nt":
                yield Damage(f"{name} {what}", _replace(name, make))


def of_folders(foreign: Path) -> Iterator[Damage]:
    """The whole checkpoint."""

    def instead(make: Callable[[Path], object]) -> Callable[[Path], None]:
        def inflict(newest: Path) -> None:
            shutil.rmtree(newest)
            make(newest)

        return inflict

    yield Damage("the folder is a file", instead(lambda path: path.write_bytes(b"x")))
    yield Damage("the folder is empty", instead(lambda path: path.mkdir()))
    yield Damage("the folder is another step's", instead(lambda path: shutil.copytree(_first(path), path)))
    yield Damage("the folder is another run's", instead(lambda path: shutil.copytree(foreign, path)))
    if os.name != "nt":
        yield Damage("the folder is a link", instead(lambda path: path.symlink_to(_first(path))))
    yield Damage("a later step that is a copy", _later)


def _first(path: Path) -> Path:
    return checkpoints.checkpoint_folders(path.parent)[0]


def _later(newest: Path) -> None:
    shutil.copytree(newest, newest.with_name("step-00000099"))
    shutil.rmtree(newest)


def flips(run: Path, count: int, seed: int) -> Iterator[tuple[str, int, int]]:
    """(file of the newest checkpoint, byte, bit) at random; each file has the same share, so that the small ones,
    which steer the reading, are flipped often."""
    rng = random.Random(seed)
    newest = checkpoints.checkpoint_folders(run / "checkpoints")[0]
    for number in range(count):
        name = FILES[number % len(FILES)]
        yield name, rng.randrange((newest / name).stat().st_size), rng.randrange(8)


def flip(file: Path, byte: int, bit: int) -> None:
    """One bit, in place."""
    with open(file, "rb+") as opened:
        opened.seek(byte)
        old = opened.read(1)[0]
        opened.seek(byte)
        opened.write(bytes([old ^ 1 << bit]))


def generations(run: Path) -> dict[int, checkpoints.Checkpoint]:
    """All checkpoints of an undamaged run, by step."""
    return {saved.step: saved for saved in map(checkpoints.load, checkpoints.checkpoint_folders(run / "checkpoints"))}


def judge(
    run: Path, accept: Callable[[checkpoints.Checkpoint], None], good: dict[int, checkpoints.Checkpoint], at_most: int
) -> str | None:
    """None if what is loaded from `run` is a good generation of at most step `at_most`, bit for bit, and everything
    newer that bears a checkpoint's name is said to be skipped; else what is wrong."""
    try:
        loaded, where, skipped = checkpoints.load_newest(run / "checkpoints", accept)
    except CorruptCheckpoint as error:
        return f"nothing was loaded: {error}"
    if loaded.step > at_most or not same_checkpoint(loaded, good[loaded.step]):
        return f"{where.name} was loaded, which is not what was saved"
    names = {path.name for path in (run / "checkpoints").iterdir() if path.name > where.name}
    if {path.name for path in skipped} != names or not all(path.name in str(why) for path, why in skipped.items()):
        return f"skipped {names}, but what was said is {skipped}"
    return None


def same_checkpoint(left: checkpoints.Checkpoint, right: checkpoints.Checkpoint) -> bool:
    """To the last bit, dtypes and names included."""
    return (
        (left.step, left.state) == (right.step, right.state)
        and _same(dict(left.model), dict(right.model))
        and _same(dict(left.optimizer), dict(right.optimizer))
    )


def _same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        tensor.dtype == right[name].dtype and tensor.shape == right[name].shape and _bits(tensor) == _bits(right[name])
        for name, tensor in left.items()
    )


def _bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().numpy().tobytes()
