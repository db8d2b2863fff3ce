"""One colour and one marker per way of doing a training step, the same in every figure.

Colours of Okabe and Ito, told apart by the colour-blind too; the marker repeats what the colour says.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MethodStyle:
    """How a way is drawn: colour, matplotlib marker, width of its line (0: points only), and whether markers are
    filled."""

    colour: str
    marker: str = ""
    line_width: float = 1.2
    filled: bool = True


ENGINE_COLOUR, PREDICTED_COLOUR = "#0072B2", "#E69F00"

STYLES: dict[str, MethodStyle] = {
    "lowmem": MethodStyle(ENGINE_COLOUR, "o", 2.5),
    "plain PyTorch": MethodStyle("#000000", "D", 0.0),
    "plain PyTorch, fused optimizer": MethodStyle("#000000", "D", 0.0, filled=False),
    "plain PyTorch, nondeterministic kernels": MethodStyle("#888888", "D", 0.0, filled=False),
    "checkpoint, selective": MethodStyle("#D55E00", "^", 0.0),
    "checkpoint per block": MethodStyle("#009E73", "s", 0.0),
    "one policy for all blocks": MethodStyle("#E69F00", "o"),
    "checkpoint every k-th block": MethodStyle("#009E73", "s"),
}
