"""`lowmem plan`: in words, as JSON with the picture's points, and what it leaves with."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from math import inf
from pathlib import Path

import pytest

from lowmem.cli.main import main
from lowmem.cli.terminal import Observer, observer
from lowmem.core.units import format_size

ONE_MODE = ("--precision", "fp32", "--memory-format", "contiguous")  # otherwise each is planned
SMALL = ("plan", "--arch", "res20", "--width", "4", "--batch", "32")


def _leave(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as leaving:
        main([*SMALL, *arguments])
    captured = capsys.readouterr()
    assert isinstance(leaving.value.code, int)
    return leaving.value.code, captured.out, captured.err


@pytest.mark.slow
def test_json_has_the_points_of_the_picture(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, _ = _leave(capsys, *ONE_MODE, "--tensors", "4M", "--json", "--curve", str(tmp_path / "curve.png"))
    record = json.loads(out)
    assert code == 0
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    ((plain, nothing),) = record["curve"]["plain PyTorch"]
    points = record["curve"]["lowmem"]
    assert nothing == 0.0
    assert record["predicted"]["peak_allocated_bytes"] <= record["budget_bytes"] == 4 << 20 < plain
    assert all(less < more and slower > faster for (less, slower), (more, faster) in pairwise(points))
    # The plan is on the curve: no point that takes as little costs less.
    assert min(cost for size, cost in points if size <= 4 << 20) <= record["predicted"]["overhead"] + 0.01


@pytest.mark.parametrize(
    ("tensors", "link", "said"),
    [
        ("5200K", "auto", "2 MiB of what it keeps wait in host memory (up to 64 MiB may), at 12 GB/s each way,"),
        ("5200K", "auto", "beside the computing, which never stands still for that."),
        ("4500K", "auto", "beside the computing, which stands still for that for 5."),
        ("5200K", "0.3", "Host memory is not used: no plan with 64 MiB of it, at 0.3 GB/s each way, is faster."),
        ("40M", "auto", "Host memory is not used: the step fits without it."),
    ],
)
def test_what_waits_in_host_memory(capsys: pytest.CaptureFixture[str], tensors: str, link: str, said: str) -> None:
    asked = (*ONE_MODE, "--tensors", tensors, "--set", "memory.host=64M", "--set", f"memory.link={link}")
    code, out, _ = _leave(capsys, *asked, "--set", "memory.allow_accumulation=false")
    assert code == 0
    assert said in out
    assert ("+host" in out) == ("wait in host memory meanwhile" in out) == ("not used" not in out)


def test_json_and_picture_have_what_waits_in_host_memory(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    asked = (*ONE_MODE, "--tensors", "4500K", "--json", "--curve", str(tmp_path / "curve.png"))
    _, out, _ = _leave(capsys, *asked, "--set", "memory.host=64M", "--set", "memory.allow_accumulation=false")
    record = json.loads(out)
    assert record["predicted"]["host_bytes"] == 2304 << 10
    waiting, transfer = record["predicted"]["waiting_seconds"], 2 * (2304 << 10) / 12e9  # both ways, at the card's rate
    assert 0 < waiting < 0.1 * record["predicted"]["step_seconds"]
    assert record["predicted"]["hidden_share"] == pytest.approx(1 - waiting / transfer)
    alone, there = record["curve"]["lowmem"], record["curve"]["lowmem with host memory"]
    fastest = [min((other for size, other in alone if size <= peak), default=inf) for peak, _ in there]
    assert all(cost <= other + 1e-9 for (_, cost), other in zip(there, fastest, strict=True))
    assert there[0][0] < alone[0][0]  # gradients may wait there too
    assert any(cost < 0.9 * other < inf for (_, cost), other in zip(there, fastest, strict=True))


def test_what_the_processor_must_not_run_is_planned_for_a_card_only(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("--set", "train.device=cpu", "--memory-format", "channels-last", "--precision", "fp32")
    code, out, err = _leave(capsys, *asked, "--tensors", "4M")
    assert (code, out) == (3, "")
    assert "corrupts memory on the CPU" in err
    code, out, _ = _leave(capsys, *asked, "--card", "gtx1060-6g")
    assert code == 0
    assert "channels-last" in out


def test_what_fits_nowhere_is_two_lines_and_code_4(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = _leave(capsys, *ONE_MODE, "--tensors", "100K", "--json")
    assert code == 4
    sides, ways_out = err.strip().splitlines()
    least = json.loads(out)["infeasible"]["least_bytes"]
    assert (
        sides
        == f"lowmem: no plan fits: a step's tensors take at least {format_size(least)}, and 100 KiB are left for them"
    )
    # Not even the parameters fit, so that no batch can help, and only the smallest one is looked at.
    assert json.loads(out)["infeasible"]["what"].startswith(
        "tried: fp32 at batch 32 in micro-batches of 8; at its peak"
    )
    assert "lower --batch" not in ways_out
    typed = re.search(r"give (--tensors \w+) or more", ways_out)
    assert typed, ways_out
    code, _, err = _leave(capsys, *ONE_MODE, *typed[1].split())
    assert code == 0, err


def test_what_fits_nowhere_is_printed_when_the_live_line_is_gone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def closing_loudly(stream: str) -> Iterator[Observer]:
        with observer(stream) as shown:
            try:
                yield shown
            finally:
                print("gone")

    monkeypatch.setattr("lowmem.cli.show.observer", closing_loudly)
    code, out, _ = _leave(capsys, *ONE_MODE, "--tensors", "100K", "--json")
    first, _, rest = out.partition("\n")
    assert (code, first) == (4, "gone")
    assert "infeasible" in json.loads(rest)


def test_a_picture_of_no_known_kind_is_refused_before_anything_is_planned(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lowmem.choose.decide.decide", lambda *_, **__: pytest.fail("planned"))
    for name in ("curve.bmp", "curve", "curve.png.gz"):
        code, out, err = _leave(capsys, *ONE_MODE, "--tensors", "4M", "--curve", str(tmp_path / name))
        assert (code, out) == (2, "")
        assert ".png, .jpg, .jpeg, .svg, .pdf" in err
    assert not list(tmp_path.iterdir())


def test_a_plan_for_a_narrow_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    code, out, _ = _leave(capsys, *ONE_MODE, "--card", "gtx1060-6g")
    assert code == 0
    assert max(map(len, out.splitlines())) <= 40
    assert "123 MiB" in out


def test_a_picture_that_cannot_be_written(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, _, err = _leave(capsys, *ONE_MODE, "--tensors", "4M", "--curve", str(tmp_path / "none" / "curve.png"))
    assert code == 3
    assert "another path" in err


def test_a_memory_is_a_cards_also_without_one(capsys: pytest.CaptureFixture[str]) -> None:
    said = [_leave(capsys, *ONE_MODE, "--vram", "1G", *card) for card in ((), ("--card", "gtx1060-6g"))]
    (code, bare, _), (_, named, _) = said
    assert code == 0
    assert "a card like the GTX 1060 6G, as no --card is given" in bare
    assert bare.splitlines()[3:] == named.splitlines()[3:]  # all but whose memory it is
