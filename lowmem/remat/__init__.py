"""Executes a plan on any chain of blocks: same gradients, less memory."""

from lowmem.remat.module import PlannedModule, apply_plan, check_plan, decompose, runs_whole, stage_names

__all__ = ["PlannedModule", "apply_plan", "check_plan", "decompose", "runs_whole", "stage_names"]
