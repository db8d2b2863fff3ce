"""Tensors of one pass through the chain that wait in host memory between forward and backward, and when they move: as
the schedule says (`lowmem.plan.policy.Host`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from lowmem.measure.outline import is_outline
from lowmem.plan.policy import OUTPUT, Host
from lowmem.remat.links import HostLink, OutlineLink, Ticket, cpu_link
from lowmem.remat.links_cuda import cuda_link


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


@dataclass(eq=False)
class _Move:
    ticket: Ticket
    host: Host
    holder: Holder | None  # None: the entry is not made yet whose input it is
    at: int | None  # among its kept values; None: its input
    begun: bool = False


@dataclass(eq=False)
class Traffic:
    """What one pass through the chain has on the way, or waiting."""

    link: HostLink
    _leaving: list[_Move] = field(default_factory=list)
    _away: list[_Move] = field(default_factory=list)  # in the order in which they left

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
            move.ticket.sent.wait()
            move.ticket.device = None
            self._away.append(move)
            self._leaving.remove(move)
            assert move.holder is not None
            if move.at is None:
                move.holder.x = None
            else:
                move.holder.saved[move.at] = None

    def reaches(self, end: int, holder: Holder) -> None:
        """The backward comes to the item whose last stage is `end`: what is planned to come back from here on begins
        to, and what the item needs is there."""
        for move in reversed(self._away):
            if move.host.back >= end and not move.begun:
                self._begin(move)
        self.bring(holder)

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
        if moves := [*self._leaving, *self._away]:
            self.link.abandon([move.ticket for move in moves])
            self._leaving, self._away = [], []

    def __del__(self) -> None:
        self.abandon()
