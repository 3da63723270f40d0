"""Parts of a self-contained HTML page: nothing is loaded from elsewhere, and the texts of models
and data sets are escaped."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

_HERE = Path(__file__).parent
SAMPLES = '<form id="filters"></form>\n<div id="list"></div>'
"""The elements that `samples.js` fills with its browser."""


def write_page(
    file: Path, *, title: str, body: str, data: dict[str, Any], scripts: Sequence[str]
) -> Path:
    """Writes a page. body: HTML; data: JSON for the scripts; scripts: names of files here."""
    text = Template((_HERE / "page.html").read_text()).substitute(
        title=escape(title),
        style=(_HERE / "page.css").read_text(),
        body=body,
        data=_as_script(data),
        script="".join((_HERE / name).read_text() for name in scripts),
    )
    # half a surrogate pair, which a tokenizer may give, is written as its escape, valid in JSON
    file.write_bytes(text.encode("utf-8", "backslashreplace"))
    return file


def table(lines: Iterable[Sequence[str]], head: Sequence[str] = (), name: str = "") -> str:
    """An HTML table of these texts, which are escaped. name: its CSS class."""

    def row(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    top = f"<thead>{row(head, 'th')}</thead>" if head else ""
    body = "".join(row(line, "td") for line in lines)
    kind = f' class="{name}"' if name else ""
    return f'<div class="scroll"><table{kind}>{top}<tbody>{body}</tbody></table></div>'


def paragraphs(texts: Iterable[str], name: str = "") -> str:
    kind = f' class="{name}"' if name else ""
    return "".join(f"<p{kind}>{escape(text)}</p>" for text in texts)


def picture(name: str, png: bytes) -> str:
    return (
        f'<img alt="{escape(name)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
    )


def _as_script(value: Any) -> str:
    """JSON that is safe inside a script element."""
    # no `</script>` in a model's answer may end the element
    text = json.dumps(value, ensure_ascii=False).replace("<", "\\u003c")
    # these two end a line in JavaScript before ES2019, but not in JSON
    return text.replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
