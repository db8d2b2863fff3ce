from __future__ import annotations

import pytest

from lowmem.core.units import GIB, MIB, format_duration, format_size, parse_size


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
