"""One colour a network, apart for everybody, the same in every figure."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from lowmem.config.schema import BLOCK_LAYOUT, ModelConfig
from lowmem.report.curves import curves_of, find_pairs
from lowmem.report.palette import NEUTRAL, network_name, style_of
from lowmem.report.published import PUBLISHED_ERROR_PCT
from lowmem.runs.view import read_run

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
    colours = [style_of(ModelConfig(arch=arch)).colour for arch in PUBLISHED_ERROR_PCT]
    seen = [lab(VISION[vision] @ linear(colour)) for colour in colours]
    assert min(np.linalg.norm(one - other) for one, other in combinations(seen, 2)) >= 15


def test_every_network_has_its_own_colour() -> None:
    colours = [style_of(model).colour for model in FAMILY]
    assert len({*colours, NEUTRAL}) == len(FAMILY) + 1


@pytest.mark.parametrize("model", FAMILY, ids=network_name)
def test_readable_on_white_and_solid_or_dashed(model: ModelConfig) -> None:
    style = style_of(model)
    luminance = float((TO_XYZ @ linear(style.colour))[1])
    assert 1.05 / (luminance + 0.05) >= 2.7
    assert (style.dashes == "-") == model.arch.startswith("res")


def test_names() -> None:
    assert network_name(ModelConfig(arch="res110")) == "Res110"
    assert network_name(ModelConfig(arch="cnn110", block="bottleneck")) == "CNN110-bottleneck"


def test_same_colour_in_every_figure_and_subset(six_runs: list[Path]) -> None:
    histories = [read_run(run) for run in six_runs]
    everywhere = {curve.history.name: curve.colour for curve in curves_of(histories)}
    assert len(set(everywhere.values())) == 6
    for shown in (*find_pairs(histories).values(), histories[2:3], histories[::-1]):
        for curve in curves_of(shown):
            assert curve.colour == everywhere[curve.history.name]
