"""matplotlib, as far as figures need it, on the Agg canvas and never through pyplot: no window, no global state.

It is loaded here alone, for what is set outside is nothing to a figure, and must not end a run: importing it fails for
a backend that is not installed where this runs (a notebook names its own in `MPLBACKEND`) and for a `matplotlibrc` that
cannot be read, and any `matplotlibrc` that can be would draw another figure. What the caller draws is nothing to it
either: afterwards matplotlib is set as it would have been.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from lowmem.core.errors import PreflightError

_Drawing = TypeVar("_Drawing", bound=Callable[..., object])


@contextmanager
def _quietly(**instead: str) -> Iterator[None]:
    """With other variables meanwhile. Raises PreflightError for what cannot be helped: a damaged `matplotlibrc`
    in the working folder comes first."""
    # Where it cannot write, matplotlib names a folder of its own for whatever comes after it.
    before = {name: os.environ.get(name) for name in (*instead, "MPLCONFIGDIR")}
    log = logging.getLogger("matplotlib")
    level = log.level
    log.setLevel(logging.ERROR)  # that a configuration folder cannot be written to concerns nobody here
    os.environ.update(instead)
    try:
        yield
    except (ValueError, OSError) as error:
        raise PreflightError(
            f"matplotlib cannot be loaded ({error}): look for a damaged file matplotlibrc in {os.curdir}, and for "
            "a folder that it may write to, named by MPLCONFIGDIR"
        ) from None
    finally:
        log.setLevel(level)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


_loaded_before = "matplotlib" in sys.modules
with _quietly(MPLBACKEND="", MATPLOTLIBRC=os.devnull):
    from matplotlib import matplotlib_fname, rc_context, rc_params_from_file, rcParams, rcParamsDefault, rcParamsOrig
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import to_hex, to_rgb
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
    from matplotlib.patheffects import withStroke
    from matplotlib.text import Annotation, Text
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter, StrMethodFormatter
    from matplotlib.transforms import IdentityTransform

if not _loaded_before:  # what importing it would have read
    with suppress(PreflightError), _quietly():
        _own = rc_params_from_file(matplotlib_fname(), use_default_template=False)
        rcParams.update(_own)
        rcParamsOrig.update(_own)
        if _backend := os.environ.get("MPLBACKEND"):
            rcParams["backend"] = _backend

__all__ = [
    "Annotation", "Axes", "ConstrainedLayoutEngine", "Figure", "FigureCanvasAgg", "FixedLocator", "FuncFormatter",
    "IdentityTransform", "Line2D", "MaxNLocator", "NullFormatter", "Patch", "StrMethodFormatter", "Text",
    "drawn_alike", "to_hex", "to_rgb", "withStroke",
]  # fmt: skip


def drawn_alike(draw: _Drawing) -> _Drawing:
    """The function, under matplotlib's own defaults: the same figure everywhere, and every time."""
    # Even setting a backend that is still to be chosen chooses one.
    drawn: dict[Any, Any] = {name: value for name, value in rcParamsDefault.items() if name != "backend"}
    return rc_context({**drawn, "svg.hashsalt": "lowmem"})(draw)
