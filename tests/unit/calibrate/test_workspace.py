"""Workspaces inside the simulated step: counted while a convolution runs, and nowhere else."""

from __future__ import annotations

import json

from lowmem.calibrate.calibrator import Calibration, Workspaces
from lowmem.calibrate.device import cpu_identity
from lowmem.calibrate.measuring import call_of
from lowmem.choose.costs import calls_of, measure_costs
from lowmem.choose.request import card_rates
from lowmem.config.cards import load_card
from lowmem.core.units import MIB
from lowmem.models import skeleton
from lowmem.plan.policy import SAVE_ALL
from lowmem.simulate import Call, Kind, simulate_step
from tests.step_shapes import shape_of

MODEL = skeleton("res20", "basic", width=4)
SHAPE = shape_of(MODEL, 8)
RATES = card_rates(load_card("gtx1060-6g"))("fp32")


def _calls() -> set[Call]:
    return calls_of(SHAPE)


def _step(workspace=None):
    return simulate_step(SHAPE, None, RATES, workspace=workspace)


def test_the_calls_of_a_chain_are_those_of_the_plain_step() -> None:
    """Autograd's own calls and the executor's are told apart by nothing but what the library chooses by."""
    seen: set[Call] = set()

    def note(call: Call) -> int:
        seen.add(call)
        return 0

    _step(note)
    assert seen == _calls()
    operations = {call.operation for call in seen}
    assert operations == {"aten.convolution.default", "aten.convolution_backward.default"}


def test_a_call_is_the_same_after_json() -> None:
    """As a process that measures it is told."""
    for call in _calls():
        assert call_of(json.loads(json.dumps([call.operation, call.tensors, call.rest]))) == call


def test_a_measured_workspace_is_part_of_the_step() -> None:
    table = Workspaces(Calibration(cpu_identity(), None), None)
    plain = _step(table).estimate
    assert plain.at_peak_bytes[Kind.WORKSPACE] == 0
    known = Calibration(cpu_identity(), None)
    for call in _calls():
        known.put("bytes", Workspaces(known, None).key(call), 5 * MIB)
    counted = _step(Workspaces(known, None)).estimate
    assert counted.at_peak_bytes[Kind.WORKSPACE] == 5 * MIB
    assert plain.peak_tensor_bytes < counted.peak_tensor_bytes <= plain.peak_tensor_bytes + 5 * MIB
    bare, with_it = (measure_costs(SHAPE, w) for w in (None, Workspaces(known, None)))
    for before, after in zip(bare.stages[1:-1], with_it.stages[1:-1], strict=True):
        assert before.fast_temp_bytes < after.fast_temp_bytes <= before.fast_temp_bytes + 5 * MIB
        for was, now in zip(before.options, after.options, strict=True):
            assert was.cost.kept_bytes == now.cost.kept_bytes
            if was.option.policy == SAVE_ALL and not was.option.last:
                assert (
                    was.cost.backward_temp_bytes
                    < now.cost.backward_temp_bytes
                    <= was.cost.backward_temp_bytes + 5 * MIB
                )


def test_an_unknown_call_counts_as_the_largest_of_its_kind() -> None:
    first, second, *_ = sorted((c for c in _calls() if "backward" in c.operation), key=repr)
    forward = next(c for c in _calls() if "backward" not in c.operation)
    known = Calibration(cpu_identity(), None)
    known.put("bytes", Workspaces(known, None).key(first), 7 * MIB)
    table = Workspaces(known, None)
    assert table(second) == 0
    assert table(first) == 7 * MIB
    assert table(second) == 7 * MIB
    assert table(forward) == 0
    assert table.missing == {second, forward}
