"""Observes bytes: what is unknown is None, and each figure says what it is of."""

from lowmem.measure.meter import Meter, Snapshot

__all__ = ["Meter", "Snapshot"]
