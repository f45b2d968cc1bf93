"""Which columns of a row hold its text or conversation, label, source and topic, and which text that nobody reads."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from zofed.base.errors import UserError

TEXT_COLUMNS = ("text", "sentence", "content")
LABEL_COLUMNS = ("label", "labels")
PUBMEDQA_COLUMNS = {
    "question": ("question", "context", "long_answer"),  # the hub's spelling
    "QUESTION": ("QUESTION", "CONTEXTS", "LONG_ANSWER"),  # the original repository's spelling
}
PUBMEDQA_LABEL = "final_decision"
TOPIC_COLUMNS = ("topic", "category", "task")
MESSAGES = ("messages", "conversations", "conversation")
COMPLETIONS = ("completion", "response", "output", "answer", "long_answer", "LONG_ANSWER")
# A prompt's columns, the second of which a row need not have, and those of its response; their name, if they have one.
PAIRS = {
    ("prompt", (), ("completion", "response")): "prompt and completion",
    ("instruction", ("input", "context"), ("output", "response", "completion")): "",
    ("question", (), ("answer", "response")): "question and answer",
    ("input", (), ("output",)): "input and output",
}
ROLES = ("text", "label", "source", "topic", "prompt", "completion", "messages", "candidates")
SAMPLED = 64  # rows that are looked at to tell which of the other columns hold text

_RUN = re.compile(r"[^\W\d_]{8,}")


Roles = tuple[tuple[str, tuple[str, ...]], ...]  # what the setting `columns` says: a role and the columns that have it


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is read of rows beside what is recognised.

    others: columns that a template names. roles: of the setting `columns`. turns: rows are conversations; template: of
    which it makes the prompt.
    """

    others: tuple[str, ...] = ()
    roles: Roles = ()
    turns: bool = False

    @property
    def template(self) -> bool:
        """Whether a template makes the text or the prompt."""
        return bool(self.others)

    def of(self, role: str) -> tuple[str, ...]:
        """The columns that have a role; empty: none was given it."""
        return next((columns for name, columns in self.roles if name == role), ())

    def one(self, role: str) -> str:
        """The first of them, or nothing."""
        return (*self.of(role), "")[0]

    def names(self) -> tuple[str, ...]:
        """Columns that are asked for by name, by whom the first line of a table is known to be its header."""
        return (*self.others, *(column for _, columns in self.roles for column in columns))


AS_RECOGNISED = Wanted()


@dataclass(frozen=True, slots=True)
class Shape:
    """The columns of a conversation. messages: the one with its turns; else prompt, joined, and completion.

    prompt is empty where a template makes it. system, history: columns with what comes before the prompt.
    """

    name: str
    messages: str = ""
    prompt: tuple[str, ...] = ()
    completion: str = ""
    system: str = ""
    history: str = ""

    @property
    def columns(self) -> tuple[str, ...]:
        """All of them, in the order of the conversation."""
        every = (self.messages, self.system, self.history, *self.prompt, self.completion)
        return tuple(name for name in every if name)


@dataclass(frozen=True, slots=True)
class Columns:
    """The columns of a row that are read, by what they hold, and the rest. Empty: the row has none.

    text: one, or PubMedQA's three. strict: the label's column is called `label`, in any case, and must hold labels.
    read: all that are there. shape: of a conversation, which then is what is read.
    """

    text: tuple[str, ...]
    label: str
    source: str
    topic: str
    read: tuple[str, ...]
    rest: tuple[str, ...]
    strict: bool
    is_pubmedqa: bool = False
    shape: Shape | None = None
    candidates: tuple[str, ...] = ()


@lru_cache(maxsize=1024)
def chosen(names: tuple[str, ...], wanted: Wanted = AS_RECOGNISED) -> Columns:
    """The columns to read of those that a row has; a name counts without case and outer spaces where none is exact.

    Only where a template names no column, or `text` is one of them, must a column hold a text, or those of a
    conversation. Raises UserError, the end of a sentence about the row, where none does or two could, and for a column
    of the setting `columns` that is not there.
    """
    for role, columns in wanted.roles:
        if missing := next((column for column in columns if column not in names), ""):
            raise UserError(
                f"has no column {missing!r}, which the setting columns gives as its {role}: it has {listed(names)}"
            )
    source = wanted.one("source") or ("source" if "source" in names else "")
    pubmedqa = next((found for first, found in PUBMEDQA_COLUMNS.items() if {first, found[1]} <= set(names)), None)
    text: tuple[str, ...] = ("",)
    if not wanted.template or "text" in wanted.others:
        text = wanted.of("text") or pubmedqa or (_named(names, TEXT_COLUMNS, "text"),)
    decision = PUBMEDQA_LABEL if pubmedqa and PUBMEDQA_LABEL in names else ""
    label = wanted.one("label") or decision or _named(names, LABEL_COLUMNS, "label")
    topic = wanted.one("topic") or _topic(names, label)
    is_mapped = any(wanted.of(role) for role in ("prompt", "completion", "messages")) and not wanted.of("text")
    is_text = not wanted.turns and (text[0] or wanted.template) and not is_mapped
    shape = None if is_text else _shape(names, wanted, pubmedqa)
    if wanted.turns and not shape:
        raise UserError(_no_conversation(names, wanted))
    if not text[0] and not shape and not (wanted.template and "text" not in wanted.others):
        raise UserError(
            f"has no text column: it has {listed(names)}; name one of them {', '.join(TEXT_COLUMNS[:-1])} "
            f"or {TEXT_COLUMNS[-1]}, or set columns to 'text=NAME'{_other_separator(names)}"
        )
    candidates = wanted.of("candidates")
    shown = shape.columns if shape else text
    others = tuple(column for name in wanted.others for column in (wanted.of(name) or (name,)) if name != "text")
    read = tuple(name for name in dict.fromkeys((*shown, *others, *candidates, label, source, topic)) if name in names)
    rest = tuple(name for name in names if name not in read)
    strict = bool(wanted.of("label")) or label.strip().casefold() in (LABEL_COLUMNS[0], PUBMEDQA_LABEL)
    is_pubmedqa = text == pubmedqa
    return Columns(text, label, source, topic, read, rest, strict, is_pubmedqa, shape, candidates)


def _topic(names: tuple[str, ...], label: str) -> str:
    """The column `topic`, else Dolly's `category` or Natural Instructions' `task`."""
    return next((name for name in TOPIC_COLUMNS if name in names and name != label), "")


def _shape(names: tuple[str, ...], wanted: Wanted, pubmedqa: tuple[str, ...] | None) -> Shape | None:
    """The conversation that a row's columns hold, by its first known kind; None: they hold none."""
    before = {"system": _named(names, ("system", "system_prompt"), "system turn")}
    before["history"] = "history" if "history" in names else ""
    completion = wanted.one("completion")
    if messages := wanted.one("messages"):
        return Shape("messages", messages)
    if wanted.turns and wanted.template:
        completion = completion or (_named(names, COMPLETIONS, "response"))
        return Shape("template", completion=completion, system=before["system"]) if completion else None
    if wanted.of("prompt") or completion:
        prompt = wanted.of("prompt") or _prompt(names)
        completion = completion or _named(names, COMPLETIONS, "response")
        return (
            Shape("prompt and response", prompt=prompt, completion=completion, **before)
            if prompt and completion
            else None
        )
    for known in MESSAGES:
        if found := _named(names, (known,), "conversation"):
            return Shape(known if known == MESSAGES[0] else f"ShareGPT {known}", found)
    if pubmedqa and pubmedqa[2] in names:
        return Shape("PubMedQA", prompt=pubmedqa[:1], completion=pubmedqa[2])
    for first, second, last in PAIRS:
        prompt, more = _named(names, (first,), "prompt"), _named(names, second, "prompt's second part")
        if prompt and (completion := _named(names, last, "response")):
            parts = tuple(part for part in (prompt, more) if part)
            is_dolly = "context" in map(str.casefold, parts)
            name = PAIRS[first, second, last] or ("Dolly" if is_dolly else "Alpaca")
            return Shape(name, prompt=parts, completion=completion, **before)
    return None


def _prompt(names: tuple[str, ...]) -> tuple[str, ...]:
    """The columns of a prompt whose response has a column of another name."""
    for first, second, _ in PAIRS:
        if found := _named(names, (first,), "prompt"):
            return tuple(part for part in (found, _named(names, second, "prompt's second part")) if part)
    found = _named(names, TEXT_COLUMNS, "prompt")
    return (found,) if found else ()


def _no_conversation(names: tuple[str, ...], wanted: Wanted) -> str:
    if wanted.template:
        return (
            f"has no response to the template's prompt: it has {listed(names)}; set columns to 'completion=NAME', or "
            f"name one of them {', '.join(COMPLETIONS[:-2])} or {COMPLETIONS[-2]}"
        )
    return (
        f"holds no conversation: it has {listed(names)}; name them messages, conversations, prompt and completion, "
        "instruction and output, or question and answer; or set columns to 'prompt=NAME, completion=NAME'"
    )


def roles_of(setting: str) -> Roles:
    """What the setting `columns` says: 'text=review, candidates=a+b'. Raises UserError for what it cannot mean."""
    found: dict[str, tuple[str, ...]] = {}
    for part in setting.split(",") if setting else ():
        role, equals, column = (piece.strip() for piece in part.partition("="))
        if not equals or not column:
            raise UserError(f"columns = {setting!r}: {part.strip()!r} is no ROLE=COLUMN, such as 'text=review'")
        if role not in ROLES:
            raise UserError(f"columns = {setting!r}: {role!r} is no role; use {', '.join(ROLES[:-1])} or {ROLES[-1]}")
        if role in found:
            raise UserError(f"columns = {setting!r} gives {role} twice: name one column for it")
        found[role] = tuple(name.strip() for name in column.split("+")) if role == "candidates" else (column,)
    return tuple(found.items())


def header(cells: Sequence[str], place: str) -> list[str]:
    """The names in the first line of a table, without outer spaces and byte order marks; an empty one gets a number.

    Raises UserError where two columns have one name: one of them would be lost.
    """
    names = [plain(cell) or f"column {number}" for number, cell in enumerate(cells, 1)]
    check_distinct(names, place)
    return names


def check_distinct(names: Iterable[str], place: str) -> None:
    """Raise UserError where two columns have one name."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise UserError(f"{place} has two columns named {name!r}: rename or remove one of them")
        seen.add(name)


def is_header(cells: Sequence[str], wanted: Wanted = AS_RECOGNISED) -> bool:
    """Whether a first line names columns that would be read: of a conversation two, lest a text be taken for one."""
    asked = wanted.names()
    if any(plain(cell).casefold() in _KNOWN or plain(cell) in _KNOWN or plain(cell) in asked for cell in cells):
        return True
    return sum(plain(cell).casefold() in _OF_CONVERSATIONS for cell in cells) > 1


def plain(name: str) -> str:
    """A column's name as a person reads it."""
    return name.replace("\ufeff", "").strip()


def checked_text(place: str, column: str, value: object) -> str:
    """A cell's text; '' for an empty cell. Raises UserError for anything else, and for what no encoder accepts."""
    if value is None or value != value:  # NaN
        return ""
    if not isinstance(value, str):
        raise UserError(
            f"{place} has a {column} of type {type(value).__name__}: it must be a string; quote the value or write the "
            "column as strings"
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair
        raise UserError(
            f"{place} has an unpaired surrogate at character {error.start + 1} of its {column}: remove it"
        ) from error
    return value


class Unread:
    """Collects which of the columns that are not read hold text, from the first rows."""

    def __init__(self) -> None:
        self._filled: dict[str, int] = {}
        self._prose: dict[str, int] = {}

    def see(self, row: Mapping[str, Any], rest: Iterable[str]) -> None:
        for name in rest:
            if isinstance(value := row[name], str) and value.strip():
                self._filled[name] = self._filled.get(name, 0) + 1
                self._prose[name] = self._prose.get(name, 0) + _is_prose(value)

    def found(self) -> tuple[str, ...]:
        """Columns of which at least half the filled cells seen read like text."""
        return tuple(name for name, filled in self._filled.items() if 2 * self._prose[name] >= filled)


def _is_prose(value: str) -> bool:
    """Whether a cell has two words or more; of a script without spaces a run of letters."""
    words = sum(any(map(str.isalpha, part)) for part in value.split())
    return words > 1 or (not value.isascii() and len(_RUN.findall(value)) > 0)


def listed(names: Iterable[str]) -> str:
    """The column names, shortened, since a file without a header has its first texts there."""
    shown = [repr(name if len(str(name)) <= 30 else f"{name[:30]}...") for name in names]
    return ("columns " + ", ".join(shown[:12]) + (", ..." if len(shown) > 12 else "")) if shown else "no columns"


def _named(names: tuple[str, ...], wanted: tuple[str, ...], what: str) -> str:
    """The first of the wanted names, exactly or else without case and outer spaces; empty for none."""
    if exact := next((name for name in wanted if name in names), ""):
        return exact
    for name in wanted:
        alike = [own for own in names if plain(str(own)).casefold() == name]
        if len(alike) > 1:
            raise UserError(
                f"has the columns {alike[0]!r} and {alike[1]!r}, either of which could be its {what}: rename one"
            )
        if alike:
            return alike[0]
    return ""


def _other_separator(names: tuple[str, ...]) -> str:
    """A remedy more for a file whose cells something other than a comma separates."""
    found = next((mark for mark in (";", "\t", "|") if len(names) == 1 and mark in names[0]), None)
    return f"; or separate the columns by commas, not by {found!r}" if found else ""


_KNOWN = {*TEXT_COLUMNS, *LABEL_COLUMNS, PUBMEDQA_LABEL, "source", "topic"}.union(*PUBMEDQA_COLUMNS.values())
_OF_CONVERSATIONS = {
    *MESSAGES,
    *COMPLETIONS,
    *(name for first, second, _ in PAIRS for name in (first, *second)),
    "system",
}
