"""Files of others: bounded, and wrong in one way only."""

from __future__ import annotations

import html
import json
import math
import re
import string
import sys
import tracemalloc
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from lowmem.core.reading import (
    DEEPEST_JSON,
    Unreadable,
    escape_markdown,
    parse_json,
    parse_yaml,
    read_limited,
    shorten,
    user_cache_folder,
)

MARKED = st.text(string.punctuation + "a1 \n", max_size=12)
# PyYAML writes the control characters that end a line elsewhere (U+0085) in a way it does not read back.
TEXT = st.text(st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp")), max_size=20)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)


def test_a_file_is_read_up_to_its_limit(tmp_path: Path) -> None:
    file = tmp_path / "x"
    file.write_bytes(b"12345")
    assert read_limited(file, 5) == b"12345"
    tracemalloc.start()
    assert read_limited(file, 1 << 30) == b"12345"
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 1 << 20, "a limit takes no memory"
    with pytest.raises(Unreadable, match="has 5 bytes, at most 4 are read"):
        read_limited(file, 4)
    with pytest.raises(Unreadable, match="no regular file"):
        read_limited(tmp_path, 4)
    with pytest.raises(FileNotFoundError):
        read_limited(tmp_path / "none", 4)


@given(PLAIN)
def test_json_and_yaml_that_we_write_are_read(value: Any) -> None:
    assert parse_json(json.dumps(value)) == value
    # Without indentation the writer may break a long number's line, never its value.
    assert parse_yaml(yaml.safe_dump(value, allow_unicode=True, width=10**6)) == value


@given(st.text() | st.sampled_from(["&a [*a]", "!!int x", "2001-02-31", "!!timestamp x", "? [a]: b", "<<: 3", "!!x 1"]))
def test_any_text_is_a_value_or_one_exception(text: str) -> None:
    with suppress(yaml.YAMLError):
        parse_yaml(text)
    with suppress(Unreadable):
        parse_json(text)


@given(st.binary())
def test_any_bytes_are_a_value_or_one_exception(data: bytes) -> None:
    with suppress(Unreadable):
        parse_json(data)


def test_numbers_are_bounded() -> None:
    assert parse_json("9" * 60) == 10**60 - 1
    with pytest.raises(Unreadable, match="a number of 61 digits"):
        parse_json("9" * 61)


def test_a_key_stands_once() -> None:
    assert parse_yaml("a: {b: 1}\nc: {b: 2}") == {"a": {"b": 1}, "c": {"b": 2}}
    with pytest.raises(yaml.YAMLError, match="lr stands twice"):
        parse_yaml("optim:\n  lr: 1\n  lr: 2\n")


def test_depth_is_bounded() -> None:
    assert parse_json("[" * DEEPEST_JSON + "]" * DEEPEST_JSON) is not None
    for depth in (DEEPEST_JSON + 1, 10**6):
        with pytest.raises(Unreadable):
            parse_json("[" * depth + "]" * depth)
    with pytest.raises(yaml.YAMLError, match="nested"):
        parse_yaml("[" * 60 + "]" * 60)


def test_aliases_and_endless_numbers_are_refused() -> None:
    with pytest.raises(yaml.YAMLError, match="aliases"):
        parse_yaml("a: &x 1\nb: *x\n")
    with pytest.raises(yaml.YAMLError, match="too many digits"):
        parse_yaml("9" * 61)
    assert parse_yaml("a: &x 1") == {"a": 1}
    assert math.isinf(parse_yaml(".inf"))


def test_what_a_message_may_carry() -> None:
    assert shorten("a\nb\x1b[2J\tc") == "a b?[2J c"
    assert shorten("x" * 500) == "x" * 199 + "…"
    assert shorten(None) == "None"


def test_the_user_s_cache_folder_by_platform(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert user_cache_folder() == tmp_path / "lowmem"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert user_cache_folder() == Path.home() / ".cache" / "lowmem"
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path))
    assert user_cache_folder() == tmp_path / "lowmem" / "Cache"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert user_cache_folder() == Path.home() / "Library" / "Caches" / "lowmem"


@given(st.text(max_size=12) | MARKED | st.sampled_from(("1. a", "12) a", "+ a", "- [x] a", "---", "a&amp;b", "===")))
def test_markdown_shows_escaped_text_as_it_is(text: str) -> None:
    """In a heading, at the beginning of an item, in a table, as the words of a picture."""
    shown, mine = shorten(text), escape_markdown(text)
    document = f"### ({mine})\n\n- {mine}: b\n\n| {mine} | b |\n|---|---|\n| {mine} | c |\n\n![{mine}](a.png)\n"
    page = MarkdownIt("commonmark", {"html": False}).enable("table").render(document)
    found = re.fullmatch(
        r"<h3>\((.*)\)</h3><ul><li>(.*): b</li></ul><table><thead><tr><th>(.*)</th><th>b</th></tr></thead><tbody>"
        r"<tr><td>(.*)</td><td>c</td></tr></tbody></table><p><img src=\"a.png\" alt=\"(.*)\" /></p>",
        page.replace("\n", ""),
    )
    assert found is not None, page
    assert [html.unescape(words) for words in found.groups()] == [shown] * 5


def test_escaped_text_has_one_line_and_figures_stay_readable() -> None:
    assert escape_markdown("a\n\x1b[31m_b") == r"a ?\[31m\_b"
    assert [escape_markdown(text) for text in ("-2.0", "+25.0%", "1.50", "0:03")] == ["-2.0", "+25.0%", "1.50", "0:03"]
