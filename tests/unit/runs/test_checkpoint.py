"""Checkpoints exist when their commit record does; what does not verify is never loaded (invariants 8, 9)."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch

from lowmem.core.errors import CorruptCheckpoint, DiskError
from lowmem.runs import checkpoint as cp


def _make(step: int) -> cp.Checkpoint:
    generator = torch.Generator().manual_seed(step)
    weights = {"conv.weight": torch.randn(4, 3, generator=generator), "bn.count": torch.tensor(step)}
    momentum = {"momentum_buffer/conv.weight": torch.randn(4, 3, generator=generator)}
    return cp.Checkpoint(step, weights, momentum, {"run": {"loss_sum": 0.1 + step, "step": step}})


def test_round_trip(tmp_path: Path) -> None:
    made = _make(7)
    path = cp.save(tmp_path, made, keep=2)
    assert path.name == "step-00000007"
    assert sorted(file.name for file in path.iterdir()) == [
        "manifest.json", "model.safetensors", "optimizer.safetensors", "state.json"
    ]  # fmt: skip
    back = cp.load(path)
    assert back.step == 7
    assert back.state == made.state
    assert all(torch.equal(back.model[name], tensor) for name, tensor in made.model.items())
    assert all(torch.equal(back.optimizer[name], tensor) for name, tensor in made.optimizer.items())


def test_the_newest_are_kept_and_never_fewer_than_two(tmp_path: Path) -> None:
    for step in range(1, 6):
        cp.save(tmp_path, _make(step), keep=3)
    assert [path.name for path in cp.checkpoint_folders(tmp_path)] == [
        "step-00000005",
        "step-00000004",
        "step-00000003",
    ]
    cp.save(tmp_path, _make(6), keep=1)
    assert len(cp.checkpoint_folders(tmp_path)) == 2


def test_what_a_run_can_go_back_to_is_kept_while_its_loss_explodes(tmp_path: Path) -> None:
    def save(step: int, exploded: int) -> list[int]:
        made = _make(step)
        run = {"epoch": 0, "step": step, "step_in_epoch": step, "exploded_losses": exploded}
        cp.save(tmp_path, cp.Checkpoint(step, made.model, made.optimizer, {"run": run}), keep=2)
        return [cp.step_of(path) for path in cp.checkpoint_folders(tmp_path)]

    assert [save(1, 0), save(2, 0), save(3, 1)] == [[1], [2, 1], [3, 2]]
    assert [save(4, 2), save(5, 3)] == [[4, 3, 2], [5, 4, 2]]
    assert [save(6, 0), save(7, 0)] == [[6, 5], [7, 6]]


def test_the_same_step_again_replaces(tmp_path: Path) -> None:
    cp.save(tmp_path, _make(3), keep=2)
    changed = cp.Checkpoint(3, _make(4).model, _make(4).optimizer, {"run": {}})
    cp.save(tmp_path, changed, keep=2)
    assert cp.load(tmp_path / "step-00000003").state == {"run": {}}
    assert len(list(tmp_path.iterdir())) == 1


def test_a_crash_between_the_two_renames_leaves_the_old_one(tmp_path: Path) -> None:
    path = cp.save(tmp_path, _make(3), keep=2)
    os.replace(path, path.with_name(path.name + ".old"))
    loaded, where, skipped = cp.load_newest(tmp_path)
    assert (loaded.step, where.name, skipped) == (3, "step-00000003.old", {})


DAMAGES = {
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "emptied": lambda file: file.write_bytes(b""),
    "deleted": lambda file: file.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
def test_damage_falls_back_to_the_one_before(tmp_path: Path, damage: str, name: str) -> None:
    cp.save(tmp_path, _make(1), keep=2)
    newest = cp.save(tmp_path, _make(2), keep=2)
    DAMAGES[damage](newest / name)
    loaded, _, skipped = cp.load_newest(tmp_path)
    assert loaded.step == 1
    assert len(skipped) == 1
    assert next(iter(skipped)).name == "step-00000002"


def test_no_flipped_bit_passes(tmp_path: Path) -> None:
    path = cp.save(tmp_path, _make(1), keep=2)
    intact = cp.load(path)
    rng = random.Random(0)
    for _ in range(200):
        file = rng.choice(sorted(path.iterdir()))
        data = bytearray(file.read_bytes())
        original = bytes(data)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        file.write_bytes(data)
        try:
            loaded = cp.load(path)
        except CorruptCheckpoint:
            pass
        else:
            # Only white space of the commit record may differ unnoticed: what is loaded is still what was saved.
            assert file.name == "manifest.json"
            assert json.loads(bytes(data)) == json.loads(original)
            assert loaded.state == intact.state
        file.write_bytes(original)


def test_swapped_steps_and_foreign_folders_are_refused(tmp_path: Path) -> None:
    cp.save(tmp_path, _make(1), keep=2)
    shutil.copytree(tmp_path / "step-00000001", tmp_path / "step-00000009")
    with pytest.raises(CorruptCheckpoint, match="of step 1, the folder of step 9"):
        cp.load(tmp_path / "step-00000009")
    (tmp_path / "step-junk").mkdir()
    (tmp_path / "step-00000042").symlink_to(tmp_path / "step-00000001")
    assert cp.load_newest(tmp_path)[0].step == 1


def test_file_names_in_the_record_cannot_lead_outside(tmp_path: Path) -> None:
    path = cp.save(tmp_path, _make(1), keep=2)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["../../evil"] = manifest["files"].pop("state.json")
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CorruptCheckpoint, match="does not list exactly"):
        cp.load(path)


def test_nothing_usable_says_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(CorruptCheckpoint, match="another --out"):
        cp.load_newest(tmp_path)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("victim", ["write_synced", "fsync_folder"])
def test_a_failing_disk_leaves_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, victim: str
) -> None:
    cp.save(tmp_path, _make(1), keep=2)

    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(cp, victim, refuse)
    with pytest.raises(DiskError, match="earlier checkpoints are intact"):
        cp.save(tmp_path, _make(2), keep=2)
    assert cp.load_newest(tmp_path)[0].step == 1
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_what_a_killed_writer_left_of_another_step_is_removed(tmp_path: Path) -> None:
    cp.save(tmp_path, _make(1), keep=2)
    (tmp_path / ".aside-step-00000007").mkdir()
    (tmp_path / ".aside-step-00000007/model.safetensors").write_bytes(b"half")
    cp.save(tmp_path, _make(2), keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]
