"""Damaged checkpoints and hostile files, by the thousand: what is loaded, what is refused, and that nothing breaks.

    python -m benchmarks.corruption [--flips 4000] [--inputs 2000] [--seconds 420]

A small run is made; its newest checkpoint is damaged file by file in every way there is, then bits of it are flipped
(every bit of its manifest, and random positions of all files); after each, the checkpoint that a resume would load must
be an older, good generation, bit for bit, with what was skipped said. Then every reader of a file is given mutated
input: each must end in a value or a LowmemError. Readers run in a process of their own with
a limit on its memory. A good checkpoint is loaded with little memory to spare, too.
Writes `results/corruption.json` and `.md` beside this file.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import resource
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.conditions import RESULTS, conditions, sentence, table, write
from lowmem.config.settings import from_yaml
from lowmem.core.errors import CorruptCheckpoint, OutOfMemory
from lowmem.core.units import format_size
from lowmem.lifecycle.run_identity import belongs_to
from lowmem.runs import checkpoint as checkpoints
from tests.faults.damage import FILES, flip, flips, generations, judge, of_files, of_folders
from tests.faults.fuzzing import Tried, fuzz
from tests.faults.readers import readers
from tests.tiny import copy_run, make_run

_MEMORY_BYTES = 3 << 30
_M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
# To spare for loading a checkpoint of 24 MiB: from none to more than enough.
_SPARE_BYTES = (0, 1 << 20, 2 << 20, 4 << 20, 8 << 20, 12 << 20, 16 << 20, 24 << 20, 32 << 20, 64 << 20, 256 << 20)


def damage_whole_files(made: Path, foreign: Path, work: Path) -> dict[str, Any]:
    """Each way to damage a file or the folder of a checkpoint, once."""
    good, accept = generations(made), belongs_to(from_yaml(made / "config.yaml").config)
    newest_foreign = checkpoints.checkpoint_folders(foreign / "checkpoints")[0]
    wrong, tried = {}, 0
    for damage in (*of_files(newest_foreign), *of_folders(newest_foreign)):
        copy = copy_run(made, work)
        damage.inflict(checkpoints.checkpoint_folders(copy / "checkpoints")[0])
        tried += 1
        if (verdict := judge(copy, accept, good, at_most=6)) is not None:
            wrong[damage.name] = verdict
    return {"tried": tried, "undetected": len(wrong), "wrong": wrong}


def flip_bits(made: Path, work: Path, count: int, seed: int) -> dict[str, Any]:
    """Every bit of the manifest, and `count` random ones over all four files."""
    good, accept = generations(made), belongs_to(from_yaml(made / "config.yaml").config)
    copy = copy_run(made, work)
    newest = checkpoints.checkpoint_folders(copy / "checkpoints")[0]
    manifest_bytes = (newest / "manifest.json").stat().st_size
    positions = [("manifest.json", byte, bit) for byte in range(manifest_bytes) for bit in range(8)]
    positions += list(flips(copy, count, seed))
    per_file, wrong = dict.fromkeys(FILES, 0), []
    for name, byte, bit in positions:
        flip(newest / name, byte, bit)
        per_file[name] += 1
        if (verdict := judge(copy, accept, good, at_most=6)) is not None:
            wrong.append(f"{name} byte {byte} bit {bit}: {verdict}")
        flip(newest / name, byte, bit)
    assert judge(copy, accept, good, at_most=7) is None
    return {"flipped": len(positions), "per_file": per_file, "undetected": len(wrong), "wrong": wrong[:10]}


def fuzz_readers(made: Path, work: Path, inputs: int, seed: int, until: float) -> list[dict[str, Any]]:
    """Each reader in a child of its own: what one takes of memory is told apart from what another does."""
    found = []
    all_readers = readers(made, work)
    for number, reader in enumerate(all_readers):
        now = time.monotonic()
        deadline = now + max(1.0, until - now) / (len(all_readers) - number)
        one = _in_child(lambda reader=reader, deadline=deadline: _tried(fuzz(reader, inputs, seed, deadline)))  # type: ignore[misc]
        found.append(one)
        print(
            f"{one['name']}: {one['inputs']} inputs, {len(one['tracebacks'])} tracebacks", file=sys.stderr, flush=True
        )
    return found


def load_in_little_memory(made: Path) -> dict[str, Any]:
    """The newest checkpoint of a wider run (made at `made`), by processes that may take so much more memory than they
    have: it is loaded, or there is too little memory, and nobody calls it damaged."""
    # In a child: what training has taken and freed would be there to load into.
    _in_child(lambda: {"run": str(make_run(made, "model.width=32", "train.max_steps=1"))})
    accept = belongs_to(from_yaml(made / "config.yaml").config)
    newest = checkpoints.checkpoint_folders(made / "checkpoints")[0]

    def load() -> dict[str, Any]:
        # What is large comes from the system each time, and not from what was freed before: it counts.
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 17)
        try:
            loaded, where, skipped = checkpoints.load_newest(made / "checkpoints", accept)
        except CorruptCheckpoint as error:
            return {"came": "called damaged", "words": str(error)}
        except (MemoryError, OutOfMemory):
            return {"came": "out of memory"}
        except BaseException as error:  # a panic of the library under it is no Exception
            return {"came": "broke", "words": f"{type(error).__name__}: {error}"}
        whole = where == newest and not skipped and loaded.step == checkpoints.step_of(newest)
        return {"came": "loaded" if whole else "an older one loaded", "words": str(list(map(str, skipped.values())))}

    tried = {}
    for size in _SPARE_BYTES:
        tried[format_size(size)] = _in_child(load, size)
    wrong = {size: one for size, one in tried.items() if one["came"] not in ("loaded", "out of memory")}
    loaded = sum(one["came"] == "loaded" for one in tried.values())
    size = sum(file.stat().st_size for file in newest.iterdir())
    return {"tried": len(tried), "loaded": loaded, "wrong": wrong, "checkpoint_bytes": size}


def _tried(tried: Tried) -> dict[str, Any]:
    return asdict(tried) | {"tracebacks": {what: repr(data[:200]) for what, data in tried.tracebacks.items()}}


def _in_child(work: Callable[[], dict[str, Any]], memory_bytes: int = _MEMORY_BYTES) -> dict[str, Any]:
    """Forks, so that the libraries need not be loaded again. Linux only."""
    read, send = os.pipe()
    if (child := os.fork()) == 0:
        try:
            with os.fdopen(send, "w") as pipe:
                json.dump(_limited(work, memory_bytes), pipe)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)  # whatever happens, this process does not go on as its parent
    os.close(send)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    if status != 0 or not text:
        raise RuntimeError(f"the process that tried a reader ended with status {status}")
    return json.loads(text)


def _limited(work: Callable[[], dict[str, Any]], memory_bytes: int) -> dict[str, Any]:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit, most = pages * resource.getpagesize() + memory_bytes, resource.getrlimit(resource.RLIMIT_AS)[1]
    before = _peak_bytes()
    resource.setrlimit(resource.RLIMIT_AS, (limit, most))
    try:
        values = work()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (most, most))  # to tell of it
    return values | {"more_memory_bytes": _peak_bytes() - before}


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def markdown(record: dict[str, Any]) -> str:
    """The figures for a reader."""
    whole, bits, fuzzed, little = (record[name] for name in ("whole_files", "flips", "readers", "little_memory"))
    rows = [
        [
            one["name"], f"{one['inputs']:,}", f"{one['read']:,}", f"{one['refused']:,}", str(len(one["tracebacks"])),
            str(one["hangs"]), f"{one['slowest_seconds']:.2f}", f"{one['more_memory_bytes'] / 2**20:.0f}",
        ]
        for one in fuzzed
    ]  # fmt: skip
    header = ["reader", "inputs", "read", "refused", "tracebacks", "hangs", "slowest s", "more MiB"]
    broken, hung = sum(len(one["tracebacks"]) for one in fuzzed), sum(one["hangs"] for one in fuzzed)
    per_file = ", ".join(f"{count:,} of {name}" for name, count in bits["per_file"].items())
    return (
        "# Damaged checkpoints and hostile files\n\n"
        f"{sentence(record['conditions'])}.\n\n"
        f"- Whole files and folders of a checkpoint damaged (cut, emptied, deleted, swapped, zeroed, replaced): "
        f"{whole['tried']} ways, **{whole['undetected']} undetected**.\n"
        f"- Bits flipped: {bits['flipped']:,} ({per_file}; every bit of the manifest), "
        f"**{bits['undetected']} undetected**.\n"
        f"- Loaded with little memory to spare (a checkpoint of {format_size(little['checkpoint_bytes'])}): "
        f"{little['tried']} limits, loaded under {little['loaded']}, else out of memory; "
        f"**anything else under {len(little['wrong'])}**.\n"
        f"- Mutated inputs: {sum(one['inputs'] for one in fuzzed):,} over {len(fuzzed)} readers, "
        f"**{broken} tracebacks, {hung} hangs**.\n\n"
        "Undetected: anything but an older good generation was loaded, or it was not said what was skipped. Refused: "
        "one line and the exit code. \"Hash made to fit\": the commit record was made anew for the mutated file, as "
        "somebody who means harm would. More MiB: by how much the peak of the process rose over all inputs of the "
        "reader.\n\n" + table(header, rows)
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--flips", type=int, default=4000, help="random positions, beside every bit of the manifest")
    parser.add_argument("--inputs", type=int, default=2000, help="mutated inputs per reader")
    parser.add_argument("--seconds", type=float, default=420.0, help="for all; readers share what the flips leave")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    until = time.monotonic() + given.seconds
    record: dict[str, Any] = {"conditions": conditions(), "seed": given.seed}
    with tempfile.TemporaryDirectory() as folder:
        made, foreign = make_run(Path(folder, "run")), make_run(Path(folder, "foreign"), "optim.lr=0.05")
        record["whole_files"] = damage_whole_files(made, foreign, Path(folder, "damaged"))
        record["flips"] = flip_bits(made, Path(folder, "flipped"), given.flips, given.seed)
        print(f"{record['flips']['flipped']} bits flipped", file=sys.stderr, flush=True)
        record["little_memory"] = load_in_little_memory(Path(folder, "wide"))
        record["readers"] = fuzz_readers(made, Path(folder, "work"), given.inputs, given.seed, until)
    write(given.out, "corruption", record, markdown(record))
    bad = [record["whole_files"]["undetected"], record["flips"]["undetected"]]
    little = record["little_memory"]
    bad += [len(little["wrong"]), not little["loaded"]]
    bad += [len(one["tracebacks"]) + one["hangs"] for one in record["readers"]]
    sys.exit(1 if any(bad) else 0)


if __name__ == "__main__":
    main()
