"""Tensors of one pass through the chain that wait in host memory between forward and backward, and gradients of
parameters that wait there until the backward is over; and when they move: as the schedule says
(`lowmem.plan.policy.Host`)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from lowmem.measure.outline import is_outline
from lowmem.plan.policy import GRADS, OUTPUT, Host
from lowmem.remat.links import ALIGNMENT_BYTES, HostLink, OutlineLink, Ticket, cpu_link, fills_its_memory
from lowmem.remat.links_cuda import cuda_link
from lowmem.remat.operation import has_hooks


def link_for(x: Tensor) -> HostLink:
    """Of a tensor's device."""
    if is_outline(x):
        return OutlineLink()
    if x.device.type == "cuda":
        return cuda_link(x.device.index or 0)
    return cpu_link()


class Holder(Protocol):
    """Of an item of the schedule: its input and what its stage keeps, by number."""

    x: Tensor | None
    saved: list[Any]


def grad_may_wait(parameter: Tensor) -> bool:
    """Whether a parameter's gradient is `.grad` alone, from when it is complete, and worth moving."""
    alone = parameter.requires_grad and parameter.is_leaf and not has_hooks(parameter)
    return alone and parameter.nbytes >= ALIGNMENT_BYTES


@dataclass(eq=False)
class _Gradient:
    """Holds what waits as the parameter's."""

    parameter: Tensor
    saved: list[Any] = field(default_factory=list)

    @property
    def x(self) -> Tensor | None:
        return self.parameter.grad

    @x.setter
    def x(self, grad: Tensor | None) -> None:
        self.parameter.grad = grad


@dataclass(eq=False)
class _Move:
    ticket: Ticket
    host: Host
    holder: Holder | None  # None: the entry is not made yet whose input it is
    at: int | None  # among its kept values; None: its input
    begun: bool = False

    def free(self) -> None:
        """The device's tensor, as soon as it has left."""
        self.ticket.sent.wait()
        self.ticket.device = None
        assert self.holder is not None
        if self.at is None:
            self.holder.x = None
        else:
            self.holder.saved[self.at] = None


@dataclass(eq=False)
class Traffic:
    """What one pass through the chain has on the way, or waiting."""

    link: HostLink
    _leaving: list[_Move] = field(default_factory=list)
    _away: list[_Move] = field(default_factory=list)  # in the order in which they left
    _grads: list[_Move] = field(default_factory=list)  # leaving or away

    def ran(self, end: int, hosts: tuple[Host, ...], holder: Holder, values: dict[str, int], y: Tensor | None) -> None:
        """An item has run forward, whose last stage is `end`; what is planned to leave begins to, and what has left by
        now is freed. `values`: numbers of what may."""
        for move in self._leaving:
            if move.holder is None:
                move.holder = holder
        for host in hosts:
            for name in sorted(host.names):
                if name == OUTPUT:
                    assert y is not None
                    self._leaving.append(_Move(self.link.send(y), host, None, None))
                elif name in values and holder.saved[values[name]] is not None:
                    at = values[name]
                    self._leaving.append(_Move(self.link.send(holder.saved[at]), host, holder, at))
        for move in [move for move in self._leaving if move.host.gone <= end]:
            move.free()
            self._away.append(move)
            self._leaving.remove(move)

    def completed(self, hosts: tuple[Host, ...], parameters: Iterable[Tensor]) -> None:
        """The backward of an item is over; its parameters' gradients leave if that is planned."""
        for host in hosts:
            for one in parameters if GRADS in host.names else ():
                if fills_its_memory(one.grad):
                    assert one.grad is not None
                    self._grads.append(_Move(self.link.send(one.grad), host, _Gradient(one), None))

    def reaches(self, end: int, holder: Holder) -> None:
        """The backward comes to the item whose last stage is `end`: what is planned to come back from here on begins
        to, and what the item needs is there."""
        for move in self._grads:
            if move.host.gone >= end and move.ticket.device is not None:
                move.free()
        for move in (*reversed(self._away), *self._grads):
            if move.host.back >= end and not move.begun:
                self._begin(move)
        self.bring(holder)

    def finish(self) -> None:
        """The backward is over: gradients are there again, and nothing moves."""
        away = [move for move in self._grads if move.ticket.device is None]
        for move in away:
            if not move.begun:
                self._begin(move)
        for move in away:
            assert move.holder is not None
            move.holder.x = self.link.take(move.ticket)
            self._grads.remove(move)
        self.abandon()  # what no gradient reached

    def bring(self, holder: Holder) -> None:
        """What the holder has away is there."""
        for move in [move for move in self._away if move.holder is holder]:
            if not move.begun:
                self._begin(move)
            tensor = self.link.take(move.ticket)
            self._away.remove(move)
            if move.at is None:
                holder.x = tensor
            else:
                holder.saved[move.at] = tensor

    def _begin(self, move: _Move) -> None:
        move.begun = True
        self.link.fetch(move.ticket)

    def abandon(self) -> None:
        """After an error, or where no backward came: nothing moves any more, and the slabs are free."""
        if moves := [*self._leaving, *self._away, *self._grads]:
            self.link.abandon([move.ticket for move in moves])
            self._leaving, self._away, self._grads = [], [], []

    def __del__(self) -> None:
        self.abandon()
