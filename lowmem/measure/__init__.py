"""Observes bytes and seconds: what is unknown is None, and each figure says what it is of."""

from lowmem.measure.meter import Meter
from lowmem.measure.nvml import DriverReport, read_driver
from lowmem.measure.snapshot import Snapshot, who_holds

__all__ = ["DriverReport", "Meter", "Snapshot", "read_driver", "who_holds"]
