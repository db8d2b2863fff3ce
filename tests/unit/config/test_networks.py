"""How settings name networks that are not of the family, and that only one network is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from lowmem.cli.flags import Given
from lowmem.config.networks import canonical_spec, describe, file_of, parse_args, short_name, split_spec
from lowmem.config.schema import Config, ModelConfig, flatten
from lowmem.config.settings import UNUSED, Settings, from_yaml, gather, to_yaml
from lowmem.core.errors import UsageError
from lowmem.train.replica import config_hash

SPEC = "torchvision:resnet50"


@pytest.mark.parametrize(
    ("spec", "parts", "name"),
    [
        (SPEC, ("torchvision", "resnet50"), "resnet50"),
        ("timm:convnext_tiny.in12k", ("timm", "convnext_tiny.in12k"), "convnext_tiny.in12k"),
        ("my_net.py:Net", ("my_net.py", "Net"), "my_net-Net"),
        ("C:/nets/my_net.py:Net", ("C:/nets/my_net.py", "Net"), "my_net-Net"),
        ("torchvision:odd.py:Net", ("torchvision:odd.py", "Net"), "torchvision:odd-Net"),
    ],
)
def test_the_forms_of_a_name(spec: str, parts: tuple[str, str], name: str) -> None:
    assert split_spec(spec) == parts
    assert short_name(spec) == name


@pytest.mark.parametrize("spec", ["", "resnet50", "my_net.py", ":", "torchvision:", "torchvision:../x", "net:Net",
                                  "my_net.py:", "my_net.py:a b", "hub:user/net", "timm:hf-hub:a/b"])  # fmt: skip
def test_what_names_no_network(spec: str) -> None:
    with pytest.raises(UsageError, match=r"names no network: write torchvision:NAME, timm:NAME or FILE\.py:NAME"):
        gather(flags={"model.spec": spec})


def test_a_path_is_made_absolute_and_told_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert canonical_spec("nets/my_net.py:Net") == f"{tmp_path}/nets/my_net.py:Net"
    assert canonical_spec(SPEC) == SPEC
    assert file_of(f"{tmp_path}/my_net.py:Net") == tmp_path / "my_net.py"
    assert file_of(SPEC) is file_of(None) is None
    assert describe(f"{tmp_path}/my_net.py:Net", {"act": "relu", "depth": 3}) == "my_net.py:Net (act='relu', depth=3)"


def test_arguments_are_literals_or_text() -> None:
    texts = [
        "depth=3",
        "act=relu",
        "rate=1e-3",
        "on=True",
        "none=None",
        "sizes=(1, 2)",
        "table={'a': [1]}",
        "e=",
        "q='3'",
    ]
    assert parse_args(texts) == {
        "depth": 3, "act": "relu", "rate": 1e-3, "on": True, "none": None, "sizes": [1, 2], "table": {"a": [1]},
        "e": "", "q": "3",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("depth", "not of the form name=value"),
        ("a-b=3", "not of the form name=value"),
        ("num_classes=3", "num_classes follows the data"),
        ("weights=DEFAULT", "weights would load weights"),
        ("pretrained=True", "pretrained would load weights"),
        ("x={1, 2}", "cannot be recorded"),
        ("x=1e999", "cannot be recorded"),
    ],
)
def test_arguments_that_cannot_be(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        parse_args([text])
    with pytest.raises(UsageError, match="gives depth twice"):
        parse_args(["depth=1", "depth=2"])


def test_the_flags_give_the_settings() -> None:
    given = Given.of("train", {"model": SPEC, "model_args": ["zero_init_residual=True"], "arch": None})
    model = given.settings().config.model
    assert (model.spec, model.args, model.name) == (SPEC, {"zero_init_residual": True}, "resnet50")
    assert (model.words, model.depth) == (f"{SPEC} (zero_init_residual=True)", None)
    assert model.given == {"spec": SPEC, "args": {"zero_init_residual": True}, "sha256": {}}


@pytest.mark.parametrize(("key", "value"), [("arch", "res20"), ("block", "basic"), ("width", 8)])
def test_two_networks_are_refused(key: str, value: object) -> None:
    with pytest.raises(
        UsageError, match=rf"--model names a network of its own, and --{key} is for those of the family"
    ):
        gather(flags={"model.spec": SPEC, f"model.{key}": value})
    with pytest.raises(UsageError, match="give one of them"):
        gather(flags={"model.spec": SPEC}, sets=[f"model.{key}={value}"])
    with pytest.raises(UsageError, match=r"arguments are for a network that is named by model\.spec"):
        gather(flags={"model.args": {"depth": 3}, f"model.{key}": value})


def test_the_network_that_is_typed_takes_the_place_of_a_files(tmp_path: Path) -> None:
    family, other = tmp_path / "family.yaml", tmp_path / "other.yaml"
    family.write_text("model:\n  arch: res56\n  block: bottleneck\n  width: 8\n")
    other.write_text(f"model:\n  spec: {SPEC}\n  args: {{zero_init_residual: true}}\n  sha256: {{a.py: '0'}}\n")
    settings = gather(config_file=family, flags={"model.spec": SPEC})
    assert settings.config.model == ModelConfig(spec=SPEC)
    assert settings.sources["model.arch"] == UNUSED
    assert gather(config_file=other, flags={"model.arch": "res34"}).config.model == ModelConfig(arch="res34")
    replaced = gather(config_file=other, flags={"model.spec": "torchvision:resnet18"}).config.model
    assert replaced == ModelConfig(spec="torchvision:resnet18")
    kept = gather(config_file=other, flags={"model.args": {"groups": 2}}).config.model
    assert (kept.spec, kept.args, kept.sha256) == (SPEC, {"groups": 2}, {"a.py": "0"})


def test_a_run_records_it_and_reads_it_back(tmp_path: Path) -> None:
    args = {"act": "a: b # c", "sizes": [1, 2.5, None], "deep": {"x": {"y": True}}}
    settings = gather(flags={"model.spec": "my_net.py:Net", "model.args": args})
    settings = settings.replace({"model.sha256": {"my_net.py": "ab", "blocks/conv.py": "cd"}}, "as it was")
    (tmp_path / "config.yaml").write_text(to_yaml(settings))
    back = from_yaml(tmp_path / "config.yaml")
    assert back.config == settings.config
    assert back.sources["model.sha256"] == "as it was"
    assert gather(config_file=tmp_path / "config.yaml").config == settings.config


def test_what_the_network_is_decides_what_a_checkpoint_belongs_to() -> None:
    def hashed(**model: object) -> str:
        return config_hash(Config.model_validate({"model": model}))

    different = [
        hashed(), hashed(spec=SPEC), hashed(spec=SPEC, args={"groups": 2}), hashed(spec="/my_net.py:Net"),
        hashed(spec="/my_net.py:Net", sha256={"my_net.py": "0"}),
    ]  # fmt: skip
    assert len(set(different)) == len(different)


def test_runs_of_the_family_are_what_they_were() -> None:
    """Before there were other networks a run recorded none of this, and its checkpoints go on."""
    before = {key: value for key, value in flatten(Config()).items() if key not in ("model.spec", "model.args")}
    assert Settings(Config(), {}).replace(before, "run").config == Config()
    assert config_hash(Config()) == "118ee65948c2e8a7316b517e061475b5eef931ee027eba128eab4fa7434a371a"
