"""A run folder from a stranger runs no code, leads nowhere out of itself, and takes no memory by what it declares."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lowmem.cli.main import main
from lowmem.config.settings import from_yaml, gather
from lowmem.core.errors import CorruptCheckpoint, LowmemError, UsageError
from lowmem.lifecycle import fork_run, resume_training
from lowmem.lifecycle.verify import verify
from lowmem.report import write_report
from lowmem.runs import checkpoint as checkpoints
from lowmem.runs.folder import refuse_links
from tests.faults.fuzzing import rehash
from tests.tiny import Heard, copy_run, make_run

GIB = 1 << 30


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("made") / "run")


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    return copy_run(made, tmp_path / "run")


def _newest(run: Path) -> Path:
    return checkpoints.checkpoint_folders(run / "checkpoints")[0]


# -- leading out of the folder -----------------------------------------------------------------------------------------

LED_OUT = (
    "metrics.csv", "steps.csv", "events.jsonl", "config.yaml", "plan.json", "run.lock", "run.owner.json",
    "metrics.csv.partial", "config.yaml.partial", "damaged-metrics.csv", "weights/last.safetensors",
    "weights/last.safetensors.partial", "checkpoints", "weights", "report", ".preflight",
    "checkpoints/.aside-step-00000007", "checkpoints/step-00000007", "checkpoints/step-00000007/state.json",
)  # fmt: skip


def _reads_it(run: Path) -> list[Callable[[], object]]:
    changes = gather(sets=("optim.lr=0.01",))
    return [
        lambda: resume_training(run, None, Heard()),
        lambda: fork_run(run, at=1, changes=changes, out=run.with_name("forked"), observer=Heard()),
        lambda: verify(run),
        lambda: write_report([run]),
    ]


@pytest.mark.skipif(os.name == "nt", reason="symbolic links need a right there that few have")
@pytest.mark.parametrize("name", LED_OUT)
def test_a_link_is_refused_and_what_it_leads_to_left_alone(name: str, run: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    link = run / name
    if link.is_dir():
        shutil.move(link, outside)
    elif link.exists():
        outside.write_bytes(link.read_bytes())
        link.unlink()
    else:
        outside.write_text("a thesis")
    link.symlink_to(outside)
    before = _content(outside)
    for use in _reads_it(run):
        with pytest.raises(UsageError, match=f"{link.name} is a link") as caught:
            use()
        assert caught.value.exit_code == 2
    assert _content(outside) == before


def _content(path: Path) -> object:
    if path.is_dir():
        return {str(file): file.read_bytes() for file in path.rglob("*") if file.is_file()}
    return path.read_bytes()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names there")
@pytest.mark.parametrize("name", ["metrics.csv", "events.jsonl", "checkpoints/step-00000007/manifest.json", "new"])
def test_a_pipe_is_refused_and_not_waited_for(name: str, run: Path) -> None:
    (run / name).unlink(missing_ok=True)
    os.mkfifo(run / name)
    for use in _reads_it(run):
        with pytest.raises(UsageError, match="neither a file nor a folder"):
            use()


def test_the_run_itself_may_be_reached_by_a_link(run: Path, tmp_path: Path) -> None:
    if os.name == "nt":
        pytest.skip("symbolic links need a right there that few have")
    (tmp_path / "there").symlink_to(run)
    refuse_links(tmp_path / "there")
    assert verify(tmp_path / "there").can_resume


@pytest.mark.parametrize("name", ["../../evil", "/etc/passwd", "..\\..\\evil", "C:\\evil", "state.json/../../x", ""])
def test_names_in_a_manifest_lead_nowhere(name: str, run: Path) -> None:
    file = _newest(run) / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["files"][name] = manifest["files"]["state.json"]
    file.write_text(json.dumps(manifest, indent=1))
    _, where, skipped = checkpoints.load_newest(run / "checkpoints")
    assert where.name == "step-00000006"
    assert "does not list exactly" in str(next(iter(skipped.values())))


# -- running code ------------------------------------------------------------------------------------------------------


def test_no_code_is_run(run: Path, tmp_path: Path) -> None:
    owned = tmp_path / "owned"
    call = f"!!python/object/apply:os.system ['touch {owned}']"
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("seed: 0", f"seed: {call}"))
    for use in _reads_it(run):
        with pytest.raises(UsageError):
            use()
    with pytest.raises(UsageError):
        gather(sets=(f"seed={call}",))
    (run / "config.yaml").write_text(config)
    for name in ("model.safetensors", "optimizer.safetensors", "state.json"):
        (_newest(run) / name).write_bytes(b"cposix\nsystem\n(S'touch " + os.fsencode(owned) + b"'\ntR.")
        rehash(_newest(run))
        _, where, _ = checkpoints.load_newest(run / "checkpoints")
        assert where.name == "step-00000006"
    assert not owned.exists()


# -- sizes -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def little_memory() -> Iterator[None]:
    """What these inputs declare would need far more than the four GiB that this process may have from here on."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 4 * GIB, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def _laughs() -> str:
    lines = ["a0: &a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    return "\n".join(lines) + "\n"


CONFIGS = {
    "laughs": (lambda text: text + _laughs(), "aliases"),
    "width": (lambda text: text.replace("width: 2", "width: 1000000000"), "<= 4096"),
    "epochs": (lambda text: text.replace("epochs: 3", f"epochs: {10**15}"), "<= 1000000"),
    "digits": (lambda text: text.replace("seed: 0", "seed: " + "9" * 5000), "too many digits"),
    "depth": (lambda text: text.replace("seed: 0", "seed: " + "[" * 20000), "nested"),
    "size": (lambda text: text + "#" * (1 << 20), "bytes, at most"),
}


@pytest.mark.parametrize("what", CONFIGS)
def test_a_config_that_declares_too_much(what: str, run: Path, little_memory: None) -> None:
    change, says = CONFIGS[what]
    text = (run / "config.yaml").read_text()
    assert change(text) != text
    (run / "config.yaml").write_text(change(text))
    for use in _reads_it(run)[:3]:
        with pytest.raises(UsageError, match=says):
            use()


def _wide(run: Path) -> None:
    """A network of 40 billion parameters, in settings that are valid, and no word that there were others."""
    for path in checkpoints.checkpoint_folders(run / "checkpoints"):
        state = json.loads((path / "state.json").read_text())
        (path / "state.json").write_text(json.dumps({**state, "settings": {}}))
        rehash(path)
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("width: 2", "width: 4096"))


def _sparse(name: str, size_bytes: int) -> Callable[[Path], None]:
    def make(run: Path) -> None:
        for path in checkpoints.checkpoint_folders(run / "checkpoints"):
            manifest = json.loads((path / "manifest.json").read_text())
            with open(path / name, "r+b") as file:
                file.truncate(size_bytes)
            if name in manifest["files"]:
                manifest["files"][name]["bytes"] = size_bytes
                (path / "manifest.json").write_text(json.dumps(manifest, indent=1))

    return make


def _header(length: int, text: str) -> Callable[[Path], None]:
    def make(run: Path) -> None:
        for path in checkpoints.checkpoint_folders(run / "checkpoints"):
            (path / "model.safetensors").write_bytes(length.to_bytes(8, "little") + text.encode())
            rehash(path)

    return make


def _deep(run: Path) -> None:
    for path in checkpoints.checkpoint_folders(run / "checkpoints"):
        (path / "state.json").write_text('{"run":' * 100_000 + "1" + "}" * 100_000)
        rehash(path)


_VAST = json.dumps({"conv1.weight": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}})
_NOTHING = json.dumps({"conv1.weight": {"dtype": "F32", "shape": [2**62, 2**62, 0], "data_offsets": [0, 0]}})
CHECKPOINTS: dict[str, Callable[[Path], None]] = {
    "a network of 40 billion parameters": _wide,
    "8 GiB of model": _sparse("model.safetensors", 8 * GIB),
    "8 GiB of optimizer": _sparse("optimizer.safetensors", 8 * GIB),
    "8 GiB of state": _sparse("state.json", 8 * GIB),
    "8 GiB of manifest": _sparse("manifest.json", 8 * GIB),
    "a header of 2**63 bytes": _header(2**63, "{}"),
    "a header of 99 MiB": _header(99 << 20, "{" + " " * (1 << 20)),
    "a tensor of 4 TiB": _header(len(_VAST), _VAST),
    "a tensor of nothing, widely": _header(len(_NOTHING), _NOTHING),
    "a deep state": _deep,
}


@pytest.mark.parametrize("what", CHECKPOINTS)
def test_a_checkpoint_that_declares_too_much(what: str, run: Path, little_memory: None) -> None:
    CHECKPOINTS[what](run)
    with pytest.raises(CorruptCheckpoint, match="no usable checkpoint"):
        resume_training(run, None, Heard())
    assert not verify(run).can_resume


@pytest.mark.parametrize("name", ["metrics.csv", "steps.csv", "plan.json", "env.json", "events.jsonl"])
def test_a_file_of_8_gib_is_not_read(name: str, run: Path, little_memory: None) -> None:
    with open(run / name, "a+b") as file:
        file.truncate(8 * GIB)
    verify(run)
    if name in {"metrics.csv", "steps.csv", "plan.json"}:
        with pytest.raises(CorruptCheckpoint):
            resume_training(run, None, Heard())
    if name == "metrics.csv":
        with pytest.raises(UsageError, match="at most"):
            write_report([run])
    # The steps of a run of small batches may be more than a report has room for; events only colour it.
    if name in {"steps.csv", "events.jsonl"}:
        assert "what it holds is left out" in write_report([run]).markdown.read_text(encoding="utf-8")


# -- what is shown -----------------------------------------------------------------------------------------------------


def test_a_message_carries_no_control_characters(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "config.yaml").write_text('"\\e]0;owned\\a\\e[2J": 1\nseed: 1\n')
    with pytest.raises(SystemExit) as leaving:
        main(["resume", str(run)])
    err = capsys.readouterr().err
    assert leaving.value.code == 2
    assert "\x1b" not in err
    assert "\x07" not in err
    assert "unknown setting" in err


def test_a_position_that_no_run_comes_to_is_refused(run: Path) -> None:
    for change in (
        {"step_in_epoch": 5},
        {"seen": 0},
        {"epoch": -1},
        {"step": 6},
        {"epoch": 2**70},
        {"loss_sum": "0"},
        {"lr_scale": "1"},
        {"lr_scale": -1.0},
        {"lr_scale": math.inf},
        {"rollbacks": 0.5},
        {"told_stuck": 1},
        {"gradient_share": "x"},
        {"share_count": -1},
        {"unheard_of": 1},
    ):
        copy = copy_run(run, run.with_name("changed"))
        for path in checkpoints.checkpoint_folders(copy / "checkpoints"):
            state = json.loads((path / "state.json").read_text())
            state["run"] |= {"step_in_epoch": 1} | change
            (path / "state.json").write_text(json.dumps(state))
            rehash(path)
        with pytest.raises(LowmemError) as caught:
            resume_training(copy, None, Heard())
        assert caught.value.exit_code == 7, change


def test_settings_of_an_untouched_run_are_read(run: Path) -> None:
    assert from_yaml(run / "config.yaml").config.model.width == 2
    assert verify(run).can_resume
