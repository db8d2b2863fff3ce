"""report.html: one file, the same content as report.md, and nothing of a stranger's is executed."""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import yaml

from lowmem.report import write_report
from lowmem.report.markdown import to_page
from lowmem.report.style import Picture
from tests.unit.report.fake_runs import MakeRun

HOSTILE = (
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "[click](javascript:alert(1))",
    "![pic](https://example.org/x.png)",
    "<javascript:alert(1)>",
    "&lt;script&gt;alert(1)&lt;/script&gt;",
    '"><svg onload=alert(1)>',
)


class _Seen(HTMLParser):
    """Tags with their attributes, and the text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def is_harmless(page: str) -> bool:
    """No script, no link, no handler of an event, and nothing that is loaded from anywhere."""
    seen = _Seen(page)
    assert {tag for tag, _ in seen.tags} <= {
        "html", "head", "meta", "title", "style", "body", "main", "h1", "h2", "h3", "p", "div", "figure", "img",
        "table", "thead", "tbody", "tr", "th", "td", "ul", "li", "em", "strong",
    }  # fmt: skip
    for tag, attributes in seen.tags:
        assert not [name for name in attributes if name.startswith("on") or name == "href"]
        assert tag != "img" or str(attributes["src"]).startswith("data:image/png;base64,")
    return "url(" not in page and "@import" not in page


def test_the_same_as_the_markdown(six_runs: list[Path], tmp_path: Path) -> None:
    result = write_report(six_runs, tmp_path / "report", html=True)
    assert result.page == tmp_path / "report" / "report.html"
    page = result.page.read_text(encoding="utf-8")
    assert is_harmless(page)
    seen = _Seen(page)
    inlined = [str(attributes["src"]).partition(",")[2] for tag, attributes in seen.tags if tag == "img"]
    assert [base64.b64decode(data) for data in inlined] == [path.read_bytes() for path in result.figures]
    headings = re.findall(r"^#+ (.*)$", result.markdown.read_text(encoding="utf-8"), re.MULTILINE)
    assert re.findall(r"<h\d>(.*)</h\d>", page) == headings
    for table in result.tables:
        assert all(cell in seen.text for row in table.rows for cell in row)


def test_only_if_asked_for(make_run: MakeRun) -> None:
    result = write_report([make_run("res20")])
    assert result.page is None
    assert not result.markdown.with_name("report.html").exists()


def test_the_same_bytes_again(make_run: MakeRun) -> None:
    run = make_run("res20")
    pages = [write_report([run], html=True).page for _ in range(2)]
    assert pages[0] is not None
    first = pages[0].read_bytes()
    assert pages[1] is not None
    assert pages[1].read_bytes() == first


def test_a_strangers_run(make_run: MakeRun) -> None:
    """What a run folder says is shown as it is written, wherever it says it."""
    for number, text in enumerate(HOSTILE):
        name = text.replace("/", "\N{DIVISION SLASH}") + str(number)
        run = make_run("res20", name=name)
        env = {"device": text, "torch": text, "platform": text, "cpu": {text: [text]}}
        (run / "env.json").write_text(json.dumps(env), encoding="utf-8")
        settings = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
        settings["data"]["source"] = f"folder:{text}"
        (run / "config.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
        with (run / "events.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"event": "rollback", "what": text}) + "\n")
        page = write_report([run], html=True).page
        assert page is not None
        text_of_page = page.read_text(encoding="utf-8")
        assert is_harmless(text_of_page)
        seen = _Seen(text_of_page).text
        assert " ".join(text.split()) in seen
        assert name in seen


def test_markdown_that_was_not_escaped_is_still_harmless() -> None:
    for text in (*HOSTILE[:2], *HOSTILE[3:4], HOSTILE[6]):
        assert is_harmless(to_page(f"# Title\n\n{text}\n\n- {text}\n", [], text))


def test_policy_forbids_scripts() -> None:
    page = to_page("# Title\n", [], "title")
    assert "default-src 'none'" in page
    assert 'name="viewport"' in page
    assert "@media print" in page


def test_an_image_that_is_not_there_becomes_words() -> None:
    page = to_page("![of a <b>](here.png)\n\n![two](gone.png)\n", [Picture("here.png", b"png", "", "")], "")
    assert page.count("<img ") == 1
    assert 'alt="of a &lt;b&gt;"' in page
    assert ">two<" in page
