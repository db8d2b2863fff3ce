"""The command line is frozen in surface.txt: commands, flags, dotted settings. Whoever changes one does it knowingly.

After a change that is meant: `python -m tests.unit.cli.test_surface` writes the file anew; look at its difference."""

from __future__ import annotations

import difflib
import inspect
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from pydantic import BaseModel
from typer.main import get_command

from lowmem.cli import main
from lowmem.cli.flags import FLAGS, Given, takes_flags
from lowmem.config.schema import OPERATIONAL, Config, known_keys

FILE = Path(__file__).with_name("surface.txt")


def surface() -> str:
    """Commands with their parameters by name, then the settings, from the real ones."""
    group: Any = get_command(main.app)
    assert main.app.registered_callback is not None
    commands = [("", group, main.app.registered_callback.callback)]
    for info in main.app.registered_commands:
        assert info.callback is not None
        name = info.name or info.callback.__name__
        commands.append((name, group.commands[name], info.callback))
    lines = []
    for name, command, callback in sorted(commands, key=lambda known: known[0]):
        lines += [f"lowmem {name}{' (hidden)' if command.hidden else ''}".strip(), *_filled(command.help, "    ")]
        types = _types(callback)
        for parameter in sorted(command.params, key=lambda known: known.opts[0]):
            # Those for completion are the library's own.
            lines += (
                _parameter(parameter, *types[parameter.name]) if parameter.name in types else [f"  {parameter.opts[0]}"]
            )
        lines.append("")
    lines.append("settings (* may differ on resume)")
    lines += [f"  {text}" for text in _settings(Config, "")]
    return "\n".join(lines) + "\n"


def _types(callback: Callable[..., Any] | None) -> dict[str, tuple[Any, Any]]:
    """By parameter, what typer makes it of: its type without `None`, and the library's record of it."""
    assert callback is not None
    found = {}
    for name, parameter in inspect.signature(callback, eval_str=True).parameters.items():
        if metadata := getattr(parameter.annotation, "__metadata__", None):
            kind = get_args(parameter.annotation)[0]
            found[name] = next((one for one in get_args(kind) if type(None) in get_args(kind)), kind), metadata[0]
    return found


def _parameter(parameter: Any, kind: Any, info: Any) -> Iterator[str]:
    is_option = parameter.param_type_name == "option"
    head = "/".join([*parameter.opts, *parameter.secondary_opts]) if is_option else parameter.name
    facts = [
        str(parameter.metavar or getattr(kind, "__name__", kind)),
        "" if info.min is None and info.max is None else f"{info.min} to {info.max}",
        "may be repeated" if parameter.multiple or parameter.nargs != 1 else "",
        "required" if parameter.required else f"default {parameter.default!s}",
    ]
    yield f"  {head}: {', '.join(fact for fact in facts if fact)}"
    yield from _filled(info.help, "      ")


def _filled(text: str | None, indent: str) -> list[str]:
    return textwrap.wrap(text or "", 110, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)


def _settings(section: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _settings(field.annotation, f"{name}.")
        else:
            yield f"{prefix}{name}{'*' if f'{prefix}{name}' in OPERATIONAL else ''} = {field.default}"


def test_the_surface_is_the_frozen_one() -> None:
    differing = difflib.unified_diff(FILE.read_text("utf-8").splitlines(), surface().splitlines(), lineterm="", n=1)
    assert not (lines := list(differing)), "\n".join(lines)


def test_the_table_of_flags_knows_only_settings_and_commands_that_there_are() -> None:
    commands = set(get_command(main.app).commands)  # type: ignore[attr-defined]
    for flag in FLAGS:
        assert flag.setting in ("", *known_keys())
        assert set(" ".join(flag.helps).split()) <= commands


def test_what_was_typed_goes_to_its_setting() -> None:
    seen: list[tuple[Given, str, bool]] = []

    def train(given: Given, dry_run: bool, own: Annotated[str, typer.Option()] = "x") -> None:
        seen.append((given, own, dry_run))

    app = typer.Typer()
    app.command()(takes_flags(train))
    get_command(app).main(["--arch", "res20", "--batch", "64", "--no-tensorboard", "--set", "seed=3"], "x", None, False)
    ((given, own, dry_run),) = seen
    assert given.flags == {"model.arch": "res20", "train.batch": 64, "train.tensorboard": False}
    assert (given.config_file, given.sets, own, dry_run) == (None, ["seed=3"], "x", False)
    assert given.changes() == {**given.flags, "seed": 3}
    assert given.settings().sources["seed"] == "--set"


if __name__ == "__main__":
    FILE.write_text(surface(), "utf-8")
