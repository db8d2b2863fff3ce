"""Messages that carry both sides."""

from __future__ import annotations

from lowmem.core.errors import ExitCode, Infeasible
from lowmem.core.units import MIB


def test_infeasible_shows_two_different_sizes() -> None:
    far = Infeasible(4 * MIB, 6 * MIB, "at its peak", "lower --batch")
    assert far.both_sides == "no plan fits: a step's tensors take at least 6 MiB, and 4 MiB are left for them"
    assert str(far) == f"{far.both_sides}: lower --batch"
    near = Infeasible(4 * MIB, 4 * MIB + 512, "at its peak", "lower --batch")
    assert "at least 4,194,816 B, and 4,194,304 B" in str(near)
    assert near.exit_code is ExitCode.NO_PLAN
