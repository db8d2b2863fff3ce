"""report.html: report.md as one page that needs nothing beside it, on a screen, a phone and paper.

The page is made from the Markdown, so that the two cannot drift, by the library that Rich renders Markdown with. Raw
HTML in it stays text, and the page's own policy forbids scripts and loads of any kind: what a stranger's run folder
says (names, settings, versions) is shown and never executed.

Figures are the PNGs of report.md, inlined. As SVG they would be larger (thousands of logged steps are a path each), and
their labels, placed by the width of one font, would run into each other in another.
"""

from __future__ import annotations

import base64
from collections.abc import MutableMapping, Sequence
from html import escape
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.token import Token
from markdown_it.utils import OptionsDict

from lowmem.report.style import Picture

Env = MutableMapping[str, Any]  # what the parser hands through: {"pictures": {file name: PNG}}

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_STYLE = """
:root { color-scheme: light dark; --ink: #1d1d1d; --soft: #555; --line: #d8d8d8; --paper: #fff; --head: #f4f4f4 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e4e4; --soft: #a8a8a8; --line: #444; --paper: #181818; --head: #242424 }
}
* { box-sizing: border-box }
html { -webkit-text-size-adjust: 100% }
body { margin: 0 auto; padding: 1rem; max-width: 54rem; color: var(--ink); background: var(--paper);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; overflow-wrap: break-word }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0.5rem 0 1rem }
h2 { font-size: 1.3rem; margin: 2.2rem 0 0.6rem; padding-top: 0.6rem; border-top: 1px solid var(--line) }
h3 { font-size: 1.05rem; margin: 1.6rem 0 0.4rem }
p, li { max-width: 44rem }
ul { padding-left: 1.2rem }
figure { margin: 0.6rem 0 1.2rem }
figure img { display: block; width: 100%; max-width: 46rem; height: auto; background: #fff; border-radius: 4px }
.wide { overflow-x: auto; margin: 0.8rem 0 }
table { border-collapse: collapse; font-size: 0.92rem; font-variant-numeric: tabular-nums }
th, td { padding: 0.35rem 0.6rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top }
thead th { background: var(--head) }
td[style] { white-space: nowrap }
@media (max-width: 30rem) {
  table { font-size: 0.82rem }
  th, td { padding: 0.3rem 0.3rem }
}
@media print {
  :root { color-scheme: light; --ink: #000; --soft: #333; --line: #bbb; --paper: #fff; --head: #eee }
  @page { margin: 15mm }
  body { max-width: none; padding: 0; font-size: 10pt }
  p, li { max-width: none }
  h2, h3 { break-after: avoid }
  figure, tr { break-inside: avoid }
  figure img { max-width: 125mm }
  .wide { overflow: visible }
  thead { display: table-header-group }
}
""".strip()


def to_page(markdown: str, pictures: Sequence[Picture], title: str) -> str:
    """The whole page. An image of the document that is none of `pictures` becomes its words."""
    parser = MarkdownIt("commonmark", {"html": False}, renderer_cls=_Renderer).enable("table")
    body = parser.render(markdown, {"pictures": {picture.file_name: picture.png for picture in pictures}})
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{_STYLE}\n</style>\n</head>\n<body>\n<main>\n{body}</main>\n</body>\n"
        "</html>\n"
    )


class _Renderer(RendererHTML):
    """Inlines pictures, and lets a table that is wider than the screen scroll by itself."""

    def image(self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: Env) -> str:
        token = tokens[idx]
        words = self.renderInlineAsText(token.children or [], options, env)
        png = env["pictures"].get(str(token.attrGet("src")))
        if png is None:
            return escape(words)
        data = base64.b64encode(png).decode("ascii")
        return f'<img src="data:image/png;base64,{data}" alt="{escape(words)}">'

    def paragraph_open(self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: Env) -> str:
        if _holds_picture(tokens[idx + 1]):
            return "<figure>"
        return self.renderToken(tokens, idx, options, env)

    def paragraph_close(self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: Env) -> str:
        if _holds_picture(tokens[idx - 1]):
            return "</figure>\n"
        return self.renderToken(tokens, idx, options, env)

    def table_open(self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: Env) -> str:
        return f'<div class="wide" tabindex="0">{self.renderToken(tokens, idx, options, env)}'

    def table_close(self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: Env) -> str:
        return f"{self.renderToken(tokens, idx, options, env)}</div>\n"


def _holds_picture(token: Token) -> bool:
    """Of a paragraph's content: whether it is an image and nothing else."""
    return token.type == "inline" and [child.type for child in token.children or []] == ["image"]
