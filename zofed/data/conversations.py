"""A row of a conversation as turns, whichever of the common shapes it has; what cannot be used is named or counted."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from zofed.base.errors import UserError
from zofed.base.parsing import from_json
from zofed.base.texts import printable
from zofed.data.columns import Shape, checked_text

ROLES = ("system", "user", "assistant")
_ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bard", "bing", "claude", "model", "bot", "ai"), "assistant"),
}
_TOOLS = ("tool", "tools", "function", "function_call", "function-call", "observation", "ipython", "tool_call")

# Rows that are left out or cut, counted and told: how such a sentence goes on.
EMPTY_RESPONSE = "rows with an empty response left out"
EMPTY_PROMPT = "rows with an empty prompt left out"
NO_RESPONSE = "rows without a turn of the assistant left out"
OPEN_END = "rows whose last turn is the user's lost it"


@dataclass(frozen=True, slots=True)
class Turn:
    """What one side of a conversation says. role: system, user or assistant."""

    role: str
    text: str


class Conversations:
    """Reads the rows of one data set, which all have one shape."""

    def __init__(self) -> None:
        self._shape: tuple[str, str] = ("", "")  # and the first place that has it
        self._told: Counter[str] = Counter()
        self._roles: set[str] = set()
        self._columns: dict[str, None] = {}

    def turns(self, place: str, row: Mapping[str, Any], shape: Shape, prompt: str | None = None) -> tuple[Turn, ...]:
        """The turns of a row, which end with the assistant's; none where it is left out, which `left_out` tells.

        prompt: what a template makes of it. Raises UserError, which begins with the place, for a row of another shape
        than those before, a turn of another role, and turns in an order that is no conversation.
        """
        self._shape = self._shape if self._shape[0] else (shape.name, place)
        if shape.name != self._shape[0]:
            raise UserError(
                f"{place} is {shape.name}, but {self._shape[1]} is {self._shape[0]}: put rows of one shape into a file"
            )
        self._columns |= dict.fromkeys(shape.columns)
        found = [turn for turn in _turns(place, row, shape, prompt) if turn.role != "system" or turn.text.strip()]
        _check_order(place, found)
        if found and found[-1].role == "user" and any(turn.role == "assistant" for turn in found):
            self._told[OPEN_END] += 1
            found.pop()
        if problem := _problem(found):
            self._told[problem] += 1
            return ()
        self._roles |= {turn.role for turn in found}
        return tuple(found)

    @property
    def left_out(self) -> tuple[str, ...]:
        """How many rows were left out or cut, and why."""
        return tuple(f"{count:,} {what}" for what, count in self._told.items())

    @property
    def told(self) -> str:
        """The shape, with its columns or roles; empty where no row was read."""
        name = self._shape[0]
        columns = ", ".join(map(printable, self._columns))
        if name == "messages" or name.startswith("ShareGPT"):
            roles = ", ".join(role for role in ROLES if role in self._roles)
            return f"{name if columns in name else columns} ({roles})"
        if name == "template":
            return f"the template's prompts, and {columns}"
        return f"{name}: {columns}" if name else ""


def text_of(turns: Sequence[Turn]) -> str:
    """A conversation as one text: its turns, a line break between them where neither has white space there."""
    text = ""
    for turn in turns:
        is_joined = not text or text[-1].isspace() or turn.text[:1].isspace()
        text += turn.text if is_joined else f"\n{turn.text}"
    return text


def _turns(place: str, row: Mapping[str, Any], shape: Shape, prompt: str | None) -> list[Turn]:
    if row.get("tools") not in (None, "", "[]", []):
        raise UserError(f"{place} gives tools to the assistant, whose calls are not read: leave such rows out")
    if shape.messages:
        return _messages(place, row.get(shape.messages), shape.messages)
    system = _text(place, row.get(shape.system), shape.system) if shape.system else ""
    turns = [Turn("system", system)] if system.strip() else []
    turns += _history(place, row.get(shape.history), shape.history) if shape.history else []
    first = row.get(shape.prompt[0]) if len(shape.prompt) == 1 else None
    if prompt is not None:
        turns.append(Turn("user", prompt))
    elif isinstance(first, list | dict):
        turns += _messages(place, first, shape.prompt[0])
    else:
        parts = [_text(place, row.get(column), column) for column in shape.prompt]
        turns.append(Turn("user", "\n\n".join(part for part in parts if part.strip())))
    last = row.get(shape.completion)
    if isinstance(last, list | dict):
        return turns + _messages(place, last, shape.completion)
    return [*turns, Turn("assistant", _text(place, last, shape.completion))]


def _messages(place: str, cell: object, column: str) -> list[Turn]:
    """The turns of a cell: a list of objects, an object of lists, or either as JSON."""
    if isinstance(cell, str):
        try:
            cell = from_json(cell)
        except ValueError:
            raise UserError(f"{place} has {column} that are no JSON list of turns: write them as JSON") from None
    if isinstance(cell, dict) and cell and all(isinstance(part, list) for part in cell.values()):
        cell = [dict(zip(cell, parts, strict=False)) for parts in zip(*cell.values(), strict=False)]
    if not isinstance(cell, list) or not all(isinstance(message, dict) for message in cell):
        raise UserError(
            f'{place} has {column} that are no list of turns: write {{"role": "user", "content": "..."}} for each'
        )
    return [_turn(place, message) for message in cell]


def _turn(place: str, message: Mapping[str, Any]) -> Turn:
    role = message.get("role") or message.get("from")
    content = message.get("content") if message.get("content") is not None else message.get("value")
    known = _ROLES.get(role.strip().casefold()) if isinstance(role, str) else None
    if isinstance(role, str) and role.strip().casefold() in _TOOLS:
        raise UserError(f"{place} has a turn of the role {role!r}, which is not read: leave rows with tools out")
    if known is None:
        raise UserError(f"{place} has a turn of the role {role!r}: use system, user and assistant (or human and gpt)")
    if message.get("tool_calls") or message.get("function_call"):
        raise UserError(f"{place} has a turn of the role {role!r} that calls a tool: leave rows with tools out")
    if message.get("weight") in (0, 0.0):
        raise UserError(f"{place} has a turn of weight 0, but all of the assistant's turns train: leave weights out")
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
        parts = [text for text in texts if isinstance(text, str)]
        if len(parts) < len(content):
            raise UserError(f"{place} has a turn of the role {role!r} that is not all text: leave such rows out")
        content = "".join(parts)
    return Turn(known, _text(place, content, f"turn of the role {role!r}"))


def _history(place: str, cell: object, column: str) -> list[Turn]:
    """Earlier turns as pairs of the user's and the assistant's."""
    pairs = cell or []
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise UserError(f"{place} has a {column} that is no list of pairs: write [prompt, response] for each")
    return [
        Turn(role, _text(place, text, column)) for pair in pairs for role, text in zip(ROLES[1:], pair, strict=True)
    ]


def _text(place: str, value: object, what: str) -> str:
    return str(value) if type(value) is int else checked_text(place, what, value)


def _check_order(place: str, turns: Sequence[Turn]) -> None:
    """Raise UserError for a system turn that is not the first, and for two turns of one side in a row."""
    for number, (before, turn) in enumerate(pairwise(turns), 2):
        if turn.role == "system":
            raise UserError(f"{place} has a system turn as number {number}: it must be the first")
        if turn.role == before.role:
            raise UserError(f"{place} has two turns of the {turn.role} in a row ({number - 1}, {number}): join them")


def _problem(turns: Sequence[Turn]) -> str:
    if not any(turn.role == "assistant" for turn in turns):
        return NO_RESPONSE
    if any(turn.role == "assistant" and not turn.text.strip() for turn in turns):
        return EMPTY_RESPONSE
    return EMPTY_PROMPT if any(turn.role == "user" and not turn.text.strip() for turn in turns) else ""


def candidates_of(place: str, row: Mapping[str, Any], columns: Iterable[str]) -> tuple[str, ...]:
    """What may follow a row's prompt: the texts of its columns; of one column a list of strings, or one as JSON.

    Raises UserError, which begins with the place, for less than two, an empty one, or two of the same.
    """
    names = tuple(columns)
    cells: Any = [row.get(name) for name in names]
    if len(names) == 1:
        cells = cells[0]
        if isinstance(cells, str):
            try:
                cells = from_json(cells)
            except ValueError:
                cells = None
    if not isinstance(cells, list) or not all(isinstance(text, str) and text.strip() for text in cells):
        raise UserError(
            f"{place} has no list of candidates in {'+'.join(names)}: give strings, a JSON list of them, or several "
            "columns as candidates=a+b"
        )
    if len(cells) < 2 or len(set(cells)) < len(cells):
        raise UserError(
            f"{place} has {len(set(cells))} different candidates of {len(cells)}: give 2 or more, all different"
        )
    return tuple(cells)
