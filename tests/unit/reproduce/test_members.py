"""Which runs a job has, and which are asked for."""

from __future__ import annotations

import pytest

from lowmem.config.schema import BLOCK_LAYOUT
from lowmem.core.errors import UsageError
from lowmem.reproduce.members import ALL, REPORTED, select


def names(only: str | None = None, block: str | None = None) -> list[str]:
    return [member.name for member in select(only, block)]


def test_the_six_and_the_two() -> None:
    assert names() == names(block="basic") == ["res20", "cnn20", "res56", "cnn56", "res110", "cnn110"]
    assert names(block="bottleneck") == [*names(), "res56-bottleneck", "res110-bottleneck"]
    assert len(REPORTED) == 6
    for member in ALL:
        assert (int(member.arch[3:]), member.block) in BLOCK_LAYOUT


def test_only_these_in_the_jobs_order() -> None:
    assert names("cnn110, res20") == ["res20", "cnn110"]
    assert names("res20,res20,") == ["res20"]
    assert names("res56-bottleneck") == ["res56-bottleneck"]
    assert names("res20", "bottleneck") == ["res20", "res56-bottleneck", "res110-bottleneck"]


@pytest.mark.parametrize(("only", "block"), [("res21", None), ("", None), (",", None), (None, "wide"), ("RES20", None)])
def test_what_there_is_not(only: str | None, block: str | None) -> None:
    with pytest.raises(UsageError, match="res56-bottleneck"):
        select(only, block)
