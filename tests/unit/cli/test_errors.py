"""Wrong input ends with one clear line, the way out, and the right exit code; no traceback, nothing lost."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lowmem.cli.main import main
from tests.conftest import environment

FEW = ["--arch", "res20", "--width", "2", "--data", "shapes", "--epochs", "1", "--set", "data.train_subset=100"]
SMALL = [*FEW, "--batch", "50"]


def _leave(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> tuple[int, str]:
    with pytest.raises(SystemExit) as leaving:
        main(arguments)
    err = capsys.readouterr().err
    assert "Traceback" not in err
    assert len(err.strip().splitlines()) <= 1
    assert isinstance(leaving.value.code, int)
    return leaving.value.code, err


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["train", "--arch", "res21"], 2, "choose one of res20"),
        (["train", "--arch", "res50", "--block", "basic"], 2, "--block bottleneck"),
        (["train", "--block", "wide"], 2, "--block basic"),
        (["train", "--data", "folder:/no/such/place"], 3, "train/<class>"),
        (["train", "--set", "data.download=false", "--data-root", "nowhere"], 3, "CIFAR-10 is not in nowhere"),
        (["train", "--set", "optim.learning_rate=1"], 2, "did you mean 'optim.lr'"),
        (["train", "--batch", "-5"], 2, "train.batch = -5"),
        (["train", "--batch", "many"], 2, "whole number"),
        (["train", "--epochs", "0"], 2, "a whole number > 0"),
        (["train", "--width", "0"], 2, "a whole number > 0"),
        (["train", "--precision", "fp64"], 2, "auto, fp32, amp or bf16"),
        (["train", "--data", "imagenet"], 2, "folder:PATH"),
        (["train", "--config", "none.yaml"], 2, "does not exist"),
        (["train", "--recipe", "none"], 2, "use one of modern, report"),
        (["train", "--bogus"], 2, "--help"),
        (["train", "--set", "nonsense=1"], 2, "`lowmem settings`"),
        # Flags of others, and settings that have none.
        (["train", "--momentum", "0.8"], 2, "`--set optim.momentum=0.8`"),
        (["train", "--weight-decay=1e-5"], 2, "`--set optim.weight_decay=1e-5`"),
        (["train", "--learning-rate", "0.2"], 2, "`--lr 0.2`"),
        (["train", "--batch-size", "64"], 2, "`--batch 64`"),
        (["train", "--dataset", "my pictures"], 2, "`--data 'my pictures'`"),
        (["train", "--max-steps", "3"], 2, "`--set train.max_steps=3`"),
        (["train", "--no-augment"], 2, "`--set data.augment=false`"),
        (["train", "--nesterov"], 2, "`--set optim.nesterov=true`"),
        (["train", "--amp"], 2, "`--precision amp`"),
        (["fork", "runs/a", "--mixed-precision"], 2, "`--set train.precision=amp`"),
        (["train", "--set", "amp=true"], 2, "did you mean 'train.precision=amp'"),
        (["resume", "runs/a", "--model", "res56"], 2, "`lowmem train --set model.arch=res56`"),
        (["train", "--output-dir", "runs/a"], 2, "`--out runs/a`"),
        (["train", "--workers", "4"], 2, "leave it out"),
        (["train", "--resume", "runs/a"], 2, "`lowmem resume RUN`"),
        (["plan", "--epochs", "3"], 2, "`--set train.epochs=3`"),
        (["resume", "runs/a", "--lr", "0.01"], 2, "`lowmem fork RUN --at last --set optim.lr=0.01`"),
        (["ls", "--momentum", "0.8"], 2, "No such option: --momentum"),
        (["bogus"], 2, "--help"),
        (["train", "--set", "data.val_split=100000", *SMALL], 2, "100"),
        (["resume", "runs/none"], 2, "does not exist"),
        (["resume", "."], 2, "no run folder"),
        (["report", "runs/none"], 2, "runs/none"),
        (["resume"], 2, "Missing argument"),
    ],
)
def test_wrong_input(
    arguments: list[str],
    code: int,
    says: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    left, err = _leave(capsys, arguments)
    assert (left, says in err) == (code, True), err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ("train --data folder:nowhere", 3),
        ("train --card gtx9999", 2),
        ("train --set optim.lr=-1", 2),
        ("train --out there", 2),
        ("train --out there/file/run", 3),
        ("plan --card gtx9999", 2),
        ("plan --vram 1G --curve nowhere/curve.png", 3),
        ("bench --arch res21", 2),
        ("bench --out there/file/results", 3),
        ("resume nowhere", 2),
        ("fork nowhere --at 1 --set optim.lr=1", 2),
        ("verify nowhere", 2),
        ("reproduce --data folder:nowhere --out job", 3),
        ("reproduce --card gtx9999 --out job", 2),
    ],
)
def test_what_is_cheap_to_refuse_does_not_wait_for_torch(arguments: str, code: int, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit(77)", encoding="utf-8")  # who imports it leaves with this
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    path = os.pathsep.join([str(tmp_path), *sys.path])
    done = subprocess.run(
        [sys.executable, "-m", "lowmem", *arguments.split()],
        env={**environment(), "PYTHONPATH": path}, cwd=tmp_path, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_an_existing_run_is_refused_before_anything_is_read(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/res20").mkdir(parents=True)
    (tmp_path / "runs/res20/config.yaml").write_text("seed: 0\n")
    code, err = _leave(capsys, ["train", "--data", "folder:/no/such/place"])
    assert code == 2
    for way_out in ("lowmem resume", "lowmem fork", "--out"):
        assert way_out in err


def test_an_unwritable_folder(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    # A file where a folder should be refuses everybody; permissions do not refuse root.
    code, err = _leave(capsys, ["train", *SMALL, "--out", str(blocker / "run")])
    assert code == 3
    assert "--out" in err


def test_a_resume_may_change_operational_settings_only(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    limits = ["--set", "train.max_steps=1", "--set", "data.test_subset=50"]
    assert _leave(capsys, ["train", *SMALL, *limits, "--out", str(out)]) == (0, "")
    code, err = _leave(capsys, ["resume", str(out), "--set", "optim.lr=0.2"])
    assert code == 2
    assert "lowmem fork" in err
    code, err = _leave(capsys, ["resume", str(out), "--set", "optim.momentun=0.2"])
    assert (code, "did you mean" in err) == (2, True)
    assert _leave(capsys, ["resume", str(out), "--set", "train.max_steps=null", "--set", "checkpoint.keep=3"])[0] == 0
    assert len((out / "metrics.csv").read_text().splitlines()) == 2


def test_a_batch_of_more_pictures_than_there_are_is_questioned(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    few = [*FEW, "--set", "data.test_subset=50", "--dry-run", "--out", str(tmp_path / "run")]
    code, err = _leave(capsys, ["train", *few, "--batch", "100000"])
    assert (code, "batch 100,000 is more than the 100 training pictures" in err) == (0, True), err
    assert "--batch 100 or less" in err
    assert _leave(capsys, ["train", *few, "--batch", "100"]) == (0, "")


def test_a_setting_edited_in_config_yaml_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert _leave(capsys, ["train", *SMALL, "--set", "train.max_steps=1", "--out", str(out)])[0] == 0
    config = out / "config.yaml"
    config.write_text(config.read_text().replace("train_subset: 100", "train_subset: 90"))
    code, err = _leave(capsys, ["resume", str(out)])
    assert code == 2
    assert "data.train_subset is 90 there and was 100" in err
    assert f"`lowmem fork {out} --at last --set data.train_subset=90`" in err
    with pytest.raises(SystemExit):
        main(["verify", str(out)])
    said = capsys.readouterr().out
    assert "data.train_subset 90 (was 100)" in said
    assert [line.split()[0] for line in said.splitlines() if "checkpoints/" in line] == ["ok", "ok"]


def test_no_arguments_shows_the_help(lowmem_command: Callable[..., object]) -> None:
    done = lowmem_command()
    assert "train" in done.stdout + done.stderr  # type: ignore[attr-defined]
    assert "lowmem: (" not in done.stderr  # type: ignore[attr-defined]
    assert "Traceback" not in done.stderr  # type: ignore[attr-defined]


@pytest.mark.parametrize("precision", ["fp32", "auto"])
def test_settings_that_corrupt_memory_are_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, precision: str
) -> None:
    asked = [*SMALL, "--memory-format", "channels-last", "--precision", precision]
    code, err = _leave(capsys, ["train", *asked, "--out", str(tmp_path / "run")])
    assert (code, "--memory-format contiguous" in err) == (3, True)
    assert not (tmp_path / "run").exists()
