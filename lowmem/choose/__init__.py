"""From what is asked and what the machine has to what is done: device, precision, memory format."""

from lowmem.choose.execution import resolve_execution

__all__ = ["resolve_execution"]
