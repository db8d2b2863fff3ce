"""Who of several processes says what all of them failed with."""

from __future__ import annotations

from typing import Any

import pytest

from lowmem.core.errors import ExitCode, Interrupted, PeerError, PeerLost, UsageError
from lowmem.distributed.group import Group


class Second(Group):
    rank, size, alone = 1, 2, False


def _fail(group: Group, error: Exception) -> None:
    with group.alike():
        raise error


def test_rank_0_says_it_in_its_own_words() -> None:
    error = UsageError("no such folder")
    with pytest.raises(UsageError) as raised:
        _fail(Group(), error)
    assert raised.value is error


@pytest.mark.parametrize("error", [UsageError("no such folder"), Interrupted("SIGINT: saved", ExitCode.INTERRUPTED)])
def test_the_others_leave_with_its_code_and_change_nothing_of_it(error: Any) -> None:
    before = dict(vars(error))
    with pytest.raises(PeerError, match=str(error)) as raised:
        _fail(Second(), error)
    assert raised.value.exit_code == error.exit_code
    assert vars(error) == before


@pytest.mark.parametrize("error", [PeerLost("gone"), RuntimeError("a bug of this process alone")])
def test_what_is_one_process_own_stays_as_it_is(error: Exception) -> None:
    with pytest.raises(type(error)) as raised:
        _fail(Second(), error)
    assert raised.value is error
