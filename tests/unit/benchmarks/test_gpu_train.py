"""Turns that add up to the report: what comes back of one, and how another goes on from it."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import train
from benchmarks.gpu.rehearse import make_archive
from benchmarks.gpu.train import Turn, take
from lowmem.core.errors import PreflightError, UsageError


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_archive(tmp_path_factory.mktemp("pictures") / "pictures.tar.xz")


def _turn(pictures: Path, out: Path, **changes: Any) -> Turn:
    values = {"network": "res20", "device": "cpu", "width": 4, "minutes": 5.0, "epochs": 2}
    return Turn(**{**values, "pictures": pictures, "out": out, **changes})  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_network_in_one_turn(pictures: Path, tmp_path: Path) -> None:
    record = take(_turn(pictures, tmp_path))
    assert record is not None
    assert (record["finished"], record["epochs_done"], record["left_out"]) == (True, 2, [])
    assert record["device"] == "cpu"
    assert record["environment"]["card"] is None
    assert 0 <= record["least_test_error_pct"] <= record["test_error_pct"] <= 100
    assert set(record["weights_sha256"]) == {"best.safetensors", "last.safetensors"}
    assert json.loads((tmp_path / "train-res20.json").read_text()) == record
    with tarfile.open(tmp_path / "train-res20.tar.gz") as archive:
        names = archive.getnames()
    assert "res20/metrics.csv" in names
    assert any(name.startswith("res20/checkpoints/") for name in names)
    assert take(_turn(pictures, tmp_path)) is None


def test_the_next_one_is_the_first_that_is_not_finished(tmp_path: Path) -> None:
    turn = _turn(tmp_path, tmp_path, network="next")
    member = train._member(turn)
    assert member is not None
    assert member.name == "res20"
    (tmp_path / "train-res20.json").write_text('{"finished": true}')
    (tmp_path / "train-cnn20.json").write_text('{"finished": false}')
    member = train._member(turn)
    assert member is not None
    assert member.name == "cnn20"


def test_what_is_too_large_stays_behind_and_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "res20"
    for name in ("checkpoints/step-00000001", "weights"):
        (run / name).mkdir(parents=True)
        (run / name / "model.safetensors").write_bytes(b"x" * 2000)
    (run / "metrics.csv").write_text("epoch\n")
    monkeypatch.setattr(train, "LARGEST_BYTES", 3000)
    assert train._pack(run, tmp_path / "train-res20.tar.gz") == ["checkpoints", "weights"]
    with tarfile.open(tmp_path / "train-res20.tar.gz") as archive:
        assert archive.getnames() == ["res20/metrics.csv"]
    assert not train._unpacked(tmp_path / "train-res20.tar.gz", tmp_path / "again/res20")


def test_what_cannot_be_meant_is_refused(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no run 'res21'"):
        take(_turn(pictures, tmp_path, network="res21"))
    with pytest.raises(UsageError, match="train and test"):
        take(_turn(tmp_path, tmp_path))
    with pytest.raises(PreflightError, match="--minutes"):
        take(_turn(pictures, tmp_path, minutes=0.01, epochs=None))
