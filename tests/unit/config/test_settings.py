"""Precedence, refusal with the nearest name, and the recorded config.yaml."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from lowmem.config.optimization import OptimConfig
from lowmem.config.schema import OPERATIONAL, Config, ModelConfig, flatten, known_keys, nest
from lowmem.config.settings import from_yaml, gather, parse_set, refuse_changes, to_yaml
from lowmem.core.errors import UsageError
from lowmem.train.schedule import learning_rate


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
    assert set(yaml.safe_load(path.read_text())["optim"]) == set(OptimConfig.model_fields)
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
        (["train.batch=many"], "it takes a whole number > 0"),
        (["nonsense=1"], "unknown setting 'nonsense'.*: `lowmem settings` lists them"),
        (["optim.mom=1"], "did you mean 'optim.momentum'"),
        (["learning-rate=1"], "did you mean 'optim.lr'"),
        (["tensorbord=true"], "did you mean 'train.tensorboard'"),
        # YAML's booleans, where something else is to be chosen or counted.
        (["schedule.low_start=false"], "low_start = false .*: it takes auto, always or never"),
        (["train.on_stuck=off"], "it takes warn or stop"),
        (["data.train_subset=yes"], "it takes a whole number > 0, or null"),
        (["train.precision=fp64"], "it takes auto, fp32, amp or bf16"),
        (["optim.betas=0.9"], r"it takes numbers like \[0.9, 0.999\]"),
        (["optim.kind=adamw", "optim.nesterov=true"], "nesterov is SGD's, .* it takes --set optim.nesterov=false"),
        (["optim.eps=1e-6"], "eps is AdamW's, and kind is sgd: it takes --set optim.eps=1e-08"),
        (["data.download=maybe"], "it takes true or false"),
        (["data.cutout=32"], "cutout 32 covers pictures of image_size 32: lower it"),
        (["data.random_erasing=2"], "random_erasing = 2 .*: it takes a number >= 0 and <= 1"),
        (["data.mixup=-1"], "mixup = -1 .*: it takes a number >= 0 and <= 100"),
        (["train.label_smoothing=1"], "label_smoothing = 1 .*: it takes a number >= 0 and < 1"),
        (["memory.vram=on"], "it takes a size like 6G"),
        (["memory.host=12X"], "memory.host = .12X. .*: it takes off or auto, or a size like 6G"),
        (["memory.link=-1"], "memory.link = -1 .*: it takes auto, or a number"),
        (["optim.lr=.nan"], "optim.lr"),
        (["schedule.milestones=[122, 81]"], "rising order"),
        (["train.micro_batch=200"], "larger than batch 128"),
        (["data.source=imagenet"], "no data source"),
        (["model.arch=res21"], "choose one of res20"),
        (["model.arch=[1]"], "no architecture name"),
        (["checkpoint.keep=1"], "a whole number >= 2"),
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


def test_the_modern_recipe_at_any_length() -> None:
    config = gather(recipe="modern").config
    assert (config.train.epochs, config.schedule.kind, config.optim.decay_norms) == (60, "one-cycle", False)
    short = gather(recipe="modern", flags={"train.epochs": 3}).config
    for length in (config, short):
        steps = length.train.epochs * 100
        rates = [learning_rate(length, 100, step, low_start=False) for step in range(steps)]
        assert rates.index(max(rates)) == 0.3 * steps - 1
        assert (rates[0], max(rates), rates[-1]) == pytest.approx((0.008, 0.2, 0))


def test_a_users_own_recipe(tmp_path: Path) -> None:
    file = tmp_path / "fast.yaml"
    file.write_text("description: mine\ntrain: {epochs: 3}\n")
    assert gather(recipe=str(file)).config.train.epochs == 3
    with pytest.raises(UsageError, match="use one of modern, report"):
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
    # What is text is text, whatever YAML makes of it.
    assert parse_set("data.root=2024") == ("data.root", "2024")
    assert parse_set("data.root=on") == ("data.root", "on")
    assert parse_set("data.root='a b'") == ("data.root", "a b")


@pytest.mark.parametrize(
    ("given", "canonical"),
    [("RES20", "res20"), ("resnet20", "res20"), ("ResNet-110", "res110"), ("cnn_56", "cnn56"), ("plain-20", "cnn20")],
)
def test_a_network_by_its_other_names(given: str, canonical: str) -> None:
    settings = gather(flags={"model.arch": given})
    assert settings.config.model == ModelConfig(arch=canonical)
    assert f"arch: {canonical}  # flag" in to_yaml(settings)
    assert settings.replace({"model.arch": "res56"}, "test").config.model.arch == "res56"


@pytest.mark.parametrize(
    ("given", "canonical"),
    [
        ("CIFAR10", "cifar10"),
        ("cifar-10", "cifar10"),
        ("fashion_mnist", "fashion-mnist"),
        ("FashionMNIST", "fashion-mnist"),
        ("Shapes", "shapes"),
        ("pictures", "folder:pictures"),
        ("./shapes", "folder:./shapes"),
        ("folder:nowhere", "folder:nowhere"),  # whether it is there is for the data to say
    ],
)
def test_data_by_its_other_names(given: str, canonical: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("pictures", "shapes"):
        (tmp_path / name).mkdir()
    settings = gather(flags={"data.source": given})
    assert settings.config.data.source == canonical
    assert f"source: {canonical}  # flag" in to_yaml(settings)


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


@pytest.mark.parametrize("key", ["memory.vram", "memory.tensors"])
def test_a_forgotten_unit_is_asked_for_wherever_it_is_written(key: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(f"{key}: 6\n")
    for given in ({"flags": {key: "6"}}, {"sets": [f"{key}=6"]}, {"config_file": file}):
        with pytest.raises(UsageError, match="did you mean 6G"):
            gather(**given)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="did you mean 6G"):
        gather().replace({key: "6"}, "resume")
    with pytest.raises(ValueError, match="did you mean 6G"):
        Config.model_validate(nest({key: 6}))


def test_there_is_one_budget(tmp_path: Path) -> None:
    for given in (["memory.vram=6G", "memory.tensors=2G"], ["memory.tensors=2G"]):
        with pytest.raises(UsageError, match=r"--vram is the whole card's memory, --tensors .* give one"):
            gather(flags={"memory.vram": "6G"}, sets=given)
    file = tmp_path / "mine.yaml"
    file.write_text(to_yaml(gather(flags={"memory.tensors": "2G"})))
    settings = gather(config_file=file, flags={"memory.vram": "6G"})  # what is typed is above what is in a file
    assert (settings.config.memory.vram, settings.config.memory.tensors) == (6 << 30, None)
    settings = settings.replace({"memory.tensors": "3G"}, "resume")
    assert (settings.config.memory.vram, settings.config.memory.tensors) == (None, 3 << 30)
    assert gather(config_file=file).config.memory.tensors == 2 << 30
    with pytest.raises(UsageError, match="give one"):
        settings.replace({"memory.vram": "6G", "memory.tensors": "3G"}, "resume")


@pytest.mark.parametrize(
    ("device", "card", "of_tensors"), [("cpu", None, True), ("cpu", "gtx1060-6g", False), ("cuda", None, False)]
)
def test_what_an_older_run_meant_by_its_memory(tmp_path: Path, device: str, card: str | None, of_tensors: bool) -> None:
    """Before there was `memory.tensors`, `memory.vram` was that on the CPU without a card."""
    flags = {"train.device": device, "memory.card": card, "memory.vram": "2700M"}
    text = to_yaml(gather(flags=flags)).replace("  tensors: null  # default\n", "")
    assert "tensors" not in text
    (tmp_path / "config.yaml").write_text(text)
    (tmp_path / "headless.yaml").write_text(text.partition("\n")[2])  # a run's all the same
    for memory in (
        from_yaml(tmp_path / "headless.yaml").config.memory,
        from_yaml(tmp_path / "config.yaml").config.memory,
        gather(config_file=tmp_path / "config.yaml").config.memory,
    ):
        assert (memory.tensors if of_tensors else memory.vram) == 2700 << 20
        assert (memory.vram if of_tensors else memory.tensors) is None
