"""Reading files that somebody else may have made: bounded in bytes, depth and what they may be, so that none can take
memory or time by what it declares, and so that whatever is wrong is one exception. And where those are that belong to
no run."""

from __future__ import annotations

import json
import os
import re
import stat
import sys
from pathlib import Path
from typing import Any

import yaml

from lowmem.core.errors import PreflightError

SETTINGS_LIMIT_BYTES = 64 << 10  # of YAML: its reader is written in Python and takes about a second for this
RECORD_LIMIT_BYTES = 1 << 20  # of a manifest, a state file, what is known of the machine
PLAN_LIMIT_BYTES = 16 << 20  # a plan with its ladder has some 100 KiB
TABLE_LIMIT_BYTES = 128 << 20  # of rows; a hundred epochs of steps have 3 MiB
DEEPEST_JSON = 200  # the most nested schedules of the family have some 20 levels
_DEEPEST_YAML = 50
_LONGEST_NUMBER = 60
_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>|#~$&!^]|^[-+](?= |$))")
_MARKDOWN_NUMBER = re.compile(r"^(\d{1,9})([.)])(?= |$)")
_PACKAGE = Path(__file__).resolve().parent.parent


class Unreadable(ValueError):
    """What is wrong with a file, in words that follow its name: `has 5,000 bytes, at most 1,000 are read`."""


def read_limited(path: Path, limit_bytes: int) -> bytes:
    """The whole file. Raises Unreadable if it is larger or no regular file (a pipe would never end), OSError."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise Unreadable("is no regular file")
    if status.st_size > limit_bytes:
        raise Unreadable(f"has {status.st_size:,} bytes, at most {limit_bytes:,} are read")
    with open(path, "rb") as file:
        # Not more than there is: as much as is asked for is allocated first.
        data = file.read(min(status.st_size, limit_bytes) + 1)
    if len(data) > limit_bytes:
        raise Unreadable(f"has more than the {limit_bytes:,} bytes that are read")
    return data


def _integer(digits: str) -> int:
    """Raises ValueError for one that no float comes near: nobody wrote it, and what divides by it fails."""
    if len(digits) > _LONGEST_NUMBER:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def parse_json(data: bytes | str) -> Any:
    """`json.loads` for at most `DEEPEST_JSON` levels, whose numbers a float can hold. Raises Unreadable."""
    try:
        value = json.loads(data, parse_int=_integer)
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"is no JSON ({shorten(str(error))})") from None
    level = [value]
    for _ in range(DEEPEST_JSON + 1):
        level = [one for one in level if isinstance(one, dict | list)]
        if not level:
            return value
        level = [inner for one in level for inner in (one.values() if isinstance(one, dict) else one)]
    raise Unreadable(f"is nested more than {DEEPEST_JSON} deep")


def read_json(path: Path, limit_bytes: int = RECORD_LIMIT_BYTES) -> Any:
    """`parse_json` of a file. Raises Unreadable, OSError."""
    return parse_json(read_limited(path, limit_bytes))


class _Loader(yaml.SafeLoader):
    """Plain values only. An alias can make a few lines mean gigabytes, and nothing here is worth one."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise _refusal("aliases (*name) are not read: write the value out", self.peek_event())
        self.depth += 1
        if self.depth > _DEEPEST_YAML:
            raise _refusal(f"nested more than {_DEEPEST_YAML} deep", self.peek_event())
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise _refusal(f"{shorten(key.value)} stands twice", key)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _refusal(words: str, at: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=words, problem_mark=at.start_mark)


def _yaml_integer(loader: _Loader, node: yaml.ScalarNode) -> int:
    if len(node.value) > _LONGEST_NUMBER:
        raise _refusal("a number of too many digits", node)
    return loader.construct_yaml_int(node)


_Loader.add_constructor("tag:yaml.org,2002:int", _yaml_integer)


def parse_yaml(text: str) -> Any:
    """`yaml.safe_load` without aliases, for at most 50 levels. Raises yaml.YAMLError, and nothing else."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        raise
    except (ValueError, LookupError, AttributeError, TypeError, ArithmeticError, RecursionError) as error:
        # What its constructors raise for `!!int x`, a 31st of February, ….
        raise yaml.MarkedYAMLError(problem=f"a value that is none ({shorten(str(error))})") from None


def shorten(text: object, longest: int = 200) -> str:
    """One line of at most `longest` characters, without control characters: what a message may carry of a file."""
    line = " ".join(str(text).split())
    line = "".join(one if one.isprintable() else "?" for one in line)
    return line if len(line) <= longest else f"{line[: longest - 1]}…"


def escape_markdown(text: object) -> str:
    """Text that Markdown shows as it is, on one line, without control characters."""
    return _MARKDOWN_NUMBER.sub(r"\1\\\2", _MARKDOWN.sub(r"\\\1", shorten(text, 10_000)))


def user_cache_folder() -> Path:
    """The folder for files that can be made again, by the platform's custom, with `lowmem` at its end."""
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or str(Path.home() / "AppData" / "Local")
        return Path(base) / "lowmem" / "Cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "lowmem"
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The XDG specification: a relative path is to be ignored.
    return (named if named.is_absolute() else Path.home() / ".cache") / "lowmem"


def profiles_folder(kind: str) -> Path:
    """The folder `profiles/<kind>`: beside the package in a checkout, inside it when installed. Raises PreflightError
    if the installation lacks it."""
    for folder in (_PACKAGE / "profiles" / kind, _PACKAGE.parent / "profiles" / kind):
        if folder.is_dir():
            return folder
    raise PreflightError(f"the installation lacks profiles/{kind}: install lowmem again")


def profile_names(kind: str) -> tuple[str, ...]:
    return tuple(sorted(path.stem for path in profiles_folder(kind).glob("*.yaml")))
