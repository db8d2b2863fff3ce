"""The weights that a run begins with where they are not new: read from a file, and put into a network as far as names
and shapes are the same.

Nothing of a file is run: it is safetensors, or what torch saves, read with `weights_only`, which makes nothing but
tensors and containers of them. A file that is more than that is refused.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import torch
from torch import Tensor, nn

from lowmem.config.networks import split_spec
from lowmem.core.errors import PreflightError, first_line
from lowmem.core.reading import shorten
from lowmem.core.units import aligned
from lowmem.models.source import of_torchvision

_PREFIXES = ("module.", "model.", "module.model.", "_orig_mod.")  # DataParallel, Lightning, both, torch.compile
_WRAPPED = ("state_dict", "model_state_dict", "model")  # where training scripts put it, beside an optimizer's and more
_MOST_NAMED = 6


@dataclass(frozen=True)
class InitialWeights:
    """Tensors by name, on the CPU, and SHA-256 of the file that they are from."""

    file: Path
    sha256: str
    tensors: Mapping[str, Tensor]


def read_initial(file: Path) -> InitialWeights:
    """Of a .safetensors file, or of one that `torch.save` made of a state dict. Raises PreflightError."""
    way_out = "give --init a .safetensors file, or a .pt or .pth of a state dict alone"
    try:
        data = file.read_bytes()  # once: what is hashed is what is read
    except OSError as error:
        raise PreflightError(f"the weights {file} cannot be read ({error.strerror or error}): {way_out}") from None
    try:
        if file.suffix == ".safetensors" or data[8:9] == b"{":  # what torch writes begins otherwise
            from safetensors.torch import load

            loaded: object = load(data)
        else:
            loaded = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:
        # What torch has to say is how to run what is in it.
        odd = isinstance(error, pickle.UnpicklingError)
        why = "it cannot be read, or wants code run" if odd else shorten(first_line(error), 200)
        raise PreflightError(
            f"{file} is no file of weights alone, and nothing else is run ({why}): {way_out}"
        ) from None
    for key in _WRAPPED:
        inner = loaded.get(key) if isinstance(loaded, Mapping) else None
        loaded = inner if isinstance(inner, Mapping) else loaded
    items = loaded.items() if isinstance(loaded, Mapping) else ()
    tensors = {str(name): one.detach().contiguous() for name, one in items if isinstance(one, Tensor)}
    if not tensors:
        raise PreflightError(f"{file} holds no tensors by name: {way_out}")
    return InitialWeights(file, hashlib.sha256(data).hexdigest(), tensors)


def pretrained_file(spec: str, phase: Callable[[str], object]) -> Path:
    """Of torchvision's DEFAULT weights of its network, in torch hub's cache, downloaded where they are missing; what is
    there already is taken as it is, as torch hub does. Raises UsageError for a network that it has not,
    PreflightError."""
    from torchvision.models import get_model_weights

    name = split_spec(spec)[1]
    of_torchvision(name)
    url = str(get_model_weights(name).DEFAULT.url)  # all that classify have some
    file = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlsplit(url).path).name
    if not file.is_file():
        phase(f"downloading {url}")
        begins = re.search(r"-([0-9a-f]{8,})\.", file.name)  # how its hash does
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(file), begins and begins[1], progress=False)
        except (OSError, RuntimeError) as error:
            raise PreflightError(
                f"{url} cannot be downloaded ({shorten(first_line(error), 200)}): put that file at {file}, or leave "
                "out --init"
            ) from None
    return file


@dataclass(frozen=True)
class Placed:
    """What became of the weights, by names of the network's tensors, `unused` by the file's. `stripped`: what all names
    of the file begin with beside the network's."""

    loaded: tuple[str, ...]
    reshaped: tuple[str, ...]  # another shape in the file
    missing: tuple[str, ...]
    unused: tuple[str, ...]
    stripped: str = ""

    def lines(self) -> list[str]:
        """A short table: what, how many, which."""
        rows = [("loaded", self.loaded), ("of another shape there: new", self.reshaped)]
        rows += [("not there: new", self.missing), ("there, but not in the network", self.unused)]
        cells = [(f"  {what}", str(len(names)), _parts(names)) for what, names in rows if names]
        said = [f"  every name there begins with {self.stripped!r}, which was taken off"] if self.stripped else []
        return [*aligned(cells, right={1}), *said]


def _parts(names: Iterable[str]) -> str:
    """The modules of these tensors, or what they are in if these are many."""
    modules = list(dict.fromkeys(name.rpartition(".")[0] or name for name in names))
    if len(modules) > _MOST_NAMED:
        modules = list(dict.fromkeys(name.partition(".")[0] for name in names))
    return shorten(", ".join(modules), 100)


@torch.no_grad()
def place(tensors: Mapping[str, Tensor], model: nn.Module, source: str) -> Placed:
    """Copies tensors into the network's of the same name and shape, on whatever device and in whatever memory format
    these are. All others stay as they are. Raises PreflightError if there are none of the same."""
    into = model.state_dict()
    all_begin_with = (
        one for one in _PREFIXES if all(name.startswith(one) and name.removeprefix(one) in into for name in tensors)
    )
    prefix = next(all_begin_with, "")
    given = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    there = [name for name in into if name in given]
    loaded = [name for name in there if given[name].shape == into[name].shape]
    if not loaded:
        raise PreflightError(
            f"nothing of {source} fits this network: it has names like {shorten(next(iter(tensors)))!r}, the network "
            f"like {next(iter(into), '')!r}: give --init weights of this network"
        )
    for name in loaded:
        into[name].copy_(given[name])
    return Placed(
        loaded=tuple(loaded),
        reshaped=tuple(name for name in there if given[name].shape != into[name].shape),
        missing=tuple(name for name in into if name not in given),
        unused=tuple(name for name in given if name not in into),
        stripped=prefix,
    )
