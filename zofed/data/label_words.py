"""The setting label-words: a word for each class, by order or by name, or templates of what follows a row's prompt."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from zofed.base.errors import UserError
from zofed.base.parsing import from_json

KEY = "label-words"
CANDIDATE = "candidate"  # in a template: each of the row's own candidates in turn

_PIECES = re.compile(r"(?:\{\{.*?\}\}|\{%.*?%\}|[^,])+|(?<=,)(?=,)|^(?=,)|(?<=,)$", re.DOTALL)  # empty ones too


@dataclass(frozen=True, slots=True)
class LabelWords:
    """texts: what follows a prompt, in the classes' order, or (names) each in the class of that name; none: empty."""

    texts: tuple[str, ...] = ()
    names: tuple[str, ...] = ()

    @property
    def are_templates(self) -> bool:
        """Whether rows fill them, each its own."""
        return any("{{" in text or "{%" in text for text in self.texts)

    def of(self, classes: Sequence[str]) -> tuple[str, ...]:
        """A word for each of these classes. Raises UserError where they are not as many, or have other names."""
        if len(self.texts) != len(classes):
            raise UserError(
                f"{KEY} are {len(self.texts)} words ({', '.join(map(repr, self.texts[:12]))}), but there are "
                f"{len(classes)} classes ({', '.join(classes[:12])}): give a word for each"
            )
        if not self.names:
            return self.texts
        by_name = dict(zip(self.names, self.texts, strict=True))
        if unknown := [name for name in self.names if name not in classes]:
            raise UserError(
                f"{KEY} name {unknown[0]!r}, which is none of the classes {', '.join(classes[:12])}: use their names"
            )
        return tuple(by_name[name] for name in classes)


def label_words(setting: str) -> LabelWords:
    """What the setting says: words by commas, a space before one belonging to it; 'name=word, ...'; or a JSON list or
    object of strings, for words that hold commas. Raises UserError for anything else, and for a word twice.
    """
    if not setting:
        return LabelWords()
    found = _written(setting)
    names, texts = (tuple(found), tuple(found.values())) if isinstance(found, dict) else ((), tuple(found))
    one_for_all = len(texts) == 1 and LabelWords(texts).are_templates
    if not all(text.strip() for text in texts) or (len(texts) < 2 and not one_for_all):
        raise UserError(
            f"{KEY} = {setting!r}: give a word for each class, separated by commas, in the order of the labels, such "
            "as ' terrible, great', or by name: 'negative= terrible, positive= great'"
        )
    if len(set(texts)) < len(texts):
        shown = ", ".join(map(repr, texts))
        raise UserError(f"{KEY} = {setting!r} has one word twice ({shown}): give each class a word of its own")
    return LabelWords(texts, names)


def _written(setting: str) -> Sequence[str] | Mapping[str, str]:
    start = setting.lstrip()
    if start.startswith("[") or (start.startswith("{") and not start.startswith(("{{", "{%"))):
        return _json(setting)
    pieces = _PIECES.findall(setting)
    named = [match for piece in pieces if (match := re.match(r"\s*([^={}]*[^={}\s])\s*=(.*)$", piece, re.DOTALL))]
    if not named:
        return pieces
    if len(named) < len(pieces):
        raise UserError(
            f"{KEY} = {setting!r} has some words with the name of a class and some without: name all or none; words "
            'that hold = or a comma go into a JSON list, such as ["a=b", "c"]'
        )
    return _once(setting, [(match[1], match[2]) for match in named])


def _json(setting: str) -> Sequence[str] | Mapping[str, str]:
    try:
        found = from_json(setting, pairs=lambda pairs: _once(setting, pairs))
    except ValueError as error:
        raise UserError(
            f'{KEY} = {setting!r} begins like JSON but is none ({error}): write ["yes, please", "no"], or a plain list'
        ) from error
    values = list(found.values()) if isinstance(found, dict) else found
    if not all(isinstance(value, str) for value in values):
        raise UserError(f'{KEY} = {setting!r}: a JSON list of words holds strings alone, such as ["yes, please", "no"]')
    return found


def _once(setting: str, pairs: Sequence[tuple[str, str]]) -> dict[str, str]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise UserError(f"{KEY} = {setting!r} names a class twice: give each class one word")
    return found
