"""One row of a task as a model meets it: its tokens, which of them train, and what it chooses among."""

from dataclasses import dataclass
from itertools import groupby

from torch import Tensor

from zofed.base.errors import UserError
from zofed.config import Settings
from zofed.core.candidates import KEY, NO_TOKEN
from zofed.core.metrics import IGNORED_LABEL, Examples
from zofed.data import classes
from zofed.training.task import Task
from zofed.training.tasks import TASKS, read, tokenizer_of


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens that follow one another, as text, and whether the loss counts them."""

    text: str
    trains: bool


@dataclass(frozen=True, slots=True)
class TaskRow:
    """A row, by its number from 1 out of `rows`.

    tokens: of the pieces; trained: of those that the loss counts, and of the candidates. candidates: what may follow or
    fill the text, each as the model reads it; right: the number of the right one from 0. label: the class, by its name.
    """

    number: int
    rows: int
    pieces: tuple[Piece, ...]
    tokens: int = 0
    trained: int = 0
    candidates: tuple[str, ...] = ()
    right: int | None = None
    label: str = ""


def task_row(settings: Settings, number: int) -> TaskRow:
    """Row `number` of the settings' data set, as their model's tokenizer divides it.

    Rows that are left out for want of text do not count. Raises UserError for a number that is not there, and for data
    or settings that a run would refuse.
    """
    task = _whole(settings)
    rows = len(task.train)
    if not 1 <= number <= rows:
        raise UserError(f"row {number} is not there: {settings.dataset!r} has the rows 1 to {rows:,}")
    document = task.train[number - 1]
    if not (document.turns or task.type.has_one_example_a_document):
        return TaskRow(number, rows, (Piece(document.text, True),))
    examples = task.examples([document], cache=False)
    label = task.class_names[document.label] if document.label is not None and task.named else ""
    ids, trains = _tokens(examples)
    pieces = tuple(
        Piece(_text(task, [token for token, _ in run]), is_trained)
        for is_trained, run in groupby(zip(ids, trains, strict=True), key=lambda pair: pair[1])
    )
    if KEY not in examples:
        return TaskRow(number, rows, pieces, len(ids), sum(trains), label=label)
    candidates = [[token for token in own if token != NO_TOKEN] for own in examples[KEY][0].tolist()]
    candidates = [own for own in candidates if own]  # rows may have fewer than the widest
    return TaskRow(
        number,
        rows,
        pieces,
        len(ids),
        sum(map(len, candidates)),
        tuple(_text(task, own) for own in candidates),
        int(examples["labels"][0]),
        label,
    )


def _whole(settings: Settings) -> Task:
    """The task with all of its data as training data, in their order."""
    kind, what = TASKS[settings.task], f"dataset = {settings.dataset!r}"
    found = read(settings, settings.dataset)
    tokenizer = tokenizer_of(settings)
    is_numbered = kind.has_classes and not kind.has_own_candidates(settings)
    named = classes.shown(found, what) if is_numbered else None
    return Task(settings, tokenizer, kind.labelled(settings, found, named, what), [], [], named)


def _tokens(examples: Examples) -> tuple[list[int], list[bool]]:
    """The tokens of the first example without its padding, and which of them the loss counts."""
    ids, labels = examples["input_ids"][0], examples["labels"]
    mask: Tensor = examples.get("attention_mask", ids.new_ones(ids.shape).unsqueeze(0))[0].bool()
    counted = labels[0][mask] != IGNORED_LABEL if labels.dim() > 1 else mask[mask] & False
    return ids[mask].tolist(), counted.tolist()


def _text(task: Task, ids: list[int]) -> str:
    return str(task.tokenizer.decode(ids, clean_up_tokenization_spaces=False))
