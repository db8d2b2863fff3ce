"""Exported weights say what they are, in equal files for equal runs; and what a stranger's file says is bounded."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import lowmem
from lowmem.core.reading import Unreadable
from lowmem.data import load
from lowmem.lifecycle import resume_training, run_training
from lowmem.lifecycle.verify import verify
from lowmem.runs.store import RunFolder
from lowmem.runs.view import read_run
from lowmem.runs.weights import WeightsInfo, read_weights
from tests.tiny import tiny

README = Path(__file__).parents[3] / "README.md"
INFO = WeightsInfo(arch="res20", classes=tuple("abcdefghij"), mean=(0.1, 0.2, 0.3), epoch=2, step=20, error_pct=7.46)


def _digests(run: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (run / "weights").iterdir()}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "run"
    run_training(tiny("train.epochs=1"), path)
    return path


def test_what_weights_say_of_themselves(run: Path) -> None:
    config = read_run(run).config
    dataset, row = load(config.data, config.seed), read_run(run).last
    shapes, info = read_weights(run / "weights/last.safetensors")
    assert row is not None
    assert shapes["linear.bias"] == (10,)
    assert (info.arch, info.block, info.width, info.shortcuts) == ("res20", "basic", 2, True)
    assert (info.data, info.classes, info.image_size) == ("shapes", dataset.classes, 32)
    assert (info.mean, info.std) == (dataset.mean, dataset.std)
    assert (info.epoch, info.step, info.error_on, info.chosen_on) == (1, 3, "test", None)
    assert info.error_pct == row.test_error_pct
    assert info.version == lowmem.__version__
    assert read_run(run).best == info.model_copy(update={"chosen_on": "test"})


def test_env_json_says_what_the_run_learns(run: Path) -> None:
    env, info = read_run(run).env, read_weights(run / "weights/last.safetensors")[1]
    told = {name: env[name] for name in ("data", "classes", "image_size", "mean", "std")}
    assert WeightsInfo.model_validate(told) == WeightsInfo.model_validate(info.model_dump(include=set(told)))


def test_equal_runs_write_equal_files(run: Path, tmp_path: Path) -> None:
    run_training(tiny("train.epochs=1", "train.max_steps=2"), tmp_path / "run")
    resume_training(tmp_path / "run", {"train.max_steps": None})
    assert _digests(tmp_path / "run") == _digests(run)
    assert len(_digests(run)) == 2


def test_the_same_values_are_the_same_bytes(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "run", "", {}) as folder:
        for number in range(20):  # a map of several keys has a random order
            folder.save_weights(f"{number}", {"w": torch.ones(2)}, INFO)
        assert len(set(_digests(folder.path).values())) == 1


def test_files_of_older_versions(run: Path, tmp_path: Path) -> None:
    """They had a key for each value, and most values not at all."""
    old = tmp_path / "run"
    shutil.copytree(run, old)
    tensors = load_file(run / "weights/best.safetensors")
    said = {"arch": "res20", "epoch": "1", "step": "3", "error_pct": "87.5", "error_on": "test", "chosen_on": "test"}
    save_file(tensors, old / "weights/best.safetensors", said)
    save_file(tensors, old / "weights/last.safetensors")
    best = read_run(old).best
    assert best is not None
    assert (best.arch, best.epoch, best.step, best.error_pct, best.chosen_on) == ("res20", 1, 3, 87.5, "test")
    assert (best.classes, read_weights(old / "weights/last.safetensors")[1]) == (None, WeightsInfo())
    verified = verify(old)
    assert verified.can_resume
    found = {finding.where: finding for finding in verified.findings}
    assert found["weights/best.safetensors"].what.startswith("of step 3; its classes have no names; equal to its")
    assert found["weights/last.safetensors"].status == "ok"


def test_class_names_that_are_no_text(run: Path) -> None:
    config = read_run(run).config
    dataset = load(config.data, config.seed)
    odd = type(dataset)(**{**vars(dataset), "name": "folder:\udcff", "classes": ("ä", "b\udcff", "c")})
    info = WeightsInfo.model_validate(odd.describe())
    assert (info.data, info.classes) == ("folder:?", ("ä", "b?", "c"))
    assert WeightsInfo.model_validate_json(info.to_metadata()["lowmem"]) == info


def _hostile() -> Iterator[tuple[str, str]]:
    def changed(**values: object) -> str:
        return json.dumps({**json.loads(INFO.to_metadata()["lowmem"]), **values})

    yield "no JSON", "{"
    yield "no object", "[1, 2]"
    yield "nested", "[" * 100_000
    yield "huge number", f'{{"epoch": {"9" * 5000}}}'
    yield "NaN", '{"error_pct": NaN}'
    yield "epoch", changed(epoch=-1)
    yield "mean", changed(mean=[1.0, 2.0])
    yield "classes of numbers", changed(classes=list(range(10)))
    yield "more classes than outputs", changed(classes=["a"] * 11)
    yield "chosen on", changed(chosen_on="the moon")


@pytest.mark.parametrize("text", [pytest.param(text, id=name) for name, text in _hostile()])
def test_what_a_stranger_says(run: Path, tmp_path: Path, text: str) -> None:
    path = tmp_path / "run/weights/best.safetensors"
    shutil.copytree(run, tmp_path / "run")
    save_file(load_file(path), path, {"lowmem": text})
    with pytest.raises(Unreadable):
        read_weights(path)
    view = read_run(tmp_path / "run")
    assert (view.best, view.notes) == (None, ["weights/best.safetensors cannot be read"])
    found = {finding.where: finding for finding in verify(tmp_path / "run").findings}["weights/best.safetensors"]
    assert (found.status, "another network" in found.what) == ("damaged", False)


def test_what_later_versions_say_is_left_out(tmp_path: Path) -> None:
    save_file({"w": np.zeros(3)}, tmp_path / "w", {"lowmem": '{"arch": "res20", "licence": "MIT"}'})
    assert read_weights(tmp_path / "w")[1] == WeightsInfo(arch="res20")
