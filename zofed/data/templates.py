"""Prompts from rows: Jinja templates in a sandbox, the columns they name, and what is wrong with them."""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from jinja2 import StrictUndefined, TemplateError, meta, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from zofed.base.errors import UserError
from zofed.base.texts import printable, said_by

LONGEST = 10_000  # characters of a template
DEEPEST = 2  # loops inside one another: each goes through a cell of the row, so that more could run for hours


class Template:
    """A template whose variables are columns of a row.

    columns: those it names, sorted. Raises UserError, which begins with `key`, for one that cannot be read, that loops
    deeper than DEEPEST, imports or includes others, or names no column.
    """

    def __init__(self, source: str, key: str = "template") -> None:
        self.source, self._key = source, key
        self._shown = repr(source if len(source) <= 60 else f"{source[:60]}...")
        if len(source) > LONGEST:
            raise UserError(f"{key} has {len(source):,} characters, more than {LONGEST:,}: give a shorter one")
        environment = _environment()
        try:
            parsed = environment.parse(source)
            self.columns = tuple(sorted(meta.find_undeclared_variables(parsed)))
            self._compiled = environment.from_string(source)
        except TemplateError as error:
            raise UserError(f"{key} = {self._shown} is no Jinja template ({said_by(error)}): correct it") from error
        if any(parsed.find_all((nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends))):
            raise UserError(f"{key} = {self._shown} reads other templates: put all of it into one")
        if _depth(parsed) > DEEPEST:
            raise UserError(f"{key} = {self._shown} has loops inside loops inside loops: use {DEEPEST} at most")
        if not self.columns:
            raise UserError(f"{key} = {self._shown} names no column: put one of the data in, such as {{{{ text }}}}")

    def render(self, row: Mapping[str, Any], place: str) -> str:
        """The text of a row. Raises UserError, which begins with its place, for a column that is not there."""
        if missing := [name for name in self.columns if name not in row]:
            known = ", ".join(map(printable, list(row)[:12]))
            raise UserError(
                f"{place} has no column {missing[0]!r}, which {self._key} = {self._shown} names: it has {known}"
            )
        try:
            return self._compiled.render({name: row[name] for name in self.columns})
        except Exception as error:  # what a filter raises on a value of another type
            raise UserError(
                f"{place}: {self._key} = {self._shown} fails on it ({said_by(error)}): correct it"
            ) from error


@lru_cache(maxsize=1)
def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False)
    environment.globals.clear()  # range, lipsum and the like
    return environment


def _depth(node: nodes.Node) -> int:
    """How many loops lie inside one another."""
    below = max((_depth(child) for child in node.iter_child_nodes()), default=0)
    return below + isinstance(node, nodes.For)


def words_of(setting: str) -> tuple[str, ...]:
    """The label words of the setting `label-words`, separated by commas; a space before a word belongs to it.

    Raises UserError where there are not two or more different ones.
    """
    words = tuple(setting.split(","))
    shown = ", ".join(map(repr, words))
    if len(words) < 2 or not all(word.strip() for word in words):
        raise UserError(
            f"label-words = {setting!r}: give a word for each class, separated by commas, in the order of the labels, "
            "such as ' terrible, great'"
        )
    if len(set(words)) < len(words):
        raise UserError(f"label-words = {setting!r} has one word twice ({shown}): give each class a word of its own")
    return words
