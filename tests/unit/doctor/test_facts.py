"""What the facts are made of."""

from __future__ import annotations

import pytest

from lowmem.doctor.facts import split_way_out


@pytest.mark.parametrize(
    ("sentence", "finding", "mend"),
    [
        ("it is full (why: so): make room", "it is full (why: so)", "make room"),
        ("it is full: give --out (like --out: x)", "it is full", "give --out (like --out: x)"),
        ("/data/a (old/train is missing: give --data", "/data/a (old/train is missing", "give --data"),
        ("ValueError: no such thing", "ValueError: no such thing", None),
        ("it is full (why: so)", "it is full (why: so)", None),
        ("it is full", "it is full", None),
    ],
)
def test_a_sentence_is_split_where_its_way_out_begins(sentence: str, finding: str, mend: str | None) -> None:
    assert split_way_out(sentence) == (finding, mend)
