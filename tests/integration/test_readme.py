"""Every block and command of the README does what it says: Python is executed as it stands, a command is parsed by the
real command line (slow: run, with small settings). One of a kind that is not known here fails."""

from __future__ import annotations

import re
import shlex
import subprocess
import tomllib
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from markdown_it import MarkdownIt
from packaging.requirements import Requirement
from PIL import Image
from torch.distributed.run import get_args_parser
from typer.main import get_command

import lowmem
from lowmem.cli import main
from lowmem.cli.flags import FLAGS, Given
from lowmem.config.cards import load_card
from lowmem.config.processes import cards_of
from lowmem.config.schema import Config, known_keys
from lowmem.config.settings import gather, parse_set
from lowmem.lifecycle import run_training
from tests.tiny import tiny

ROOT = Path(__file__).parents[2]
TOKENS = MarkdownIt().enable("table").parse((ROOT / "README.md").read_text(encoding="utf-8"))
FENCES = [(token.info.strip(), token.content) for token in TOKENS if token.type == "fence"]
SPANS = [inner.content for token in TOKENS for inner in token.children or () if inner.type == "code_inline"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
COMMANDS: dict[str, Any] = get_command(main.app).commands  # type: ignore[attr-defined]

PYTHON = [text for info, text in FENCES if info == "python"]
SHELL = [line for info, text in FENCES if info == "" for line in text.splitlines()]
PROGRAMS = ("lowmem", "python", "python3", "pip", "torchrun")
# What stands for something, as one would write it.
PLACEHOLDERS = {
    "RUN": "runs/res110",
    "RUN…": "runs/res110",
    "PICTURE…": "pictures",
    "FILE": "network.onnx",
    "EPOCH": "3",
    "N": "3",
    "HOST": "localhost",
    "[PATTERN]": "lr",
}


MY_NET = """
from torch import nn

class Net(nn.Sequential):
    def __init__(self, num_classes, width=8, act="relu"):
        acts = {"relu": nn.ReLU(), "silu": nn.SiLU()}
        super().__init__(nn.Conv2d(3, width, 3), acts[act], nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.append(nn.Linear(width, num_classes))
"""


@pytest.fixture(autouse=True)
def somewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with the reader's `pictures`, two classes, some of each, and network."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for part, name, number in product(("train", "test"), ("cats", "dogs"), range(16)):
        folder = tmp_path / "pictures" / part / name
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    (tmp_path / "my_net.py").write_text(MY_NET)
    return tmp_path


def _words(line: str) -> list[str]:
    """As a shell splits it, placeholders filled in."""
    words = shlex.split(line, comments=True)
    while "…" in words:
        at = words.index("…")
        words[at : at + 1] = ["optim.lr=0.01"] if words[at - 1] == "--set" else []
    if "|" in words:  # what reads its output
        words = words[: words.index("|")]
    return [PLACEHOLDERS.get(word, word) for word in words]


def _commands(line: str) -> Iterator[list[str]]:
    for part in line.split(" && "):
        if words := _words(part):
            yield [words[0].removeprefix(".venv/bin/"), *words[1:]]


def check(words: list[str]) -> None:
    """Fails for a command that could not be run as it stands, and for one of a kind that is not known."""
    kinds: dict[str, Callable[[list[str]], None]] = {
        "lowmem": _check_lowmem,
        "pip": _check_pip,
        "python": _check_python,
        "python3": _check_python,
        "torchrun": _check_torchrun,
    }
    if words != ["^C"]:
        assert words[0] in kinds, f"no test knows how to treat `{shlex.join(words)}`: teach {Path(__file__).name}"
        kinds[words[0]](words[1:])


def _check_lowmem(words: list[str]) -> None:
    """The flags are there, the settings validate, cards are known."""
    if words in (["--install-completion"], []):
        assert {"--install-completion"} <= _flags(get_command(main.app))
        return
    name, rest = words[0], words[1:]
    assert name in COMMANDS
    if not rest:  # in a sentence: the command as such
        return
    given = Given.of(name, COMMANDS[name].make_context(name, list(rest)).params)
    if name in ("resume", "fork", "evaluate", "predict", "export"):
        gather(flags=given.changes())
    elif name == "bench":
        gather(flags={**given.flags, "train.batch": None})
    else:
        for card in cards_of(given.settings().config):
            load_card(card)


def _check_pip(words: list[str]) -> None:
    assert words[0] == "install"
    options = {
        "-e": lambda path: path.partition("[")[0] == ".",
        "-r": lambda path: (ROOT / path).is_file(),
        "--extra-index-url": lambda url: re.fullmatch(r"https://download\.pytorch\.org/whl/(cpu|cu\d+)", url),
    }
    what = iter(words[1:])
    for word in what:
        if word in options:
            word = next(what)
            assert options[words[words.index(word) - 1]](word)
            word = f"lowmem{word.removeprefix('.')}" if word.startswith(".") else ""
        if word:
            wanted = Requirement(word)
            assert wanted.extras <= set(PROJECT["optional-dependencies"])
            ours = {one.name: one for one in map(Requirement, PROJECT["dependencies"])} | {
                "lowmem": Requirement("lowmem")
            }
            for pinned in wanted.specifier:
                assert pinned.version in ours[wanted.name].specifier, f"{word} is not what {PROJECT['name']} needs"


def _check_python(words: list[str]) -> None:
    if words[:2] in (["-m", "venv"], ["-m", "pytest"]):
        return
    module = words[1].replace(".", "/") + ".py" if words[0] == "-m" else words[0]
    source = ROOT / module if (ROOT / module).is_file() else (ROOT / module).with_suffix("") / "__main__.py"
    text = source.read_text(encoding="utf-8")
    assert "__main__" in text or source.name == "__main__.py"
    for flag in (word for word in words if word.startswith("--")):
        assert f'"{flag}"' in text, f"{source.name} has no {flag}"


def _check_torchrun(words: list[str]) -> None:
    parsed = get_args_parser().parse_args(words)
    assert (parsed.module, parsed.training_script) == (True, "lowmem")
    _check_lowmem(parsed.training_script_args)


def _flags(command: Any) -> set[str]:
    return {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}


@pytest.mark.parametrize("text", PYTHON)
def test_python_runs_as_it_stands(text: str) -> None:
    if "runs/mine" in text:
        run_training(tiny("train.epochs=1"), "runs/mine")
    exec(compile(text, "README.md", "exec"), {})


def test_there_is_no_block_of_an_unknown_kind() -> None:
    assert PYTHON
    assert {info for info, _ in FENCES} <= {"", "python", "text"}


@pytest.mark.parametrize("line", [line for line in SHELL if _words(line)])
def test_a_command_of_a_block_is_one(line: str) -> None:
    for words in _commands(line):
        check(words)


@pytest.mark.parametrize("span", [span for span in SPANS if span.split(" ")[0] in PROGRAMS])
def test_a_command_in_a_sentence_is_one(span: str) -> None:
    check(_words(span))


@pytest.mark.parametrize("span", [span for span in SPANS if span.startswith("--")])
def test_a_flag_in_a_sentence_is_one(span: str) -> None:
    """Of some command; and what it sets is something that the setting takes."""
    words = _words(span)
    torchruns = {name for action in get_args_parser()._actions for name in action.option_strings}
    known = torchruns.union(*map(_flags, COMMANDS.values()))
    for at, word in enumerate(words):
        flag, _, value = word.partition("=")
        assert not flag.startswith("--") or flag in known
        value = value or next(iter(words[at + 1 : at + 2]), "")
        settings = [one.setting for one in FLAGS if one.name == flag and one.setting and one.kind is not bool]
        for one in value.split("|") if settings and value and not value.startswith("-") else ():
            typed = next(row.kind for row in FLAGS if row.setting == settings[0])(one)
            gather(flags={settings[0]: typed} | ({} if flag == "--model" else {"model.arch": "res56"}))


@pytest.mark.parametrize("span", [span.removeprefix("--set ") for span in SPANS if re.search(r"\w\.\w+(=|$)", span)])
def test_a_setting_in_a_sentence_is_one(span: str) -> None:
    name, _, values = span.partition("=")
    if name.partition(".")[0] not in Config.model_fields:
        return  # a file, a module
    assert name in known_keys()
    for value in values.split("|"):
        if value not in ("", "…"):
            parsed = parse_set(f"{name}={PLACEHOLDERS.get(value, value)}")
            gather(flags=dict([parsed]))


def test_names_of_the_package_are_there() -> None:
    named = {name for text in (*SPANS, *PYTHON) for name in re.findall(r"\blowmem\.(?!\w+\.py)(\w+)", text)}
    assert named <= set(dir(lowmem)), named


def test_what_nobody_knows_how_to_treat_fails() -> None:
    for line in ("conda install lowmem", "lowmem trian", "pip install lowmem[tensors]", "pip install torch==2.6.0",
                 "python benchmarks/none.py", "python benchmarks/kill.py --none", "lowmem train --set optim.lt=3",
                 "torchrun --nproc-per-node=2 -m lowmem train --arch res21", "lowmem plan --card gtx1061"):  # fmt: skip
        with pytest.raises(Exception):  # noqa: B017, PT011
            check(_words(line))


# What makes a command of the README small: after its own flags, of which the last of a name counts.
_NET = ["--arch", "res20", "--block", "basic", "--width", "2"]  # but where a command names one with --model
_FEW = ["--set", "data.train_subset=32", "--set", "data.test_subset=32", "--set", "train.max_steps=4"]
_SMALL = {
    "train": [*_FEW, "--batch", "16", "--vram", "1G", "--epochs", "2", "--val-split", "0"],
    "resume": [],
    "plan": ["--batch", "16"],
    "reproduce": ["--width", "2", "--data", "shapes", "--batch", "32", "--epochs", "1", "--only", "res20", "--dry-run"],
    "report": [],
    "evaluate": [],
    "predict": [],
    "export": [],
    "ls": [],
    "fork": ["--at", "1", "--dry-run"],
    "watch": ["--once"],
}


@pytest.mark.slow
def test_the_commands_of_the_guide_run_one_after_the_other(
    lowmem_command: Callable[..., subprocess.CompletedProcess[str]], somewhere: Path
) -> None:
    """As a reader types them, from the top: what one makes the next one finds. Networks and data are small ones, a run
    that would be there already is tried out only, and what takes a card, minutes or a download was parsed above."""
    ran = []
    for words in (words for line in SHELL if _words(line) for words in _commands(line)):
        if words[0] != "lowmem" or words[1] == "bench" or "--init torchvision" in shlex.join(words):
            continue
        name, rest = words[1], words[2:]
        small = list(_SMALL[name])
        if name in ("train", "plan"):
            small = [*([] if "--model" in rest else _NET), *small]
        if name == "train":
            settings = Given.of(name, COMMANDS[name].make_context(name, list(rest)).params).settings()
            out = Path(rest[rest.index("--out") + 1] if "--out" in rest else f"runs/{settings.config.model.name}")
            small += ["--out", f"{out}-again", "--dry-run"] if (somewhere / out).exists() else ["--out", str(out)]
            small += [] if "--data" in rest else ["--data", "shapes"]
            if "--image-size" in rest:  # of a network that has 390 MiB of weights, gradients and momentum
                small += ["--image-size", "64", "--vram", "2G"]
        elif name == "fork" and "--model" in rest:
            small = ["--at", "1", "--out", "runs/changed"]
            (somewhere / "my_net.py").write_text(f"{MY_NET}# changed\n")
        elif name == "resume":
            small = ["--epochs", "3", "--set", "train.max_steps=null"] if "--epochs" in rest else []
        done = lowmem_command(name, *rest, *small, cwd=somewhere)
        assert done.returncode == 0, f"{shlex.join(['lowmem', name, *rest, *small])}: {done.stdout}{done.stderr}"
        ran.append(name)
    assert set(ran) == set(_SMALL)
