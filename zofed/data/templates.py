"""Prompts from rows: Jinja templates in a sandbox, the columns they name, and what is wrong with them."""

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import meta, nodes

from zofed.base.errors import UserError
from zofed.base.texts import printable, said_by
from zofed.data import label_words, sandbox
from zofed.data.label_words import CANDIDATE

LONGEST = 10_000  # characters of a template
DEEPEST = 2  # loops inside one another


class Template:
    """A template whose variables are columns of a row.

    candidates: templates of what follows the text, each row's own. columns: those that all of them name, sorted. Raises
    UserError, which begins with `key`, for one that cannot be read, that loops deeper than DEEPEST, that has more than
    values, filters, conditions and loops in it, or names no column.
    """

    def __init__(self, source: str, key: str = "template", candidates: Sequence[str] = ()) -> None:
        self.source, self._key = source, key
        self._shown = repr(source if len(source) <= 60 else f"{source[:60]}...")
        if len(source) > LONGEST:
            raise UserError(f"{key} has {len(source):,} characters, more than {LONGEST:,}: give a shorter one")
        try:
            self._compiled, parsed = sandbox.compiled(source)
            own = meta.find_undeclared_variables(parsed)
        except sandbox.OutOfBounds as error:
            raise UserError(f"{key} = {self._shown} may not be ({error}): write it more simply") from error
        except Exception as error:  # of the parser, and of Python's compiler for what is nested too deeply
            raise UserError(f"{key} = {self._shown} is no Jinja template ({said_by(error)}): correct it") from error
        if _depth(parsed) > DEEPEST:
            raise UserError(f"{key} = {self._shown} has loops inside loops inside loops: use {DEEPEST} at most")
        if not own:
            raise UserError(f"{key} = {self._shown} names no column: put one of the data in, such as {{{{ text }}}}")
        self._own = tuple(sorted(own))
        self._candidates = [Template(each, label_words.KEY) for each in candidates]
        others = {name for each in self._candidates for name in each.columns} - {CANDIDATE}
        self.columns = tuple(sorted({*own, *others}))
        self._check_candidates()

    def _check_candidates(self) -> None:
        of_each = [each for each in self._candidates if CANDIDATE in each.columns]
        if of_each and len(self._candidates) > 1:
            raise UserError(
                f"{label_words.KEY} have {len(self._candidates)} templates, and one names {CANDIDATE}: that one alone "
                "writes each of a row's candidates; give it alone"
            )
        if len(self._candidates) == 1 and not of_each:
            raise UserError(
                f"{label_words.KEY} = {self._candidates[0].source!r} is a single template: give one for each "
                f"candidate, or name {{{{ {CANDIDATE} }}}} in it, for each of a row's own"
            )

    def render(self, row: Mapping[str, Any], place: str) -> str:
        """The text of a row. Raises UserError, which begins with its place, for a column that is not there."""
        if missing := [name for name in self._own if name not in row]:
            known = ", ".join(map(printable, list(row)[:12]))
            raise UserError(
                f"{place} has no column {missing[0]!r}, which {self._key} = {self._shown} names: it has {known}"
            )
        try:
            return sandbox.rendered(self._compiled, {name: row[name] for name in self._own})
        except Exception as error:  # what a filter raises on a value of another type
            raise UserError(
                f"{place}: {self._key} = {self._shown} fails on it ({said_by(error)}): correct it"
            ) from error

    def candidates(self, row: Mapping[str, Any], own: Sequence[str], place: str) -> tuple[str, ...]:
        """What may follow the text of a row: its `own` candidates, or what the templates make of it.

        Raises UserError as `render`, and where a template writes a row's own candidates, of which it has none.
        """
        if len(self._candidates) == 1:
            if not own:
                raise UserError(
                    f"{place} has no candidates, which {label_words.KEY} = {self._candidates[0].source!r} writes: give "
                    "them in a column candidates"
                )
            return tuple(self._candidates[0].render({**row, CANDIDATE: one}, place) for one in own)
        return tuple(each.render(row, place) for each in self._candidates) or tuple(own)


def _depth(node: nodes.Node) -> int:
    """How many loops lie inside one another."""
    below = max((_depth(child) for child in node.iter_child_nodes()), default=0)
    return below + isinstance(node, nodes.For)
