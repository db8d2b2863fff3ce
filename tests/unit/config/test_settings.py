"""Precedence, refusal with the nearest name, and the recorded config.yaml."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from lowmem.config.schema import OPERATIONAL, Config, flatten, known_keys
from lowmem.config.settings import from_yaml, gather, parse_set, refuse_changes, to_yaml
from lowmem.core.errors import UsageError


def test_precedence(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("optim: {lr: 0.2, momentum: 0.8}\ntrain: {epochs: 7, batch: 64}\n")
    settings = gather(config_file=file, flags={"train.epochs": 5, "train.batch": 32}, sets=["train.batch=16"])
    config = settings.config
    assert (config.train.batch, config.train.epochs, config.optim.lr, config.optim.momentum) == (16, 5, 0.2, 0.8)
    assert config.optim.weight_decay == 1e-4
    sources = settings.sources
    assert [sources[key] for key in ("train.batch", "train.epochs", "optim.lr", "optim.weight_decay", "seed")] == [
        "--set", "flag", str(file), "recipe report", "default"
    ]  # fmt: skip


def test_the_recipe_is_the_reports() -> None:
    config = gather().config
    assert (config.optim.lr, config.optim.momentum, config.optim.weight_decay) == (0.1, 0.9, 1e-4)
    assert (config.train.batch, config.train.epochs, config.schedule.milestones) == (128, 164, (81, 122))


def test_every_setting_is_recorded_and_read_back(tmp_path: Path) -> None:
    settings = gather(flags={"model.arch": "res110", "model.block": "bottleneck"}, sets=["optim.weight_decay=1e-5"])
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(settings))
    assert from_yaml(path) == settings
    path.write_bytes(to_yaml(settings).replace("\n", "\r\n").encode())  # as an editor on Windows saves it
    assert from_yaml(path) == settings
    assert set(yaml.safe_load(path.read_text())["optim"]) == {"lr", "momentum", "weight_decay", "nesterov"}
    assert "arch: res110  # flag" in path.read_text()
    assert "weight_decay: 1.0e-05  # --set" in path.read_text()
    # The recorded file is a --config file too.
    assert gather(config_file=path).config == settings.config


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["optim.learning_rate=1"], "did you mean 'optim.lr'"),
        (["optim.momentun=0.9"], "did you mean 'optim.momentum'"),
        (["epochs=3"], "did you mean 'train.epochs'"),
        (["foo"], "dotted.key=value"),
        (["optim.lr=-1"], r"optim.lr = -1 \(from --set\)"),
        (["train.batch=-5"], "train.batch = -5"),
        (["train.batch=many"], "valid integer"),
        (["optim.lr=.nan"], "optim.lr"),
        (["schedule.milestones=[122, 81]"], "rising order"),
        (["train.micro_batch=200"], "larger than batch 128"),
        (["data.source=imagenet"], "no data source"),
        (["model.arch=res21"], "choose one of res20"),
        (["model.arch=[1]"], "no architecture name"),
        (["checkpoint.keep=1"], "greater than or equal to 2"),
        (["optim.lr={a: ["], "quote it"),
    ],
)
def test_refusals_are_one_clear_line(sets: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        gather(sets=sets)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [("optim: {mom: 3}", "did you mean 'optim.momentum'"), ("optim: [", "line"), ("- 1", "no settings")],
)
def test_bad_files(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(UsageError, match=message):
        gather(config_file=file)
    with pytest.raises(UsageError, match="does not exist"):
        gather(config_file=tmp_path / "none.yaml")


def test_a_users_own_recipe(tmp_path: Path) -> None:
    file = tmp_path / "fast.yaml"
    file.write_text("description: mine\ntrain: {epochs: 3}\n")
    assert gather(recipe=str(file)).config.train.epochs == 3
    with pytest.raises(UsageError, match="use one of report"):
        gather(recipe="rapport")


def test_another_architecture_takes_its_own_block(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: {arch: res50, block: bottleneck}\n")
    assert gather(config_file=file, flags={"model.arch": "res20"}).config.model.block == "basic"
    assert gather(config_file=file).config.model.block == "bottleneck"


def test_parse_set_reads_yaml() -> None:
    assert parse_set("schedule.milestones=[1, 2]") == ("schedule.milestones", [1, 2])
    assert parse_set("data.source=folder:a=b") == ("data.source", "folder:a=b")
    assert parse_set("data.cache=null") == ("data.cache", None)


def test_only_operational_settings_may_differ_on_resume() -> None:
    assert set(known_keys()) >= OPERATIONAL
    recorded = gather().config
    refuse_changes(recorded, gather(sets=["checkpoint.keep=5", "train.device=cpu"]).config, "runs/x")
    with pytest.raises(UsageError, match=r"lowmem fork runs/x --at last --set optim.lr=0.2"):
        refuse_changes(recorded, gather(sets=["optim.lr=0.2"]).config, "runs/x")


def test_config_is_frozen_and_flat_names_are_dotted() -> None:
    config = Config()
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3  # type: ignore[misc]
    assert all(key == "recipe" or key == "seed" or key.count(".") == 1 for key in flatten(config))


def test_a_value_that_is_a_blank_survives(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    settings = gather(flags={"data.cache": "\xa0"})
    path.write_text(to_yaml(settings), encoding="utf-8")
    assert from_yaml(path).config.data.cache == "\xa0"
