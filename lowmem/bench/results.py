"""What a suite of `lowmem bench` tells: one account, as Markdown, CSV and JSON; and the folder where it stays, so that
the same command goes on from there."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from lowmem.bench import Cell, Setup
from lowmem.core.errors import DiskError, PreflightError, UsageError
from lowmem.core.reading import TABLE_LIMIT_BYTES, Unreadable, escape_markdown, parse_json, read_limited, shorten
from lowmem.core.units import MIB, counted, format_size
from lowmem.runs.atomic import write_bytes_atomic

FORMAT = 1
UNKNOWN = "–"
# What a figure depends on beside the settings. Not the commit, which is recorded: most change something else.
_SAME = ("lowmem", "torch", "card", "driver", "cudnn", "cpu", "cpu_threads")
Environment = dict[str, Any]
Row = dict[str, Any]  # a cell's figures: bytes, seconds, shares


class Column(NamedTuple):
    """Of a table of texts: its header, and what it says of a row (a name: that figure). `brief`: a narrow terminal has
    it too."""

    header: str
    text: Callable[[Any], str] | str
    brief: bool = True

    def of(self, row: Any) -> str:
        return str(row[self.text]) if isinstance(self.text, str) else self.text(row)

    @staticmethod
    def mib(header: str, name: str, digits: int = 1, brief: bool = True) -> Column:
        """`digits` behind the point of what is small."""

        def text(row: Row) -> str:
            size = row[name]
            return UNKNOWN if size is None else f"{size / MIB:,.{digits if size < 100 * MIB else 0}f}"

        return Column(header, text, brief)

    @staticmethod
    def figure(header: str, name: str, form: str = "{:+.1%}", none: str = "") -> Column:
        """`none`: what is said of 0, if anything else."""

        def text(row: Row) -> str:
            return UNKNOWN if row[name] is None else none if none and not row[name] else form.format(row[name])

        return Column(header, text)

    @staticmethod
    def seconds(digits: int) -> Column:
        def text(row: Row) -> str:
            known = [row[name] for name in ("step_seconds", "least_seconds", "most_seconds")]
            middle, low, high = (UNKNOWN if one is None else f"{one:.{digits}f}" for one in known)
            return UNKNOWN if None in known else f"{middle} ({low} to {high})"

        return Column("step, s (fastest to slowest)", text, brief=False)

    @staticmethod
    def rate(header: str) -> Column:
        def text(row: Row) -> str:
            rate = row["batch"] / row["step_seconds"] if row["step_seconds"] else None
            return UNKNOWN if rate is None else f"{rate:,.0f}" if rate >= 10 else f"{rate:.1f}"

        return Column(header, text)


@dataclass(frozen=True)
class ResultTable:
    """Rows, and what is shown of them; `note`: said below."""

    title: str
    columns: Sequence[Column]
    rows: Sequence[Any]
    note: str = ""

    def lines(self, *, brief: bool = False) -> list[list[str]]:
        """The header, and a line a row. `brief`: see `Column`."""
        columns = [one for one in self.columns if one.brief or not brief]
        return [[one.header for one in columns], *([one.of(row) for one in columns] for row in self.rows)]


@dataclass(frozen=True, kw_only=True)
class Account:
    """What is told of cells. `conditions`: on what, with what; `how`: what follows that, in Markdown; `unfinished`:
    what is to be said before the end, empty at the end; `rows`: for CSV; `record`: everything, for JSON."""

    title: str
    conditions: str
    how: str = ""
    unfinished: str
    tables: Sequence[ResultTable]
    rows: Sequence[Row]
    record: dict[str, Any]

    def markdown(self) -> str:
        """Readable tables, conditions first."""
        measured = f"{escape_markdown(self.conditions)} {self.how}".strip()
        parts = [f"# {self.title}", measured, self.unfinished and f"**{self.unfinished}**"]
        for table in self.tables:
            header, *lines = table.lines()
            shown = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
            shown += [f"| {' | '.join(map(escape_markdown, line))} |" for line in lines]
            parts += [f"## {table.title}", "\n".join(shown), table.note]
        return "\n\n".join(filter(None, parts)) + "\n"

    def csv(self) -> str:
        """A row a cell, lists and dictionaries left out; unknown is empty."""
        flat = [{name: one for name, one in row.items() if not isinstance(one, list | dict)} for row in self.rows]
        out = io.StringIO()
        writer = csv.DictWriter(out, list(flat[0]) if flat else [], lineterminator="\n")
        writer.writeheader()
        writer.writerows(flat)
        return out.getvalue()

    def json(self) -> str:
        """Figures that are no numbers become null."""
        return json.dumps(plain_values(self.record), indent=1) + "\n"


def conditions(environment: Environment, card_bytes: int | None = None) -> str:
    """On what, with what."""
    versions = f"lowmem {environment['lowmem']}, torch {environment['torch']}, Python {environment['python']}"
    if environment["device"] != "cuda":
        threads = counted(environment["cpu_threads"], "thread")
        return f"On the CPU ({environment.get('cpu')}, {threads}); {versions}."
    return (
        f"{environment.get('card')}{f' with {format_size(card_bytes)}' if card_bytes else ''}, driver "
        f"{environment.get('driver') or '?'}, CUDA {environment.get('cuda')}, cuDNN {environment.get('cudnn')}"
        f"{', fp32 convolutions in TF32' if environment.get('tf32') else ''}; {versions}."
    )


class Results:
    """Context manager: the folder, held against a second writer. `account`: the suite's own, of setup, environment,
    cells and whether they are finished. Raises PreflightError if the folder cannot be written, UsageError if somebody
    else writes it."""

    def __init__(
        self,
        folder: Path,
        setup: Setup,
        environment: Environment,
        account: Callable[[Any, Environment, Sequence[Cell], bool], Account],
    ) -> None:
        self.folder, self._setup, self._environment, self._account = folder, setup, environment, account
        self.files = [folder / f"{setup.stem}.{suffix}" for suffix in ("json", "csv", "md", "png")]
        self._lock = FileLock(folder / f"{setup.stem}.lock", timeout=0)

    def __enter__(self) -> Results:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
            for file in self.files:  # before minutes of measuring, not after
                with open(file, "ab"):
                    pass
        except Timeout:
            raise UsageError(f"another `lowmem bench` is writing {self.folder}: wait, or give another --out") from None
        except OSError as error:
            self._lock.release()
            words = f"{self.folder} cannot be written ({error.strerror}): choose another with --out"
            raise PreflightError(words) from None
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # while it is held: results are looked at, and kept, without it
            Path(self._lock.lock_file).unlink()
        self._lock.release()
        for file in self.files:
            if file.is_file() and file.stat().st_size == 0:
                file.unlink()

    def load(self) -> dict[str, Cell]:
        """Key -> cell of the tables that are there. Raises UsageError if they are of other settings, another machine or
        torch, or no results of this command."""
        path = self.files[0]
        way_out = "give another --out, or delete it"
        try:
            data = read_limited(path, TABLE_LIMIT_BYTES)
            if not data:
                return {}
            found = parse_json(data)
            if not isinstance(found, dict) or found.get("bench") != FORMAT:
                raise Unreadable(f"has no results of this version of `lowmem bench` (format {FORMAT})")
            there = {**found["environment"], **found["settings"]}
            cells = [Cell.from_record(one) for one in found["cells"]]
        except FileNotFoundError:
            return {}
        except (Unreadable, OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{path} {shorten(str(error))}: {way_out}") from None
        settings = plain_values(self._setup.record())
        here = {**self._environment, **settings}
        differing = [
            f"{name}: {shorten(str(there.get(name)))} there, {here.get(name)} here"
            for name in (*sorted(settings), *_SAME)
            if there.get(name) != here.get(name)
        ]
        if differing:
            raise UsageError(f"{self.folder} has the results of something else ({'; '.join(differing)}): {way_out}")
        return {cell.key: cell for cell in cells}

    def save(
        self, cells: Sequence[Cell], finished: bool, draw: Callable[[Account], bytes | None] = lambda _: None
    ) -> Account:
        """After each measurement; at last with the picture. Raises DiskError."""
        account = self._account(self._setup, self._environment, cells, finished)

        def contents() -> Iterator[bytes | None]:
            yield from (text.encode() for text in (account.json(), account.csv(), account.markdown()))
            yield draw(account)  # when the others are written: if it fails, it costs nothing else

        for file, content in zip(self.files, contents(), strict=True):
            try:
                if content is not None:
                    write_bytes_atomic(file, content)
            except OSError as error:
                raise DiskError(
                    f"{file} could not be written ({error.strerror}); what was measured before is there: "
                    "make room and give the same command again"
                ) from None
        return account


def plain_values(value: Any) -> Any:
    """As JSON has it: lists, and null for what is no number."""
    return json.loads(json.dumps(value), parse_constant=lambda _: None)
