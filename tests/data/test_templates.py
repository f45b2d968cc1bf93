"""Templates: what they make of a row, and what is refused."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from zofed.base.errors import UserError
from zofed.data import sandbox
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


ROW = {"text": "a fine film " * 1000, "n": 7, "items": [1, 2, 3], "d": {"text": ["x"]}, "big": "z" * 900_000}

HOSTILE = [
    "{{ 'a' * 999999999 }}{{ text }}", "{{ n * text }}", "{{ items * 999999999 }}", "{{ 9 ** 9 ** 9 }}{{ text }}",
    "{{ '%999999999d' % n }}{{ text }}", "{{ '%999999999d' | format(n) }}", "{{ '{:>999999999}'.format(n) }}",
    "{{ text.center(999999999) }}", "{{ text | center(999999999) }}", "{{ text.ljust(999999999) }}",
    "{{ text | indent(999999999) }}", "{{ n | round(-999999999) }}", "{{ text | map('center', 999999999) | list }}",
    "{{ big | replace('z', big) }}", "{{ big.replace('z', big) }}", "{{ text | join(text) | join(text) }}",
    "{{ big ~ big }}", "{{ big + big }}", "{{ big }}{{ big }}", "{{ [big, big] | string }}", "{{ [big, big] }}",
    "{{ {'a': big, 'b': big} }}", "{{ [" + "big, " * 1000 + "] | map('upper') | list | length }}",
    "{% for a in big %}{% for b in big %}{% endfor %}{% endfor %}",
    "{% for a in text recursive %}{{ loop(text) }}{% endfor %}", "{% set a = text ~ text %}{{ a }}",
    "{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}{{ text }}",
    "{% block a %}{{ self.a() }}{{ self.a() }}{% endblock %}{{ text }}",
    "{{ text.__class__ }}", "{{ text | attr('__class__') }}", "{{ text.upper.__self__ }}",
    "{{ text.format.__globals__ }}",
    "{{ self.__init__ }}{{ text }}", "{{ '{0.__class__}'.format(text) }}", "{{ items.append(1) }}{{ text }}",
    "{{ text | random }}", "{{ text.upper }}", "{{ [text] | map(attribute='upper') | list }}", "{{ text.encode() }}",
    "{{ " + "(" * 3000 + "text" + ")" * 3000 + " }}", "{{ " + "not " * 2000 + "text }}",
    "{{ text" + " | upper" * 900 + " }}",
    "{% if text %}" * 350 + "{% endif %}" * 350, "{{ n" + " * n" * 50 + " * 99999999999 * 99999999999" * 20 + " }}",
]  # fmt: skip


@pytest.mark.parametrize("source", HOSTILE, ids=lambda source: source[:40])
def test_a_template_reaches_only_its_row_and_neither_fills_the_memory_nor_hangs(source: str) -> None:
    began = time.process_time()
    with pytest.raises(UserError) as refused:
        Template(source).render(ROW, "line 1")
    assert time.process_time() - began < 5 and "\n" not in str(refused.value)


def test_a_template_that_takes_too_long_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "SECONDS", 0.2)
    with pytest.raises(UserError, match=r"takes more than 0\.2 seconds"):
        Template("{% for a in text %}{{ (big | upper | title)[:1] }}{% endfor %}").render(ROW, "line 1")


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{% for a in items %}{{ loop.index }}. {{ a }}{{ ', ' if not loop.last }}{% endfor %}", "1. 1, 2. 2, 3. 3"),
        ("{% for key, value in d.items() %}{{ key }}={{ value[0] }}{% endfor %} {{ d.text[0] }}", "text=x x"),
        ("{{ text.split()[1] | title }} {{ items | join('/') }} {{ text[:6] ~ n }}", "Fine 1/2/3 a fine7"),
        ("{{ 'odd' if n % 2 else 'even' }} {{ n * 3 + 1 }} {{ items | select('in', [1, 3]) | list }}", "odd 22 [1, 3]"),
        ("{{ nothing }}|{{ items ~ nothing }}|{{ nan }}", "|[1, 2, 3]|"),
    ],
)  # fmt: skip
def test_what_templates_need_works(source: str, text: str) -> None:
    assert Template(source).render(ROW | {"nothing": None, "nan": float("nan")}, "line 1") == text


def test_candidates_are_the_rows_own_or_rendered() -> None:
    row = {"text": "The @x ran", "a": "he", "b": "she"}
    assert Template("{{ text }}").candidates(row, ("x", "y"), "line 1") == ("x", "y")
    several = Template("{{ text }}", candidates=(" {{ a }}", " {{ b }}", " {{ a }} too"))
    assert several.candidates(row, (), "line 1") == (" he", " she", " he too") and several.columns == ("a", "b", "text")
    each = Template("{{ a }}-", candidates=(" {{ text | replace('@x', candidate) }}",))
    assert each.columns == ("a", "text")
    assert each.candidates(row, ("cat", "dog"), "line 1") == (" The cat ran", " The dog ran")
    with pytest.raises(UserError, match="line 1 has no candidates"):
        each.candidates(row, (), "line 1")
    with pytest.raises(UserError, match="is a single template"):
        Template("{{ text }}", candidates=(" {{ a }}",))


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
