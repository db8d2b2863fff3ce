from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from lowmem.data import kept

TENSORS = {"a": torch.arange(1000, dtype=torch.int64), "b": torch.zeros(3, dtype=torch.uint8)}
SIGNATURE = "5" * 64


def data_file(folder: Path) -> Path:
    (found,) = folder.glob("pictures-*.safetensors")
    return found


def test_what_was_written_is_read(tmp_path: Path) -> None:
    kept.write_cache(tmp_path / "new" / "folder", SIGNATURE, TENSORS)
    found = kept.read_cache(tmp_path / "new" / "folder", SIGNATURE)
    assert found is not None
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)


def test_nothing_there(tmp_path: Path) -> None:
    assert kept.read_cache(tmp_path / "none", SIGNATURE) is None


def test_another_signature_is_not_served_and_replaces(tmp_path: Path) -> None:
    kept.write_cache(tmp_path, SIGNATURE, TENSORS)
    assert kept.read_cache(tmp_path, "6" * 64) is None
    kept.write_cache(tmp_path, "6" * 64, TENSORS)
    assert kept.read_cache(tmp_path, SIGNATURE) is None
    assert len(list(tmp_path.iterdir())) == 2  # no leftovers


@pytest.mark.parametrize(
    "damage", ["flip", "cut", "longer", "gone", "manifest cut", "manifest foreign", "manifest list"]
)
def test_damage_is_noticed(tmp_path: Path, damage: str) -> None:
    kept.write_cache(tmp_path, SIGNATURE, TENSORS)
    path, manifest = data_file(tmp_path), tmp_path / "manifest.json"
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[-5] ^= 1
        path.write_bytes(data)
    elif damage == "cut":
        path.write_bytes(data[:-1])
    elif damage == "longer":
        path.write_bytes(data + b"x")
    elif damage == "gone":
        path.unlink()
    else:
        text = {"cut": manifest.read_text()[:-9], "foreign": '{"format": 1}', "list": "[]"}
        manifest.write_text(text[damage.removeprefix("manifest ")])
    assert kept.read_cache(tmp_path, SIGNATURE) is None


def test_a_failed_write_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept.write_cache(tmp_path, SIGNATURE, TENSORS)

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        kept.write_cache(tmp_path, "6" * 64, TENSORS)
    assert kept.read_cache(tmp_path, SIGNATURE) is not None
    assert len(list(tmp_path.iterdir())) == 2


def test_the_manifest_says_what_it_vouches_for(tmp_path: Path) -> None:
    kept.write_cache(tmp_path, SIGNATURE, TENSORS)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["size_bytes"] == data_file(tmp_path).stat().st_size
    assert len(manifest["sha256"]) == 64
