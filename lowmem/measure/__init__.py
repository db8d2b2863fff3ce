"""Observes bytes and seconds: what is unknown is None, and each figure says what it is of."""

from lowmem.measure.holders import who_holds
from lowmem.measure.meter import Meter, Snapshot
from lowmem.measure.nvml import DriverReport, read_driver

__all__ = ["DriverReport", "Meter", "Snapshot", "read_driver", "who_holds"]
