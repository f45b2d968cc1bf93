"""A page as it grows: one self-contained HTML file, and in Markdown what a summary needs of it."""

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

Rows = list[list[str]]

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #111; max-width: 1300px; margin: 2em auto; padding: 0 1.2em }
h1 { font-size: 1.5em } h2 { font-size: 1.15em; margin-top: 2em; border-bottom: 1px solid #bbb }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; margin: .6em 0 }
th, td { border-bottom: 1px solid #ddd; padding: .25em .7em; text-align: left; vertical-align: top }
th { border-bottom: 2px solid #555 } td.n { text-align: right } .wide { overflow-x: auto }
img { max-width: 100%; height: auto } summary { cursor: pointer; margin: .6em 0 } code { font-size: 12px }
@page { size: landscape; margin: 12mm }
@media print { body { max-width: none; margin: 0; padding: 0; font-size: 11px } table { font-size: 8px }
  th, td { padding: .2em .4em } .wide { overflow: visible } img { max-height: 160mm }
  h2, h3 { break-after: avoid } img, tr { break-inside: avoid } }
"""


@dataclass
class Page:
    """Parts in HTML, and the lines of the summary in Markdown. short: a part that belongs into the summary, too."""

    title: str
    parts: list[str] = field(default_factory=list)
    summary: list[str] = field(default_factory=list)

    def heading(self, text: str, short: bool = False) -> None:
        self.parts.append(f"<h2>{html.escape(text)}</h2>")
        self.summary += [f"## {text}", ""] if short else []

    def sentences(self, some: Sequence[str], short: bool = False) -> None:
        self.parts.append("<ul>" + "".join(f"<li>{html.escape(one)}</li>" for one in some) + "</ul>")
        self.summary += [*(f"- {one}" for one in some), ""] if short else []

    def table(self, head: Sequence[str], rows: Rows, short: bool = False, folded: str = "") -> None:
        """folded: what a reader clicks to see it; empty: it is seen."""
        cells = "".join(f"<th>{html.escape(one)}</th>" for one in head)
        body = "".join("<tr>" + "".join(map(_cell, row)) + "</tr>" for row in rows)
        text = f'<div class="wide"><table><tr>{cells}</tr>{body}</table></div>'
        self.parts.append(f"<details><summary>{html.escape(folded)}</summary>{text}</details>" if folded else text)
        if short:
            lines = [head, ["---"] * len(head), *rows]
            self.summary += ["| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in lines] + [""]

    def picture(self, path: Path, told: str) -> None:
        data = base64.b64encode(path.read_bytes()).decode()
        self.parts.append(f'<p><img alt="{html.escape(told)}" src="data:image/png;base64,{data}"></p>')

    def to_html(self) -> str:
        head = f'<meta charset="utf-8"><title>{html.escape(self.title)}</title><style>{STYLE}</style>'
        return f'<!doctype html><html lang="en"><head>{head}</head><body>' + "\n".join(self.parts) + "</body></html>\n"


def _cell(text: str) -> str:
    kept = html.escape(text).replace("± ", "±&nbsp;").replace(" to ", " to&nbsp;")  # so that a line breaks before them
    return f"<td{' class=n' if _is_number(text) else ''}>{kept}</td>"


def _is_number(text: str) -> bool:
    """Whether a cell begins with a number, as `6.25 ± 0.01` does, and a date does not."""
    try:
        float(text.split(" ")[0].replace(",", ""))
    except ValueError:
        return False
    return True
