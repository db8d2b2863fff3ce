"""One colour and one line per network, the same in every figure and whatever runs are shown.

A residual net is solid and dark, its plain counterpart dashed and of another lightness, so that a pair stays
apart in grey print as well. The six networks of the published report stay apart in normal vision and under
each simulated colour blindness by a CIELAB distance of 15 or more (checked in the tests); all colours have a
contrast of 2.7 or more on white.
"""

from __future__ import annotations

from dataclasses import dataclass

from lowmem.config.schema import ARCHITECTURES, ModelConfig, resolve_block

NEUTRAL = "#666666"  # chance levels and notes: no network has it

_COLOURS: dict[tuple[str, str], str] = {
    ("res20", "basic"): "#0b4f9e",
    ("cnn20", "basic"): "#4a9be0",
    ("res56", "basic"): "#a83800",
    ("cnn56", "basic"): "#e5822e",
    ("res110", "basic"): "#1c1c1c",
    ("cnn110", "basic"): "#c94f9c",
    ("res110", "bottleneck"): "#00594a",
    ("cnn110", "bottleneck"): "#2b9c81",
    ("res56", "bottleneck"): "#7a5c00",
    ("cnn56", "bottleneck"): "#b8930a",
    ("res34", "basic"): "#4b2a8c",
    ("cnn34", "basic"): "#9678d3",
    ("res50", "bottleneck"): "#8f1027",
    ("cnn50", "bottleneck"): "#e06377",
    ("res101", "bottleneck"): "#3f6212",
    ("cnn101", "bottleneck"): "#7ba428",
}


@dataclass(frozen=True)
class Style:
    """How a network is drawn: `dashes` is a matplotlib line style."""

    colour: str
    dashes: str | tuple[int, tuple[float, ...]]


def style_of(model: ModelConfig) -> Style:
    """The network's style: by architecture and block alone, never by the other runs of a figure."""
    solid = model.arch.startswith("res")
    return Style(_COLOURS[model.arch, model.block], "-" if solid else (0, (4.0, 1.6)))


def network_name(model: ModelConfig) -> str:
    """`Res110`, `CNN56`; with the block if it is not the published one: `Res110-bottleneck`."""
    name = model.arch.replace("res", "Res").replace("cnn", "CNN")
    return name if model.block == resolve_block(model.arch, None) else f"{name}-{model.block}"


def network_rank(model: ModelConfig) -> tuple[int, str]:
    """The published table's order: residual nets by depth, then plain ones."""
    return ARCHITECTURES.index(model.arch), model.block
