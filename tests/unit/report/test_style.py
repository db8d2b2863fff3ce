"""One look a network and a method, apart for everybody."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from lowmem.bench import FAMILIES
from lowmem.config.networks import BLOCK_LAYOUT
from lowmem.config.schema import ModelConfig
from lowmem.report import style
from lowmem.report.naming import network_name
from lowmem.report.style import METHOD_STYLES, NEUTRAL, network_style
from lowmem.report.tables import PUBLISHED_ERROR_PCT

# Machado, Oliveira, Fernandes (2009), severity 1, on linear RGB.
VISION = {
    "normal": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "tritanopia": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}
TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
PHONE_POINTS = 360.0
FAMILY = [
    ModelConfig.model_validate({"arch": f"{kind}{depth}", "block": block})
    for depth, block in BLOCK_LAYOUT
    for kind in ("res", "cnn")
]


def linear(colour: str) -> np.ndarray:
    rgb = np.array(to_rgb(colour))
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    xyz = TO_XYZ @ np.clip(rgb, 0, 1) / np.array([0.9505, 1, 1.089])
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("vision", VISION)
def test_published_networks_stay_apart(vision: str) -> None:
    colours = [network_style(ModelConfig(arch=name.lower())).colour for name in PUBLISHED_ERROR_PCT]
    seen = [lab(VISION[vision] @ linear(colour)) for colour in colours]
    assert min(np.linalg.norm(one - other) for one, other in combinations(seen, 2)) >= 15


def test_every_network_has_its_own_colour() -> None:
    colours = [network_style(model).colour for model in FAMILY]
    assert len({*colours, NEUTRAL}) == len(FAMILY) + 1


@pytest.mark.parametrize("model", FAMILY, ids=network_name)
def test_readable_on_white_and_solid_or_dashed(model: ModelConfig) -> None:
    look = network_style(model)
    luminance = float((TO_XYZ @ linear(look.colour))[1])
    assert 1.05 / (luminance + 0.05) >= 2.7
    assert (look.dashes == "-") == model.arch.startswith("res")


def test_two_methods_never_look_the_same() -> None:
    looks = [(METHOD_STYLES[name].colour, METHOD_STYLES[name].marker, METHOD_STYLES[name].face) for name in FAMILIES]
    assert len(set(looks)) == len(looks)


def test_text_on_a_phone() -> None:
    """No type smaller than eight points of the screen, however wide the figure is drawn."""
    shrunk = PHONE_POINTS / (72 * style.WIDTH_INCHES)
    assert min(style.AXIS_SIZE, style.TICK_SIZE, style.LABEL_SIZE) * shrunk > 9
    assert style.LEAST_SIZE * shrunk > 7.5
