"""A trained network in one file for other programs, which says what it is: ONNX, TorchScript, or safetensors.

A graph takes any number of pictures at a time. It is traced; torch's other exporter of ONNX (`dynamo=True`) refuses
Swin in torch 2.7 and takes up to a minute where this one takes a second. Before a file is there it was loaded by the
program that reads it, and gave the network's logits on pictures.
"""

from __future__ import annotations

import io
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import lowmem
from lowmem.core import counter_rng as addressed
from lowmem.core.errors import DataError, PreflightError, UsageError, first_line
from lowmem.core.phases import Phase, untold
from lowmem.core.reading import shorten
from lowmem.core.units import counted, format_size
from lowmem.data import load
from lowmem.data.batches import Normalizer, as_seen
from lowmem.inference.loading import LoadedRun, load_run
from lowmem.runs.atomic import write_bytes_atomic
from lowmem.runs.checkpoint import disk_errors
from lowmem.runs.folder import refuse_unwritable
from lowmem.runs.weights import KEY

FORMATS = ("onnx", "torchscript", "safetensors")
TOLERANCE = 1e-4  # of the largest logit, or of 1 where that is smaller
INPUT, OUTPUT = "images", "logits"
_OPSET = 17  # of ONNX, of 2022: the first with layer norm as one operation
_PICTURES = 8  # compared, in batches of this size and of 1; traced are 2
_WAY_OUT = "give --out another path"

Compute = Callable[[Tensor], Tensor]  # pictures -> logits [N, classes]


def export(
    run: Path, form: str, out: Path, *, weights: str = "best", raw_uint8: bool = False, phase: Phase = untold
) -> list[str]:
    """Writes the network of a run, or of a file of weights, to `out`, and says in lines what is there. `weights`: as of
    `load_run`; `raw_uint8`: the graph takes bytes and normalises them itself.

    Raises UsageError, PreflightError for what cannot be written so, or gives other logits; DiskError; and what
    `load_run` raises. Then nothing is written."""
    _refuse(form, out, raw_uint8)
    loaded = load_run(run, weights, device="cpu")
    if form == "safetensors":  # the file says all of it already
        return [_write(out, loaded.weights.read_bytes())]
    images, words = _pictures(loaded, phase)
    network: nn.Module = _OfBytes(loaded.model, loaded.normalize) if raw_uint8 else loaded.model
    images = images if raw_uint8 else loaded.normalize(images)
    takes, metadata = _describe(loaded, images, raw_uint8)
    to_bytes, by_program, program = _OF_GRAPHS[form]
    said = loaded.weights if loaded.config is None else loaded.config.model.words
    way_out = "mend what depends on the number of pictures or on values in it, or take another --format"
    phase(f"writing {form}, and comparing in {program}")
    try:
        with _quietly(), torch.no_grad():
            data = to_bytes(network.eval(), images[:2], metadata)
            difference, most = _differ(network, by_program(data), images)
    except Exception as error:
        why = shorten(first_line(error))
        raise PreflightError(f"{said} cannot be written as {form} for {program} ({why}): {way_out}") from None
    if not difference <= most:
        raise PreflightError(
            f"{said} as {form} gives logits that differ by {difference:.2g} in {program} from the network's, on "
            f"{words}, and {most:.2g} is the most that may be: {way_out}"
        )
    figures = f"{difference:.2g} at the most, where {most:.2g} may be"
    return [_write(out, data), f"it takes {takes}", f"compared: logits differ by {figures}, in {program}, on {words}"]


def _write(out: Path, data: bytes) -> str:
    with disk_errors(out):
        write_bytes_atomic(out, data)
    return f"written: {out}, {format_size(len(data))}"


def _refuse(form: str, out: Path, raw_uint8: bool) -> None:
    """Before anything is loaded. Raises UsageError, PreflightError."""
    if form not in FORMATS:
        raise UsageError(f"there is no format {shorten(form)!r}: use --format {', '.join(FORMATS)}")
    if raw_uint8 and form == "safetensors":
        raise UsageError("safetensors holds weights and no graph that could normalise: leave --raw-uint8 out")
    if out.exists():
        raise UsageError(f"{out} exists, and is not replaced: {_WAY_OUT}")
    if not out.parent.is_dir():
        raise PreflightError(f"{out} cannot be written ({out.parent} is no folder): {_WAY_OUT}")
    refuse_unwritable(out, _WAY_OUT)
    if form == "onnx":
        _onnx_libraries()


def _onnx_libraries() -> tuple[Any, Any]:
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        raise PreflightError(
            f"--format onnx needs {error.name or 'onnx'}, which cannot be loaded ({first_line(error)}): "
            'pip install "lowmem[onnx]"'
        ) from None
    return onnx, onnxruntime


@contextmanager
def _quietly() -> Iterator[None]:
    """Without the warnings of the tracer, for the result is compared, and the graph that ONNX' exporter prints when it
    fails; and by operations one by one, where torch would fuse a layer of a transformer to one that ONNX has not."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


# -- what is written ---------------------------------------------------------------------------------------------------


class _OfBytes(nn.Module):
    """The network of uint8 [N, C, S, S], which are normalised by the operations of `Normalizer`."""

    shift: Tensor
    scale: Tensor

    def __init__(self, network: nn.Module, normalize: Normalizer) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("shift", normalize.shift)
        self.register_buffer("scale", normalize.scale)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network((images.to(torch.float32) - self.shift) * self.scale)
        return logits


def _describe(loaded: LoadedRun, images: Tensor, raw_uint8: bool) -> tuple[str, str]:
    """What the graph takes, in words; and the metadata, the JSON that the weights' file has, with that."""
    kind, as_what = ("uint8", "as they are") if raw_uint8 else ("float32", "(x / 255 - mean) / std by channel")
    colours = "RGB" if images.shape[1] > 1 else "grey"
    takes = f"{INPUT}: {kind} [N, {', '.join(map(str, images.shape[1:]))}], {colours}, {as_what}"
    told = {
        **loaded.info.model_dump(exclude_none=True),
        "prepared": loaded.how_prepared,
        "takes": takes,
        "gives": f"{OUTPUT}: float32 [N, {len(loaded.info.classes or ())}], by class",
        "exported_by": f"lowmem {lowmem.__version__}, torch {torch.__version__}",
    }
    return takes, json.dumps(told, sort_keys=True, ensure_ascii=False)


def _to_onnx(network: nn.Module, images: Tensor, metadata: str) -> bytes:
    onnx, _ = _onnx_libraries()
    with tempfile.TemporaryDirectory() as folder:
        torch.onnx.export(
            network, (images,), file := os.path.join(folder, "network.onnx"), opset_version=_OPSET, dynamo=False,
            input_names=[INPUT], output_names=[OUTPUT], dynamic_axes={INPUT: {0: "N"}, OUTPUT: {0: "N"}},
        )  # fmt: skip
        model = onnx.load(file)
    onnx.helper.set_model_props(model, {KEY: metadata})
    onnx.checker.check_model(model)
    data: bytes = model.SerializeToString()
    return data


def _to_torchscript(network: nn.Module, images: Tensor, metadata: str) -> bytes:
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(network, (images,), check_trace=False), file, {f"{KEY}.json": metadata})
    return file.getvalue()


# -- whether it is the network -----------------------------------------------------------------------------------------


def _pictures(loaded: LoadedRun, phase: Phase) -> tuple[Tensor, str]:
    """uint8 [N, C, S, S], and which they are: the run's test pictures, where they are at hand."""
    size = loaded.pictures.image_size
    if loaded.config is not None:
        with suppress(DataError, UsageError, OSError):
            data = loaded.config.data.model_copy(update={"download": False, "image_size": size})
            test = load(data, loaded.config.seed, progress=phase).test
            chosen = test.take(np.linspace(0, len(test) - 1, _PICTURES).astype(np.int64))
            images = as_seen(chosen, loaded.device).contiguous()
            return images, f"{min(len(test), _PICTURES)} of the run's test pictures"
    shape = (_PICTURES, len(loaded.info.mean or ()), size, size)
    words = addressed.draw_uint64(addressed.derive_seed(0, "export"), np.arange(np.prod(shape)))
    random = torch.from_numpy((words >> np.uint64(56)).astype(np.uint8)).view(shape)
    return random, f"{_PICTURES} random pictures, as the run's own are not at hand"


def _by_onnxruntime(data: bytes) -> Compute:
    _, onnxruntime = _onnx_libraries()
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy()})[0])


def _by_torchscript(data: bytes) -> Compute:
    loaded: Compute = torch.jit.load(io.BytesIO(data), map_location="cpu")
    return loaded


_OF_GRAPHS = {
    "onnx": (_to_onnx, _by_onnxruntime, "onnxruntime"),
    "torchscript": (_to_torchscript, _by_torchscript, "torch.jit"),
}


def _differ(network: Compute, other: Compute, images: Tensor) -> tuple[float, float]:
    """By how much logits do at the most, of one picture and of all; and by how much they may."""
    pairs = [(network(part), other(part)) for part in (images[:1], images)]
    for expected, found in pairs:
        if found.shape != expected.shape:
            raise ValueError(f"of {counted(len(expected), 'picture')} it gives logits {list(found.shape)}")
    difference = torch.stack([(expected - found).abs().max() for expected, found in pairs]).max()
    return float(difference), TOLERANCE * max(1.0, float(pairs[-1][0].abs().max()))
