"""The flags, in one table: whoever adds one adds a row, and the commands that it names have it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowmem.cli import completion
from lowmem.config.networks import parse_args

if TYPE_CHECKING:
    from lowmem.config.settings import Settings


@dataclass(frozen=True)
class Flag:
    """One row. `helps`: the commands that have the flag, one or several by name, and what their --help says of it.
    `setting`: its dotted name; "" if it is none: then the command has a parameter of that name. `name`: as it is typed;
    `--a/--no-a` for a switch that is also turned off. `default`: `...` for a flag that must be given;
    a switch that is no setting is off."""

    name: str
    setting: str
    kind: type
    helps: Mapping[str, str]
    metavar: str | None = None
    least: float | None = None
    most: float | None = None
    default: object = None

    @property
    def parameter(self) -> str:
        """The name of it in Python: `--data-root` is `data_root`."""
        return self.name.partition("/")[0].removeprefix("--").replace("-", "_")


_STARTS = "train plan doctor reproduce"  # what begins from settings alone

FLAGS = (
    # No settings.
    Flag("--epochs", "", int, {
        "resume": "Go on to this many epochs in a new run: a fork, with the schedule where it was.",
    }, least=1),
    Flag("--at", "", str, {
        "fork": "12: the end of epoch 12. step:4692: that step, in the middle of an epoch (then batch, seed and data "
        "stay). last: the newest checkpoint. `lowmem ls` lists what there is.",
    }, metavar="EPOCH|step:STEP|last", default=...),
    Flag("--steps", "", int, {"bench": "Measured steps of each trial (5; quick: 3; acceptance: 10)."}, least=1),
    Flag("--rounds", "", int, {"bench": "How often each cell is measured, in turns (3)."}, least=1),
    Flag("--budgets", "", str, {
        "bench": "Tensors of the engine's rows: sizes, shares of plain's peak, or least, like 1200M,0.5,least.",
    }, metavar="LIST"),
    Flag("--quick", "", bool, {"bench": "A small network and all tables, in two minutes on two CPU cores."}),
    Flag("--suite", "", str, {"bench": "acceptance: all that is promised, against real steps."}),
    Flag("--cells", "", str, {
        "bench": "Of the suite, only these: memory, time, gradients, out of memory, largest, format, comma-separated.",
    }, metavar="LIST"),
    Flag("--minutes", "", float, {
        "bench": "Limit of time (60; quick: 2; acceptance: 6); what no longer fits is left out.",
    }, least=0),
    Flag("--out", "", Path, {
        "train doctor": "Run folder; default runs/ARCH.",
        "resume": "With --epochs: the new run's folder; default RUN-fork.",
        "fork": "Run folder; default RUN-fork.",
        "report": "Folder for the report; default RUN/report for one run, report/ for several.",
        "evaluate": "Folder for the results of one run; default RUN/evaluate.",
        "bench": "Folder of the results (bench/NETWORK); what is in it already is not measured again.",
    }),
    Flag("--out", "", Path, {
        "reproduce": "Folder of the job; each run and the report are folders in it.",
    }, default=Path("runs/reproduce")),
    Flag("--html", "", bool, {"report": "Also report.html: the same in one file, figures inlined."}),
    Flag("--tensorboard", "", bool, {"report": "Also TensorBoard event files of the runs, beside the report."}),
    Flag("--only", "", str, {"reproduce": "Only these runs this time, like res20,cnn110."}, metavar="RUN,RUN"),
    Flag("--block", "", str, {"reproduce": "bottleneck adds res56-bottleneck and res110-bottleneck to the six runs."}),
    Flag("--dry-run", "", bool, {
        "train fork reproduce": "Plan, try every output and a step, say time and disk; leave nothing behind.",
    }),
    Flag("--recalibrate/--no-recalibrate", "", bool, {"plan": "Measure this machine's card again, and plan by that."}),
    Flag("--interval", "", float, {"watch": "Seconds between two looks."}, least=0.05, most=3600.0, default=1.0),
    Flag("--once", "", bool, {"watch": "Say how it stands, and leave."}),
    Flag("--clear", "", bool, {"cache": "Remove it: all of it can be made again."}),
    Flag("--json", "", bool, {
        "ls settings cards cache": "Print everything known as JSON.",
        "verify doctor": "Print the findings as JSON.",
        "evaluate": "Print the figures as JSON, a list with an object for each run.",
        "watch": "With --once: as JSON.",
        "plan": "Print the plan as JSON; where none fits, all that was tried.",
    }),
    Flag("--format", "", str, {
        "export": "onnx (needs the extra onnx), torchscript, or safetensors: the weights alone.",
    }, metavar="onnx|torchscript|safetensors", default=...),
    Flag("--format", "", str, {
        "predict": "A table for people, CSV, or a JSON object a line.",
    }, metavar="table|csv|jsonl", default="table"),
    Flag("--top", "", int, {"predict": "Classes told of each picture, the most probable first."}, least=1, default=3),
    Flag("--out", "", Path, {"export": "The file."}, default=...),
    Flag("--weights", "", str, {
        "evaluate predict export": "best, last, or a .safetensors file of such a network's weights.",
    }, metavar="best|last|FILE", default="best"),
    Flag("--raw-uint8", "", bool, {"export": "The graph takes uint8 pictures, and normalises them itself."}),
    Flag("--curve", "", Path, {"plan": "Draw memory against time to this file: .png, .jpg, .svg or .pdf."}),
    Flag("--notify", "", str, {
        "train resume": "Run this command at the end; LOWMEM_OUTCOME, LOWMEM_MESSAGE, … tell it how that was. For this "
        "call only.",
    }, metavar="COMMAND"),
    # Settings.
    Flag("--arch", "model.arch", str, {
        "train": "res20 res34 res50 res56 res101 res110, or cnn… without shortcuts.",
        "plan": "A network of the family.",
        "doctor": "The network of the run, for the room it takes on disk.",
        "bench": "A network of the family (on the CPU res20, quick: res56; on a card res110).",
    }),
    Flag("--block", "model.block", str, {
        "train": "basic or bottleneck; default: what is usual for the network.",
        "plan doctor": "basic or bottleneck.",
        "bench": "basic or bottleneck; default: the usual, for the default res56 and res110 bottleneck.",
    }),
    Flag("--model", "model.spec", str, {
        "train": "Another network: torchvision:NAME, timm:NAME or FILE.py:NAME, a class or function that makes it.",
        "plan doctor bench": "Another network: torchvision:NAME, timm:NAME or FILE.py:NAME.",
        "fork": "Go on in this network, which has the same weights: torchvision:NAME, timm:NAME or FILE.py:NAME.",
    }, metavar="SPEC"),
    Flag("--model-args", "model.args", list[str], {
        "train plan doctor bench": "What --model's network is made with, like depth=3; may be repeated.",
        "fork": "What the network is made with from there on, like dropout=0.1; may be repeated.",
    }, metavar="NAME=VALUE"),
    Flag("--init", "train.init", str, {
        "train": "Weights to begin with: a file, a run (its best), or torchvision: that library's pretrained ones.",
    }, metavar="FILE|RUN|torchvision"),
    Flag("--freeze", "train.freeze", list[str], {
        "train": "Do not train what is named so, like layer1* or features.*; may be repeated.",
        "plan": "What is not trained, like layer1* or features.*; may be repeated.",
        "fork": "What is not trained from there on, like layer1*; may be repeated.",
    }, metavar="PATTERN"),
    Flag("--width", "model.width", int, {_STARTS: "Channels of the stem (64)."}),
    Flag("--width", "model.width", int, {"bench": "Channels of the stem (64; quick: 16)."}, least=1),
    Flag("--data", "data.source", str, {
        "train doctor reproduce": "cifar10, cifar100, fashion-mnist, shapes, folder:PATH or csv:FILE.",
        "resume": "Where the same pictures are now, like folder:PATH or csv:FILE.",
        "evaluate": "Other pictures of the same classes, like folder:PATH: its test/, or all in class folders.",
    }),
    Flag("--image-size", "data.image_size", int, {
        "train plan doctor reproduce": "Side of the square pictures that the network sees (32); of a folder any.",
        "bench": "Side of the square pictures that the network sees (32).",
    }, metavar="N"),
    Flag("--data-root", "data.root", str, {
        "train resume evaluate doctor reproduce": "Folder that holds, or receives, cifar10, cifar100, fashion-mnist.",
    }),
    Flag("--val-split", "data.val_split", int, {
        "train doctor": "Hold back this many training pictures to choose weights on.",
    }),
    Flag("--test-split", "data.test_split", float, {
        "train doctor reproduce": "Where no pictures are named for it: test on this many, or this share, like 0.2.",
    }, metavar="N"),
    Flag("--skip-damaged", "data.skip_damaged", bool, {
        "train evaluate doctor reproduce": "Go on without files that are no pictures or are damaged, and record which.",
    }),
    Flag("--batch", "train.batch", str, {
        "train reproduce": "Effective batch (128), or auto: the fastest that fits.",
        "plan": "Effective batch (128), or auto.",
    }),
    # A list, so that a second one is refused and not taken for the first.
    Flag("--batch", "train.batch", list[int], {"bench": "Batch size (128; on the CPU 32; quick: 16)."}, least=1),
    Flag("--micro-batch", "train.micro_batch", int, {
        "train": "Pictures at a time; gradients accumulate to the batch.",
        "plan": "Pictures at a time.",
    }),
    Flag("--sync-bn", "train.sync_bn", bool, {
        "train": "Started by torchrun: batch norm over the whole batch, as in one process.",
    }),
    Flag("--epochs", "train.epochs", int, {
        "train": "Epochs; the schedule is scaled to them.",
        "fork": "Another number of epochs; the schedule's milestones stay where they were.",
        "reproduce": "Epochs of each run; the schedule is scaled to them.",
    }),
    Flag("--lr", "optim.lr", float, {
        "train reproduce": "Learning rate to begin with (0.1).",
        "fork": "Another learning rate, from there on.",
    }),
    Flag("--recipe", "recipe", str, {"train reproduce": "A shipped recipe (report, modern) or a .yaml file."}),
    Flag("--precision", "train.precision", str, {
        "train reproduce": "auto, fp32, amp (fp16 on CUDA, bf16 on the CPU) or bf16.",
        "plan doctor": "auto, fp32, amp or bf16.",
    }),
    Flag("--memory-format", "train.memory_format", str, {_STARTS: "auto, contiguous or channels-last."}),
    Flag("--vram", "memory.vram", str, {
        "train plan reproduce": "Memory of the whole card, like 6G; what is no room for tensors is taken off and said.",
        "resume": "A card with another memory to fit into: plans again, for the same gradients.",
        "bench": "Memory of the card that largest batches are to fit (the card's own; acceptance: 6G).",
    }),
    Flag("--tensors", "memory.tensors", str, {
        "train plan reproduce": "In place of --vram: what the step's tensors alone may take, like 2700M.",
        "resume": "In place of --vram: what the step's tensors alone may take.",
        "bench": "In place of --vram: tensors alone that largest batches are to fit (on the CPU half of plain's).",
    }),
    Flag("--host", "memory.host", str, {
        "bench": "More rows: plans whose tensors may wait in so much host memory; auto: half of what is free (off).",
    }, metavar="SIZE"),
    Flag("--card", "memory.card", str, {
        "train": "Plan for this card's profile, like gtx1060-6g; A,B: for processes of torchrun.",
        "reproduce": "Plan for this card's profile, like gtx1060-6g.",
        "plan": "A card profile, like gtx1060-6g, or the path of a .yaml file; A,B: one process on each.",
    }),
    Flag("--device", "train.device", str, {f"{_STARTS} resume": "auto, cuda or cpu."}),
    Flag("--device", "train.device", str, {"bench predict": "auto, cuda or cpu."}, default="auto"),
    Flag("--device", "train.device", str, {"evaluate": "cuda or cpu; default: as the run was trained."}),
    Flag("--seed", "seed", int, {"train reproduce": "Seed of initial weights, order and augmentation."}),
    Flag("--keep-every", "checkpoint.keep_every", int, {
        "train resume fork": "Keep the checkpoint of every N-th epoch too, to fork from.",
    }, metavar="N"),
    Flag("--patience", "train.patience", int, {
        "train": "End it after so many epochs without a better error (validation, else test).",
        "resume": "From now on: end it after so many epochs without a better error (validation, else test).",
    }, metavar="EPOCHS"),
    Flag("--hours", "train.hours", float, {
        "train": "Take as many of the epochs as fit into so many hours, as measured; stop and save when they are over.",
        "resume": "Stop and save when it was trained for so many hours in all; its epochs stay.",
    }),
    Flag("--on-stuck", "train.on_stuck", str, {
        "train resume reproduce": "When a run learns nothing: warn, or stop with code 6.",
    }),
    Flag("--on-nan", "train.on_nan", str, {
        "train resume reproduce": "When the loss breaks: rollback to half the rate, or stop with code 6.",
    }),
    Flag("--tensorboard/--no-tensorboard", "train.tensorboard", bool, {
        "train resume": "Write TensorBoard event files to RUN/tensorboard.",
    }),
    # Where more settings are.
    Flag("--config", "", Path, {_STARTS: "YAML file of settings."}),
    Flag("--set", "", list[str], {
        f"{_STARTS} resume fork": "Any setting by its dotted name.",
    }, metavar="KEY=VALUE", default=[]),
)  # fmt: skip


def rows_of(command: str) -> dict[str, tuple[Flag, str]]:
    """The flags that the table has for a command, by the name of their parameter, and what its --help says of each."""
    helps = [(flag, names.split(), text) for flag in FLAGS for names, text in flag.helps.items()]
    return {flag.parameter: (flag, text) for flag, names, text in helps if command in names}


@dataclass(frozen=True)
class Given:
    """What was typed: `flags` by dotted setting, without those that were not."""

    flags: Mapping[str, Any]
    config_file: Path | None
    sets: list[str]

    @classmethod
    def of(cls, command: str, typed: Mapping[str, Any]) -> Given:
        """What a command was typed with, by the names of its parameters; those of no flag are not looked at."""
        rows = {name: flag for name, (flag, _) in rows_of(command).items() if name in typed}
        flags = {one.setting: typed[name] for name, one in rows.items() if one.setting}
        flags = {key: value for key, value in flags.items() if value not in (None, [])}
        batch = flags.get("train.batch")
        if isinstance(batch, str) and batch.lstrip("-").isdigit():  # else `auto`, or for the settings to judge
            flags["train.batch"] = int(batch)
        if "model.args" in flags:
            flags["model.args"] = parse_args(flags["model.args"])
        return cls(flags, typed.get("config"), list(typed.get("set") or ()))

    def settings(self) -> Settings:
        """Of something new. Raises UsageError."""
        from lowmem.config.settings import gather

        flags = {key: value for key, value in self.flags.items() if key != "recipe"}
        return gather(recipe=self.flags.get("recipe"), config_file=self.config_file, flags=flags, sets=self.sets)

    def changes(self) -> dict[str, object]:
        """To the settings of a run that is there. Raises UsageError."""
        from lowmem.config.settings import parse_set

        return {**self.flags, **dict(parse_set(text) for text in self.sets)}


def takes_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Gives the command the flags that the table has for its name: each to the parameter of its name, settings as
    `given`. Other parameters are its own."""
    rows = rows_of(command.__name__)
    own = inspect.signature(command, eval_str=True).parameters

    @functools.wraps(command)
    def parsed(**typed: Any) -> None:
        values = {name: typed.pop(name) for name in rows if name not in own}
        if "given" in own:
            typed["given"] = Given.of(command.__name__, values)
        command(**typed)

    made = [_option(flag, text) for flag, text in rows.values()]
    # What typer reads a command's parameters off.
    parameters = [*(one for name, one in own.items() if name != "given" and name not in rows), *made]
    parsed.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    parsed.__annotations__ = {one.name: one.annotation for one in parameters}
    return parsed


def _option(flag: Flag, text: str) -> inspect.Parameter:
    complete = completion.settings if flag.name == "--set" else completion.of_setting(flag.setting)
    option = typer.Option(
        flag.name, metavar=flag.metavar, min=flag.least, max=flag.most, help=text, autocompletion=complete
    )
    default = False if flag.kind is bool and not flag.setting else flag.default
    kind = flag.kind if default is not None else flag.kind | None
    default = inspect.Parameter.empty if default is ... else default
    return inspect.Parameter(
        flag.parameter, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option]
    )
