from __future__ import annotations

import re
from pathlib import Path

import pytest

import lowmem
from lowmem.core.units import (
    GIB,
    LEAST_CARD_BYTES,
    LEAST_TENSORS_BYTES,
    MIB,
    counted,
    format_duration,
    format_loss,
    format_number,
    format_size,
    name_some,
    parse_memory,
    parse_size,
)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("6G", 6 * GIB),
        ("1200M", 1200 * MIB),
        ("1.5GiB", 3 * GIB // 2),
        ("512", 512),
        ("4k", 4096),
        (" 2 gb ", 2 * GIB),
        (7, 7),
    ],
)
def test_parse_size(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "six", "-1G", "0", "6X", "1e3", True, 0, -5])
def test_parse_size_refuses(text: str | int) -> None:
    with pytest.raises(ValueError, match="size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [(None, "?"), (12, "12 B"), (5416 * MIB, "5,416 MiB"), (12 * GIB, "12.0 GiB"), (2048, "2 KiB")],
)
def test_format_size(size: int | None, text: str) -> None:
    assert format_size(size) == text


@pytest.mark.parametrize(("seconds", "text"), [(None, "?"), (-3, "0:00"), (61, "1:01"), (3725, "1:02:05")])
def test_format_duration(seconds: float | None, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("6", "did you mean 6G"),
        (6, "did you mean 6G"),
        ("1.5", "did you mean 1.5G"),
        ("2700", "did you mean 2700M"),
        ("65535", "did you mean 65535M"),
        ("6M", "did you mean 6G"),
        ("2700 KiB", "did you mean 2700M"),
        (3_000_000, "write it like 6G"),
        ("six", "write it like 6G"),
        ("0.01G", "write it like 6G"),  # no other unit makes it acceptable
        ("1K", "write it like 6G"),
    ],
)
def test_a_card_of_so_little_is_a_forgotten_unit(text: str | int, meant: str) -> None:
    with pytest.raises(ValueError, match=meant):
        parse_memory(text, LEAST_CARD_BYTES)


def test_the_least_that_is_taken() -> None:
    assert parse_memory("64M", LEAST_CARD_BYTES) == 64 * MIB
    assert parse_memory(64 * MIB, LEAST_CARD_BYTES) == 64 * MIB
    assert parse_memory("100K", LEAST_TENSORS_BYTES) == 100 * 1024
    with pytest.raises(ValueError, match="did you mean 65535M"):
        parse_memory(65535, LEAST_TENSORS_BYTES)


def test_counts() -> None:
    said = [counted(n, what) for n, what in ((0, "epoch"), (1, "epoch"), (3000, "picture"), (1, "class"), (2, "class"))]
    assert said == ["0 epochs", "1 epoch", "3,000 pictures", "1 class", "2 classes"]


def test_no_plural_is_made_elsewhere() -> None:
    package = Path(lowmem.__file__).parent
    by_hand = re.compile(r"'e?s( are)?'( \*| if )")
    found = [path.relative_to(package).as_posix() for path in package.rglob("*.py") if by_hand.search(path.read_text())]
    assert found == ["core/units.py"]


def test_a_few_names() -> None:
    assert [name_some([*"abcd"], most) for most in (3, 4)] == ["a, b, c and 1 more", "a, b, c, d"]
    assert name_some([], 3) == ""


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.30004, "0.30"),
        (128.3, "128"),
        (1234.5, "1,234"),
        (9341813685810.4258, "9.3e12"),
        (-7.02e-9, "-7.0e-9"),
        (0.0036, "0.0036"),
        (float("nan"), "nan"),
        (float("-inf"), "-inf"),
    ],
)
def test_numbers_of_any_size_have_few_digits(value: float, text: str) -> None:
    assert format_number(value, 2) == text


def test_losses() -> None:
    losses = (2.320075263977051, 0.00002, 12345.678, 9341813685810.4258, float("nan"))
    assert [format_loss(loss) for loss in losses] == ["2.3201", "0.0000", "12,346", "9.342e12", "nan"]
