"""Executes a plan on any chain of blocks: same gradients, less memory."""

from lowmem.remat.module import PlannedModule, apply_plan, check_plan, decompose, stage_names, traced_chain

__all__ = ["PlannedModule", "apply_plan", "check_plan", "decompose", "stage_names", "traced_chain"]
