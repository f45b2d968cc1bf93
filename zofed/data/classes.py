"""The classes of a run: their names, and which of them a label of any file means."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from zofed.base.errors import UserError
from zofed.base.parsing import from_json
from zofed.data.documents import Document, Reading

SHOWN = 12  # names in a line
MOST = 2**16  # classes
LONGEST_NAMES = 2**22  # characters of all names in a message


@dataclass(frozen=True, slots=True)
class Classes:
    """names: of the classes 0, 1, ...; of classes that are only numbers "0", "1", ...

    by_number: whether an integer label of a file without names means the class of that number. Not so where the
    training data has words, which have an order in that file alone.
    """

    names: tuple[str, ...]
    by_number: bool = True

    @classmethod
    def numbered(cls, count: int) -> "Classes":
        """Classes that are only numbers."""
        return cls(tuple(map(str, range(count))))

    def __len__(self) -> int:
        return len(self.names)

    def __str__(self) -> str:
        if self.are_numbers:
            return f"0 to {len(self) - 1}"
        return ", ".join(self.names[:SHOWN]) + (", ..." if len(self) > SHOWN else "")

    @property
    def are_numbers(self) -> bool:
        return self.names == tuple(map(str, range(len(self.names))))

    def packed(self) -> str:
        """For a message, beside how many there are; empty for those that are only numbers."""
        return "" if self.are_numbers else json.dumps([self.by_number, *self.names], ensure_ascii=False)

    @classmethod
    def unpacked(cls, count: int, text: str) -> "Classes":
        """What `packed` made. Raises ValueError for anything else."""
        if not 0 <= count <= MOST or len(text) > LONGEST_NAMES:
            raise ValueError(f"{count} classes with names of {len(text):,} characters, more than {MOST:,} or too long")
        if not text:
            return cls.numbered(count)
        found = from_json(text)
        by_number, *names = found if isinstance(found, list) and found else [None]
        texts = tuple(name for name in names if isinstance(name, str))
        if not isinstance(by_number, bool) or not count == len(names) == len(set(texts)):
            raise ValueError(f"{text[:100]!r} does not name {count} classes")
        return cls(texts, by_number)

    def numbers(self, found: Reading, what: str) -> dict[int, int]:
        """The class of each label that occurs in a data set.

        what: names the data set in the UserError of a label that is none of the classes.
        """
        occurring = sorted({document.label for document in found.documents if document.label is not None})
        named = found.names
        if beyond := [label for label in occurring if named and label >= len(named)]:
            raise UserError(
                f"{what} has the label {beyond[0]}, but names only the classes 0 to {len(named) - 1} "
                f"({', '.join(named[:SHOWN])}): correct one of them"
            )
        by_number = self.by_number and (not named or (self.are_numbers and found.is_ordered))
        if by_number:
            if beyond := [label for label in occurring if label >= len(self)]:
                raise UserError(
                    f"{what} has the label {beyond[0]}, but the run's classes are {self}"
                    f"{'' if self.are_numbers else f' (0 to {len(self) - 1})'}: number them as the run does"
                )
            return {label: label for label in occurring}
        if not named:
            raise UserError(
                f"{what} has labels in numbers ({', '.join(map(str, occurring[:SHOWN]))}), but the run's classes are "
                f"words: {self}; give it those words as labels, in a .label file of lines `label text`"
            )
        return {label: self._named(named[label], what) for label in occurring}

    def _named(self, name: str, what: str) -> int:
        """The class of a name, exactly or else without case."""
        if name in self.names:
            return self.names.index(name)
        alike = [number for number, own in enumerate(self.names) if own.casefold() == name.casefold()]
        if len(alike) == 1:
            return alike[0]
        raise UserError(
            f"{what} has the label {name!r}, but the run's classes are {self}: use their names, or leave these rows out"
        )


def of_training(found: Reading, model: str, head: Sequence[str]) -> Classes:
    """The classes of a run that begins, which number every other file of it.

    head: names of the classes of the model's own head, in its order, which then counts; empty: the head is drawn anew,
    and what the data call their classes counts. model: which, for the UserError of data that clash with it, that lack
    labels, that have gaps in their numbers, or words that differ in case alone.
    """
    what = f"dataset = {found.dataset!r}"
    check_labelled(found, what)
    counts = Counter(document.label for document in found.documents if document.label is not None)
    labels = sorted(counts)
    # Of more numbers than a head without names has classes, loading it tells the shapes.
    if head and (found.names or labels[-1] < len(head) or not Classes(tuple(head)).are_numbers):
        return _of_head(found, what, model, tuple(head))
    if len(labels) < 2 or (not found.names and labels != list(range(len(labels)))):
        known = [found.names[label] if label < len(found.names) else str(label) for label in labels[:5]]
        shown = ", ".join(known) + (", ..." if len(labels) > 5 else "")
        raise UserError(
            f"{what} has the labels {shown}: classification takes at least 2 classes, numbered from 0 "
            "without gaps; renumber them"
        )
    label, count = min(counts.items(), key=lambda item: (item[1], item[0]))
    if count < 2:
        name = f"{found.names[label]!r}" if found.names else str(label)
        raise UserError(
            f"{what} has a single document with the label {name}: a class takes at least 2, one to "
            "learn from and one to hold out; add more or drop the class"
        )
    seen: dict[str, str] = {}
    for name in found.names:
        if seen.setdefault(name.casefold(), name) != name:
            raise UserError(f"{what} has the labels {seen[name.casefold()]!r} and {name!r}: spell them alike")
    return Classes(found.names, found.is_ordered) if found.names else Classes.numbered(len(labels))


def _of_head(found: Reading, what: str, model: str, head: tuple[str, ...]) -> Classes:
    classes = Classes(head)
    if classes.are_numbers and found.names and found.is_ordered and len(found.names) == len(head):
        return Classes(found.names)  # the head says nothing; the data know what their numbers mean
    if classes.are_numbers and found.names and not found.is_ordered:
        raise UserError(
            f"{what} has labels in words ({', '.join(found.names[:SHOWN])}), but the head of model {model!r} does not "
            f"say which of its {len(head)} classes is which: write id2label into a copy of its config.json, or number "
            "the labels as it does"
        )
    try:
        classes.numbers(found, what)
    except UserError as error:
        told = str(error).replace("the run's classes", f"those of model {model!r}'s head")
        raise UserError(f"{told}; or correct id2label in a copy of its config.json") from None
    return classes


def shown(found: Reading, what: str) -> Classes:
    """The classes that the labels of a data set show by themselves. Raises UserError as `check_labelled`."""
    check_labelled(found, what)
    labels = [document.label for document in found.documents if document.label is not None]
    return Classes(found.names, found.is_ordered) if found.names else Classes.numbered(1 + max(labels))


def renumbered(found: Reading, classes: Classes, what: str) -> list[Document]:
    """The documents of a data set with the run's numbers as labels, where they have one.

    Raises UserError as `Classes.numbers`.
    """
    numbers = classes.numbers(found, what)
    if all(label == number for label, number in numbers.items()):
        return found.documents
    return [
        document if document.label is None else replace(document, label=numbers[document.label])
        for document in found.documents
    ]


def told(classes: Classes, documents: Sequence[Document]) -> str:
    """One line for people: each class with its number and how many documents it has."""
    counts = Counter(document.label for document in documents)
    shown = [
        f"{number} ({counts[number]:,})" if classes.are_numbers else f"{number} {name} ({counts[number]:,})"
        for number, name in enumerate(classes.names[:SHOWN])
    ]
    return f"{len(classes)} classes: {', '.join(shown)}{', ...' if len(classes) > SHOWN else ''}"


def check_labelled(found: Reading, what: str) -> None:
    """Raise UserError, which begins with `what`, where a document has no label."""
    missing = sum(document.label is None for document in found.documents)
    if missing:
        raise UserError(
            f"{what} has documents without a label ({missing:,} of {len(found.documents):,}; an empty cell or -1 is "
            "none): give one with a label column, or set task to language-model"
        )
