"""Messages that carry both sides."""

from __future__ import annotations

from lowmem.core.errors import ExitCode, Infeasible
from lowmem.core.units import MIB


def test_infeasible_shows_two_different_sizes() -> None:
    far = Infeasible(4 * MIB, 6 * MIB, "at its peak", "lower --batch")
    assert str(far) == "no plan fits: the budget is 4 MiB, the least that fits is 6 MiB (at its peak): lower --batch"
    near = Infeasible(4 * MIB, 4 * MIB + 512, "at its peak", "lower --batch")
    assert "the budget is 4,194,304 B, the least that fits is 4,194,816 B" in str(near)
    assert near.exit_code is ExitCode.NO_PLAN
