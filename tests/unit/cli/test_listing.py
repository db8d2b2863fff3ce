"""What can be discovered: settings, cards, the cache, and what a shell offers; none of it needs torch."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lowmem.calibrate.calibrator import Calibration
from lowmem.calibrate.device import cpu_identity
from lowmem.cli.main import main
from lowmem.config.catalogue import catalogue
from lowmem.config.schema import Config, flatten, known_keys
from lowmem.config.sections import DataConfig
from lowmem.config.settings import validate
from lowmem.core.errors import UsageError
from lowmem.core.reading import profile_names, user_cache_folder
from lowmem.data import load
from lowmem.lifecycle.fork import check


def _said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as leaving:
        main(list(arguments))
    said = capsys.readouterr()
    assert (leaving.value.code, said.err) == (0, "")
    return said.out


def test_every_setting_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert tuple(catalogue()) == known_keys()
    assert [name for name, setting in catalogue().items() if not setting.meaning] == []
    out = _said(capsys, "settings")
    assert all(f"{name} = " in out for name in known_keys())
    listed = json.loads(_said(capsys, "settings", "--json"))
    assert {one["name"]: one["default"] for one in listed} == flatten(Config())
    by_name = {one["name"]: one for one in listed}
    assert by_name["optim.lr"] | {"meaning": ""} == {
        "name": "optim.lr", "default": 0.1, "kind": "a number > 0", "choices": [], "meaning": "", "on_resume": False,
        "on_fork": True, "flag": "--lr",
    }  # fmt: skip
    assert by_name["train.on_nan"]["choices"] == ["rollback", "stop"]


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("optim.*", {name for name in known_keys() if name.startswith("optim.")}),
        ("TF32", {"train.tf32"}),
        ("mixed precision", {"train.precision"}),  # in its meaning
        ("learning_rate", {"optim.lr"}),  # what others call it
        ("momentun", {"optim.momentum"}),
    ],
)
def test_settings_are_found(pattern: str, names: set[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert {one["name"] for one in json.loads(_said(capsys, "settings", pattern, "--json"))} == names


def test_a_pattern_that_finds_nothing_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["settings", "nonsense"])
    assert "`lowmem settings` lists them all" in capsys.readouterr().err


_OTHER_VALUE: dict[str, object] = {
    "recipe": "other.yaml", "model.arch": "res56", "data.source": "shapes", "data.root": "there", "data.cache": "there",
    "memory.card": "gtx970", "model.spec": "torchvision:resnet18", "model.args": {"depth": 3},
    "model.sha256": {"net.py": "0"}, "data.channels": 1, "data.cutout": 8, "train.init": "there.safetensors",
    "train.init_sha256": "0", "train.freeze": ["layer1*"],
}  # fmt: skip
_ADAMW = {"optim": {"kind": "adamw"}}
_BEFORE: dict[str, dict[str, object]] = {
    "model.block": {"model": {"arch": "res56"}}, "model.args": {"model": {"spec": "torchvision:resnet18"}},
    "optim.betas": _ADAMW, "optim.eps": _ADAMW, "schedule.final_share": {"schedule": {"kind": "cosine"}},
}  # fmt: skip


@pytest.mark.parametrize("name", known_keys())
def test_what_a_fork_may_change_is_what_the_list_says(name: str) -> None:
    setting, before = catalogue()[name], Config.model_validate(_BEFORE.get(name, {}))
    value = _OTHER_VALUE.get(name)
    if value is None and setting.choices:
        value = next(one for one in setting.choices if one != flatten(before)[name])
    elif value is None:
        numbers = [
            (not setting.default if isinstance(setting.default, bool) else None),
            100,
            0.5,
            1 << 30,
            [1.0, 2.0],
            [0.5, 0.6],
        ]
        for value in (one for one in numbers if one is not None):
            try:
                validate({**flatten(before), name: value}, {})
            except UsageError:
                continue
            break
    flat = {**flatten(before), name: value}
    after = validate(flat if name != "model.arch" else {name: value}, {})
    if setting.on_fork:
        assert list(check(before, after)) == [name]
    else:
        with pytest.raises(UsageError, match=f"{name} .*fork"):
            check(before, after)


def test_all_cards_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    lines = _said(capsys, "cards").splitlines()
    assert sorted(line.split()[0] for line in lines[1:]) == sorted(profile_names("cards"))
    listed = {one["profile"]: one for one in json.loads(_said(capsys, "cards", "--json"))}
    assert set(listed) == set(profile_names("cards"))
    card = listed["gtx1060-6g"]
    assert (card["name"], card["memory_bytes"], card["capability"]) == ("GTX 1060 6G", 6 << 30, "6.1")


@pytest.mark.parametrize("command", ["settings", "cards", "cache"])
def test_it_is_readable_on_a_phone(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lowmem.cli.listing.user_cache_folder", lambda: Path("c/lowmem"))
    (tmp_path / "c/lowmem/folder-0123456789abcdef").mkdir(parents=True)
    (tmp_path / "c/lowmem/mine.txt").write_text("hello")
    wide = _said(capsys, command)
    monkeypatch.setenv("COLUMNS", "40")
    narrow = _said(capsys, command)
    assert max(map(len, wide.splitlines())) > 60
    assert max(map(len, narrow.splitlines())) <= 40
    if command == "settings":
        assert narrow.split() == wide.split()


def test_the_cache_and_what_becomes_of_it(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever lowmem keeps there is of a kind that the command knows and clears; the rest stays."""
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA", "HOME"):
        monkeypatch.setenv(name, str(tmp_path / "cache"))
    empty = json.loads(_said(capsys, "cache", "--json"))
    assert (empty["folder"], empty["size_bytes"]) == (str(user_cache_folder()), 0)
    assert not user_cache_folder().exists()
    for part in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / "pictures" / part / name).mkdir(parents=True)
            pixels = np.zeros((8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pictures" / part / name / "1.png")
    load(DataConfig(source=f"folder:{tmp_path / 'pictures'}"), 0)
    calibration = Calibration(cpu_identity(), user_cache_folder() / "calibration")
    calibration.put("bytes", ("context",), 5)
    calibration.save()
    (user_cache_folder() / "mine.txt").write_text("hello")
    found = json.loads(_said(capsys, "cache", "--json"))
    files = [path for path in user_cache_folder().rglob("*") if path.is_file()]
    assert found["size_bytes"] == sum(path.stat().st_size for path in files)
    assert [one["entries"] for one in found["kinds"]] == [1, 1, 1]
    assert found["kinds"][2]["size_bytes"] == 5
    cleared = json.loads(_said(capsys, "cache", "--clear", "--json"))
    assert (cleared["removed_bytes"], cleared["size_bytes"]) == (found["size_bytes"] - 5, 5)
    assert [path.name for path in user_cache_folder().rglob("*") if path.is_file()] == ["mine.txt"]
    assert "other things" in _said(capsys, "cache")


def test_a_link_in_the_cache_is_not_followed(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/picture.png").write_text("mine")
    user_cache_folder().mkdir(parents=True)
    try:
        (user_cache_folder() / "folder-0123456789abcdef").symlink_to(tmp_path / "mine", target_is_directory=True)
    except OSError:
        pytest.skip("no links here")
    _said(capsys, "cache", "--clear")
    assert (tmp_path / "mine/picture.png").read_text() == "mine"
    assert list(user_cache_folder().iterdir()) == []


@pytest.mark.parametrize("arguments", [["settings", "--json"], ["cards"], ["cache"], ["--show-completion"]])
def test_none_of_it_imports_torch(arguments: list[str]) -> None:
    probe = (
        "import sys\nfrom lowmem.cli.main import main\n"
        f"try:\n    main({arguments!r})\nexcept SystemExit:\n    pass\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", probe], timeout=60, check=True, capture_output=True)


def _offered(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, typed: str) -> list[str]:
    monkeypatch.setenv("COMP_WORDS", typed)
    monkeypatch.setenv("COMP_CWORD", str(typed.count(" ")))
    monkeypatch.setenv("_LOWMEM_COMPLETE", "complete_bash")
    return _said(capsys).split()


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("lowmem se", ["settings"]),
        ("lowmem train --arch res1", ["res101", "res110"]),
        ("lowmem plan --card gtx1060", ["gtx1060-3g", "gtx1060-6g"]),
        ("lowmem train --precision ", ["auto", "fp32", "amp", "bf16"]),
        ("lowmem train --set optim.m", ["optim.momentum="]),
        (
            "lowmem train --data ",
            ["cifar10", "cifar100", "fashion-mnist", "shapes", "oldrun", "pictures", "runs", "list.csv"],
        ),
        ("lowmem train --data csv:l", ["csv:list.csv"]),
        ("lowmem train --data folder:l", []),
        ("lowmem train --data folder:pi", ["folder:pictures"]),
        ("lowmem resume ", [os.path.join("runs", "mine"), "oldrun"]),
        ("lowmem resume ol", ["oldrun"]),
        ("lowmem report ru", [os.path.join("runs", "mine")]),
    ],
)
def test_what_a_shell_offers(
    typed: str,
    offered: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("pictures", "oldrun", "runs/mine", "runs/no-run"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "list.csv").write_text("")
    for name in ("oldrun", "runs/mine"):
        (tmp_path / name / "config.yaml").write_text("")
    assert _offered(capsys, monkeypatch, typed) == offered


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
def test_the_script_for_a_shell_is_one() -> None:
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m lowmem --show-completion; true"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stderr == ""
    assert subprocess.run(["bash", "-n"], input=done.stdout, text=True, timeout=60).returncode == 0
    assert "_LOWMEM_COMPLETE" in done.stdout
