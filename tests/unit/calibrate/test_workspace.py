"""Workspaces inside the simulated step: counted while a convolution runs, and nowhere else."""

from __future__ import annotations

import json

import torch

from lowmem.calibrate.calibration import Calibration
from lowmem.calibrate.calibrator import Workspaces
from lowmem.calibrate.device import cpu_identity
from lowmem.calibrate.measuring import call_of
from lowmem.choose.costs import calls_of, measure_costs
from lowmem.choose.request import card_rates
from lowmem.config.cards import load_card
from lowmem.core.units import MIB
from lowmem.models import skeleton
from lowmem.plan.policy import SAVE_ALL
from lowmem.simulate import Call, Kind, StepShape, simulate_step

MODEL = skeleton("res20", "basic", width=4)
SHAPE = (8, 3, 32, 32)
RATES = card_rates(load_card("gtx1060-6g"))("fp32")


def _calls() -> set[Call]:
    return calls_of(MODEL, input_shape=SHAPE, memory_format=torch.contiguous_format, low=None)


def _step(workspace=None):
    shape = StepShape(
        model=MODEL,
        image_shape=(3, 32, 32),
        batch=8,
        micro_batch=8,
        precision="fp32",
        memory_format="contiguous",
    )
    return simulate_step(shape, None, RATES, workspace=workspace)


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
    bare, with_it = (measure_costs(MODEL, input_shape=SHAPE, workspace=w) for w in (None, Workspaces(known, None)))
    for before, after in zip(bare.stages[1:-1], with_it.stages[1:-1], strict=True):
        assert before.fast_temp_bytes < after.fast_temp_bytes <= before.fast_temp_bytes + 5 * MIB
        for was, now in zip(before.options, after.options, strict=True):
            assert was.kept_bytes == now.kept_bytes
            if was.option.policy == SAVE_ALL and not was.option.last:
                assert was.backward_temp_bytes < now.backward_temp_bytes <= was.backward_temp_bytes + 5 * MIB


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
