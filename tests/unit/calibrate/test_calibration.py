"""What is kept of measurements: found again by the same device only, and never an error."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lowmem.calibrate.calibrator import Calibration, Identity, Mode, Seconds

HERE = Identity(device="cuda", name="GTX 1060 6GB", driver="580.95", torch="2.7.1+cu126", library="90501")


def _filled(folder: Path) -> Calibration:
    made = Calibration(HERE, folder)
    made.put("seconds", ("a", 1), [0.1, 0.2, 0.3])
    made.put("mode", ("m",), [2.0, 0.0])
    made.put("bytes", ("w",), 12345)
    made.save()
    return made


def test_figures_come_back(tmp_path: Path) -> None:
    _filled(tmp_path)
    again = Calibration(HERE, tmp_path)
    assert again.seconds(("a", 1)) == Seconds(0.1, 0.2, 0.3)
    assert again.mode(("m",)) == Mode(2.0, False)
    assert again.size_bytes(("w",)) == 12345
    assert again.seconds(("a", 2)) is None
    assert again.seconds(("m",)) is None, "a mode's key is no key of seconds"


@pytest.mark.parametrize(
    "change", [{"driver": "580.96"}, {"torch": "2.15.0"}, {"name": "GTX 1070"}, {"library": None}, {"threads": 2}]
)
def test_another_card_driver_or_version_is_measured_anew(tmp_path: Path, change: dict[str, object]) -> None:
    _filled(tmp_path)
    other = Calibration(replace(HERE, **change), tmp_path)
    assert other.figures == {}
    assert other.path != Calibration(HERE, tmp_path).path


def test_nothing_is_kept_without_a_folder() -> None:
    made = Calibration(HERE, None)
    made.put("bytes", "w", 1)
    made.save()
    assert made.size_bytes("w") == 1


def test_a_folder_that_cannot_be_written_costs_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    made = Calibration(HERE, tmp_path / "file" / "folder")
    made.put("bytes", "w", 1)
    made.save()
    assert not list(tmp_path.glob("**/*.json"))


@pytest.mark.parametrize("value", [True, -1, 1.5, "7", None, [1]])
def test_a_size_that_is_none_is_not_believed(tmp_path: Path, value: object) -> None:
    path = _filled(tmp_path).path
    assert path is not None
    content = json.loads(path.read_text())
    content["figures"] = {
        name: value if name.startswith("bytes:") else found for name, found in content["figures"].items()
    }
    path.write_text(json.dumps(content))
    assert Calibration(HERE, tmp_path).size_bytes(("w",)) is None


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=40), st.floats(0, 1), st.booleans())
def test_a_damaged_file_is_measured_again(tmp_path: Path, junk: bytes, where: float, cut: bool) -> None:
    path = _filled(tmp_path).path
    assert path is not None
    data = path.read_bytes()
    at = int(where * len(data))
    path.write_bytes(data[:at] + junk + (b"" if cut else data[at + len(junk) :]))
    found = Calibration(HERE, tmp_path)
    for read in (found.seconds, found.mode, found.size_bytes):
        read(("a", 1))
    found.put("bytes", "w", 3)
    found.save()
    assert Calibration(HERE, tmp_path).size_bytes("w") == 3
