"""Links to host memory under what happens to programs: interrupts, forks, threads, the garbage collector, the end."""

from __future__ import annotations

import copy
import ctypes
import gc
import os
import pickle
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowmem.models.resnet import Bottleneck
from lowmem.plan.policy import LEAN, OUTPUT, Host, Keep, Schedule
from lowmem.remat import PlannedModule, apply_plan, decompose
from lowmem.remat.links import Arena, CpuLink, Passing, Slab
from tests.exact.compare import pictures, small_net, training

SLOW = 5e6  # bytes per second, of which a step has about one million on the way


def all_away(seed: int = 0) -> tuple[PlannedModule, PlannedModule]:
    """A module without host memory, and its copy: the outputs of its blocks wait there, until they are needed."""
    model = small_net(Bottleneck)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(seed * 0.01)
    count = len(decompose(model))
    items = [Keep(k, LEAN) for k in range(count)]
    away = [Keep(k, LEAN, (Host(frozenset({OUTPUT}), k + 1, k + 1),)) for k in range(count - 2)]
    bare, hosting = Schedule(tuple(items)), Schedule((*away, *items[count - 2 :]))
    return apply_plan(copy.deepcopy(model), bare), apply_plan(model, hosting)


def grads(planned: PlannedModule, seed: int = 1) -> list[Tensor]:
    planned.zero_grad()
    training(*pictures(seed=seed))(planned)
    return [parameter.grad for parameter in planned.parameters() if parameter.grad is not None]


def same(ours: list[Any], theirs: list[Any]) -> bool:
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


def in_use(arena: Arena) -> int:
    return arena.bytes - sum(slab.size for free in arena._free.values() for slab in free)


class Interrupted(CpuLink):
    """Whose waits, one of them, is interrupted while the copy goes on."""

    def __init__(self, at: int) -> None:
        super().__init__(SLOW)
        self.left, self.copies = at, list[threading.Event]()

    def copy_out(self, tensor: Tensor, slab: Slab) -> Passing:
        return self._watched(super().copy_out(tensor, slab))

    def copy_back(self, slab: Slab, tensor: Tensor) -> Passing:
        return self._watched(super().copy_back(slab, tensor))

    def _watched(self, done: Any) -> Passing:
        link, wait = self, done.wait
        self.copies.append(done)

        class Watched:
            def wait(self) -> None:
                link.left -= 1
                if link.left == 0:
                    raise KeyboardInterrupt
                wait()

        return Watched()


@pytest.mark.parametrize("at", [1, 3, 5, 6, 8, 10])
def test_after_an_interrupt_nothing_moves_and_all_slabs_are_free(at: int) -> None:
    bare, hosting = all_away()
    hosting.lowmem.link = link = Interrupted(at)
    with pytest.raises(KeyboardInterrupt):
        grads(hosting)
    assert link.copies
    assert all(one.is_set() for one in link.copies)
    assert in_use(link.arena) == 0
    assert same(grads(bare), grads(hosting))


def test_threads_that_train_share_a_link() -> None:
    link, wrong = CpuLink(), list[int]()

    def train(seed: int) -> None:
        bare, hosting = all_away(seed)
        hosting.lowmem.link = link
        wrong.extend(number for number in range(3) if not same(grads(bare, number), grads(hosting, number)))

    threads = [threading.Thread(target=train, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert in_use(link.arena) == 0


def test_the_rate_holds_over_many_copies() -> None:
    link, tensor = CpuLink(50e6), torch.zeros(1 << 16)
    slabs = [link.arena.take(tensor.nbytes) for _ in range(40)]
    began = time.perf_counter()
    copies = [link.copy_out(tensor, slab) for slab in slabs]
    copies[-1].wait()
    took, expected = time.perf_counter() - began, 40 * tensor.nbytes / 50e6
    assert expected <= took < 1.5 * expected


def test_no_host_memory_is_out_of_memory() -> None:
    with pytest.raises(MemoryError, match="no host memory for 4611686018427387904 bytes"):
        Arena().take(1 << 62)


def test_the_garbage_collector_may_come_by_in_the_thread_that_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    _, hosting = all_away()
    hosting.lowmem.link = link = CpuLink()
    move = ctypes.memmove
    gc.collect()
    gc.disable()
    try:
        loop: list[Any] = [hosting(pictures()[0])]
        loop.append(loop)
        assert in_use(link.arena) > 0
        del loop

        def collecting(*args: int) -> None:
            gc.collect()
            move(*args)

        with monkeypatch.context() as changed:
            changed.setattr(ctypes, "memmove", collecting)
            slab = link.arena.take(8)
            done = link.copy_out(torch.zeros(2), slab)
            assert done.wait(30)
    finally:
        gc.enable()
    link.drain()
    link.arena.give_back(slab)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_have_a_link_of_their_own(copied: Any) -> None:
    bare, hosting = all_away()
    hosting.lowmem.link = CpuLink(SLOW)
    made = copied(hosting)
    assert made.lowmem.link is None
    assert made.lowmem.schedule.hosts
    assert same(grads(bare), grads(made))


def test_torch_compile_of_what_holds_it_leaves_it_as_it_is() -> None:
    class Holder(nn.Module):
        def __init__(self, planned: nn.Module) -> None:
            super().__init__()
            self.planned = planned

        def forward(self, x: Tensor) -> Tensor:
            return self.planned(2 * x) / 2

    found = []
    for planned in all_away():
        holder = Holder(planned)
        for run in (holder, torch.compile(holder, backend="eager", dynamic=True)):
            planned.zero_grad()
            training(*pictures())(run)
            found.append([parameter.grad for parameter in planned.parameters()])
    assert all(same(found[0], other) for other in found[1:])


_FORKS = """
import os, sys, torch
from torch.utils.data import DataLoader, TensorDataset
from lowmem.remat.links import CpuLink
from tests.exact.compare import pictures, training
from tests.unit.remat.test_links import SLOW, all_away, grads, same
torch.set_num_threads(1)
bare, hosting = all_away()
hosting.lowmem.link = CpuLink(SLOW)
expected = grads(bare)
x, labels = pictures()
loss = torch.nn.functional.cross_entropy(hosting(x), labels)
for _ in DataLoader(TensorDataset(x), num_workers=2, multiprocessing_context="fork"):
    pass
child = os.fork()
loss.backward()  # in both: each has what waits
found = [parameter.grad for parameter in hosting.parameters()]
right = same(expected, found) and same(expected, grads(hosting))
if child == 0:
    os._exit(not right)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, "the child"
assert right, "the parent"
y = hosting(x)  # whose tensors wait when the interpreter ends
print("end")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_processes_that_fork_and_end() -> None:
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", _FORKS], cwd=root, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "end\n"), done.stderr
    assert done.stderr == ""
