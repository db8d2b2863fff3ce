"""What exported weights (weights/*.safetensors) say of themselves, for whoever has that file alone: the network, the
classes in the order of its outputs, and how pictures are prepared for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from lowmem.config.sections import Section
from lowmem.core.reading import Unreadable, parse_json, shorten
from lowmem.core.units import counted
from lowmem.runs.checkpoint_state import Shapes, Whole, read_header

# In the file's metadata. One key: the library writes several in another order each time, and equal runs shall write
# equal files.
KEY = "lowmem"

PerChannel = tuple[float] | tuple[float, float, float]


class WeightsInfo(Section, extra="ignore"):
    """`arch` to `shortcuts`: of a network of the family; `spec`, `args`: of another, what makes it, of a file its name
    alone. `image_size`: side of the square pictures; `mean`, `std`: by channel, of pixels in [0, 1], three of
    RGB and one of grey pictures; `fit`: how files became square; `epoch`: completed ones; `error_pct`: on the pictures
    `error_on`; `chosen_on`: those that the best was chosen on; `ema`: the decay of the running mean that the weights
    are. None: not recorded, like most in files of older versions."""

    arch: str | None = None
    block: str | None = None
    width: Whole | None = None
    shortcuts: bool | None = None
    spec: str | None = None
    args: dict[str, Any] | None = None
    data: str | None = None
    classes: tuple[str, ...] | None = None
    image_size: Whole | None = None
    mean: PerChannel | None = None
    std: PerChannel | None = None
    fit: Literal["crop", "stretch"] | None = None
    epoch: Whole | None = None
    step: Whole | None = None
    error_pct: float | None = None
    error_on: Literal["val", "test"] | None = None
    chosen_on: Literal["val", "test"] | None = None
    ema: float | None = None  # also where they are no mean
    version: str | None = None  # of lowmem

    def to_metadata(self) -> dict[str, str]:
        """As the file carries it, the same text for the same values."""
        return {KEY: json.dumps(self.model_dump(exclude_none=True), sort_keys=True, ensure_ascii=False)}


def read_weights(path: Path) -> tuple[Shapes, WeightsInfo]:
    """Shapes by name, and what the file says of itself; its tensors are not read. Raises Unreadable, OSError."""
    shapes, metadata = read_header(path)
    # Older versions wrote a key for each value.
    values = parse_json(metadata[KEY]) if KEY in metadata else {name: text for name, text in metadata.items() if text}
    try:
        info = WeightsInfo.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(map(str, first["loc"])) or "what they are"
        raise Unreadable(f"says of itself what cannot be ({shorten(name)}: {shorten(first['msg'])})") from None
    outputs = shapes.get("linear.bias", ())
    if info.spec is None and info.classes is not None and outputs != (len(info.classes),):
        raise Unreadable(f"names {counted(len(info.classes), 'class')}, its last layer has {list(outputs)}")
    return shapes, info
