"""What is wrong with this machine for a training run, and the command that mends it.

`gather` collects `Facts` once; the checks are pure functions of them. What may crash (torch, torchvision, the card) is
asked in a process of its own, so that the doctor outlives its patient. Nothing here imports torch.
"""

from lowmem.doctor.checks import can_start, examine
from lowmem.doctor.facts import Facts, Finding, Status
from lowmem.doctor.gather import gather

__all__ = ["Facts", "Finding", "Status", "can_start", "examine", "gather"]
