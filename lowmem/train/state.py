"""What a run is made of between two steps, and its way into a checkpoint and back, bit for bit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowmem.config.schema import OPERATIONAL, Config, flatten
from lowmem.core.errors import CorruptCheckpoint
from lowmem.core.reading import shorten
from lowmem.distributed.group import Group
from lowmem.runs.checkpoint import Checkpoint
from lowmem.runs.checkpoint_state import RunState, read_state

_SLOT = "momentum_buffer"  # all that SGD keeps of a parameter


_LATER_DEFAULTS = (
    ("train.sync_bn", False),
    ("train.deterministic", True),
    ("train.tf32", "auto"),
    ("train.batch_norm", "auto"),
)


def config_hash(config: Config) -> str:
    """SHA-256 of the settings that define what is computed: a checkpoint of another run is not taken for this one's.

    A setting that came later counts only where it is not at its default: runs from before it stay the same runs."""
    exact = {
        key: value
        for key, value in flatten(config).items()
        if key not in OPERATIONAL and (key, value) not in _LATER_DEFAULTS
    }
    return hashlib.sha256(json.dumps(exact, sort_keys=True).encode()).hexdigest()


def cpu_copy(tensor: Tensor) -> Tensor:
    """A contiguous copy in host memory, on the CPU too: training goes on changing the original in place."""
    tensor = tensor.detach()
    if tensor.device.type == "cpu":
        return tensor.clone(memory_format=torch.contiguous_format)
    return tensor.cpu().contiguous()  # the memory format is changed on the host, where there is room


def check_belongs(checkpoint: Checkpoint, identity: Mapping[str, str]) -> RunState:
    """Its state. Raises CorruptCheckpoint unless that is a run's, of just these settings and data (what `identity`
    names)."""
    state = read_state(checkpoint.state, checkpoint.step)
    recorded = checkpoint.state["identity"]
    for key, value in identity.items():
        if recorded.get(key) != value:
            raise CorruptCheckpoint(
                f"the checkpoint of step {checkpoint.step} was made with other {key} than this run has now: "
                f"restore the run's own files, or start another run"
            )
    return state


def check_position(state: RunState, steps_per_epoch: int) -> None:
    """Raises CorruptCheckpoint for a place that a run of epochs of `steps_per_epoch` never comes to."""
    if state.step_in_epoch > steps_per_epoch or state.step != state.epoch * steps_per_epoch + state.step_in_epoch:
        raise CorruptCheckpoint(
            f"the checkpoint is at step {state.step}, which is not epoch {state.epoch} and {state.step_in_epoch} steps "
            f"of {steps_per_epoch} an epoch: restore the run's own files, or start another run"
        )


def cpu_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the state dict on the CPU, contiguous as safetensors wants them."""
    return {name: cpu_copy(tensor) for name, tensor in model.state_dict().items()}


def capture(
    state: RunState,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    identity: dict[str, str],
) -> Checkpoint:
    """Everything a resume needs, copied: training may go on.

    `identity`: hashes of settings and data, compared by `restore`.
    """
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    slots: dict[str, Tensor] = {}
    for parameter, entries in optimizer.state.items():
        for slot, value in entries.items():
            if isinstance(value, Tensor):
                slots[f"{slot}/{names[parameter]}"] = cpu_copy(value)
    recorded = asdict(replace(state, scaler=scaler.state_dict()))
    return Checkpoint(
        step=state.step, model=cpu_tensors(model), optimizer=slots, state={"run": recorded, "identity": identity}
    )


def restore(
    checkpoint: Checkpoint,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    identity: dict[str, str],
) -> RunState:
    """Puts a checkpoint back into model, optimizer and scaler, in their devices and memory formats.

    Raises CorruptCheckpoint if it is of other settings, other data or another network.
    """
    state = check_belongs(checkpoint, identity)
    _load_tensors(dict(model.state_dict()), checkpoint.model, "model")
    parameters = dict(model.named_parameters())
    if checkpoint.optimizer and len(checkpoint.optimizer) != len(parameters):
        raise CorruptCheckpoint(
            f"the optimizer state of step {checkpoint.step} is of {len(checkpoint.optimizer)} parameters, the network "
            f"has {len(parameters)}"
        )
    for key, tensor in checkpoint.optimizer.items():
        slot, _, name = key.partition("/")
        if slot != _SLOT or name not in parameters or parameters[name].shape != tensor.shape:
            raise CorruptCheckpoint(f"the optimizer state {shorten(key)!r} belongs to another network")
        mirror = torch.empty_like(parameters[name])  # the parameter's device and memory format
        mirror.copy_(tensor)
        optimizer.state[parameters[name]][slot] = mirror
    if scaler.is_enabled() and state.scaler:
        scaler.load_state_dict(state.scaler)
    return state


@torch.no_grad()
def _load_tensors(into: dict[str, Tensor], tensors: Any, what: str) -> None:
    if set(into) != set(tensors):
        odd = sorted(set(into) ^ set(tensors))[0]
        raise CorruptCheckpoint(
            f"the {what} of the checkpoint is another network's: {shorten(odd)!r} is on one side only"
        )
    for name, tensor in into.items():
        if tensor.shape != tensors[name].shape or tensor.dtype != tensors[name].dtype:
            raise CorruptCheckpoint(
                f"{name} is {list(tensors[name].shape)} in the checkpoint and {list(tensor.shape)} in the network"
            )
        tensor.copy_(tensors[name])


def share_checkpoint(group: Group, found: tuple[Checkpoint, Path] | None) -> tuple[Checkpoint, Path] | None:
    """What rank 0 has read, in every process: on other machines there may be no such files."""
    if group.alone:
        return found
    head = group.share(None if found is None else [found[0].step, dict(found[0].state), str(found[1])])
    if head is None:
        return None
    step, state, path = head
    model = group.share_tensors(None if found is None else found[0].model)
    optimizer = group.share_tensors(None if found is None else found[0].optimizer)
    return Checkpoint(step, model, optimizer, state), Path(path)
