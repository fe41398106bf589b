"""A Markdown text as one HTML file: no scripts, no fonts, nothing to fetch."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.token import Token

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff;
       max-width: 76rem; margin: 2rem auto; padding: 0 1rem; }
h1, h2, h3 { line-height: 1.2; }
h2 { margin-top: 2.5rem; border-bottom: 1px solid #ccc; padding-bottom: .2rem; }
.table { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid #ddd; padding: .25rem .6rem; white-space: nowrap; }
th { background: #f4f4f4; }
tbody tr:hover { background: #f8f8f0; }
code { background: #f2f2f2; padding: 0 .2em; }
.plot { display: inline-block; width: 49%; min-width: 30rem; }
.plot svg { width: 100%; height: auto; }
"""


def html_page(title: str, markdown: str, drawings: Mapping[str, str]) -> str:
    """The page. An image whose address is a key of `drawings` becomes that SVG, in place.

    HTML within the Markdown is shown as text. Raises `KeyError` for another image: it would have
    to be fetched.
    """
    converter = MarkdownIt("commonmark", {"html": False}).enable("table")

    def image(
        renderer: Any, tokens: Sequence[Token], index: int, options: Any, environment: Any
    ) -> str:
        token = tokens[index]
        drawing = drawings[str(token.attrs["src"])]
        label = html.escape(token.content, quote=True)
        return f'<span class="plot" role="img" aria-label="{label}">{drawing}</span>'

    converter.add_render_rule("image", image)
    converter.add_render_rule("table_open", lambda *_: '<div class="table"><table>\n')
    converter.add_render_rule("table_close", lambda *_: "</table></div>\n")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"{converter.render(markdown)}</body>\n</html>\n"
    )
