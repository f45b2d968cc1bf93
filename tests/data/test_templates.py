"""Templates: what they make of a row, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from zofed.base.errors import UserError
from zofed.data.documents import read
from zofed.data.templates import Template

# MeZO's templates with rows of their data sets, and what its code makes of them.
RENDERED = [
    ("{{ sentence }} It was", {"sentence": "one long string of cliches"}, "one long string of cliches It was"),
    (
        '{{ premise }}\nDoes this mean that "{{ hypothesis }}" is true? Yes or No?\n',
        {"premise": "A man sleeps.", "hypothesis": "He rests."},
        'A man sleeps.\nDoes this mean that "He rests." is true? Yes or No?\n',
    ),
    (
        'Suppose {{ premise }} Can we infer that "{{ hypothesis }}"? Yes, No, or Maybe?\n',
        {"premise": "It rains.", "hypothesis": "It is wet."},
        'Suppose It rains. Can we infer that "It is wet."? Yes, No, or Maybe?\n',
    ),
    (
        "{{ passage }} {{ question[0] | upper }}{{ question[1:] }}?\n",
        {"passage": "Cats purr.", "question": "do cats purr"},
        "Cats purr. Do cats purr?\n",
    ),
]


@pytest.mark.parametrize(("source", "row", "text"), RENDERED)
def test_a_template_gives_the_text_of_a_row(source: str, row: dict[str, str], text: str) -> None:
    template = Template(source)
    assert template.render(row, "line 1") == text and template.columns == tuple(sorted(row))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ text", "is no Jinja template"),
        ("It was", "names no column"),
        ("{% include 'x' %}{{ text }}", "part 'include'"),
        ("{% for a in text %}{% for b in text %}{% for c in text %}x{% endfor %}{% endfor %}{% endfor %}", "loops"),
        ("x" * 20_000, "20,000 characters"),
    ],
)
def test_what_is_no_template_is_refused(source: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as refused:
        Template(source)
    assert str(refused.value).startswith("template")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ sentense }} It was", "line 3 has no column 'sentense', which template = .* it has sentence, label"),
        ("{{ sentence.__class__.__mro__ }}", "line 3: template = .* fails on it"),
        ("{{ sentence | abs }}", "line 3: template = .* fails on it"),
        ("{% for at in range(10) %}{{ sentence }}{% endfor %}", "has no column 'range'"),
    ],
)
def test_what_a_template_cannot_do_with_a_row_names_the_row(source: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Template(source).render({"sentence": "fine", "label": 1}, "line 3")


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def csv(path: Path, rows: list[dict[str, Any]]) -> Path:
    pd.DataFrame(rows).to_csv(path, index=False)
    return path


def parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    pd.DataFrame(rows).to_parquet(path)
    return path


@pytest.mark.parametrize("write", [jsonl, csv, parquet])
def test_a_file_without_a_column_of_text_is_read_by_the_columns_that_a_template_names(
    tmp_path: Path, write: Callable[[Path, list[dict[str, Any]]], Path]
) -> None:
    rows = [{"premise": f"p{n}", "hypothesis": f"h{n}", "other": "not read", "label": n % 2} for n in range(4)]
    path = write(tmp_path / f"rte.{write.__name__}", rows)
    found = read(str(path), Template("{{ premise }}, so {{ hypothesis }}?"))
    assert [document.text for document in found.documents] == [f"p{n}, so h{n}?" for n in range(4)]
    assert [document.label for document in found.documents] == [0, 1, 0, 1]
    assert found.read == ("hypothesis", "premise", "label")
    with pytest.raises(UserError, match="has no text column"):
        read(str(path))


def test_the_variable_text_is_whatever_column_holds_the_text(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"Sentence": "fine", "label": 1}])
    (document,) = read(str(path), Template("{{ text }} It was")).documents
    assert (document.text, document.label) == ("fine It was", 1)
