"""From a data set's name or a local file to documents, and from documents to disjoint parts of them."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from zofed.base.errors import UserError
from zofed.base.files import shipped
from zofed.base.texts import printable, said_by
from zofed.data import columns, labels, subsets
from zofed.data.catalog import CATALOG, data_root, suggestion
from zofed.data.cells import with_paths
from zofed.data.columns import AS_RECOGNISED, Columns, Roles, Unread, Wanted, checked_text
from zofed.data.conversations import Conversations, Turn, candidates_of, text_of
from zofed.data.labels import DECISIONS, Labels, decision, of_candidates
from zofed.data.readers import Rows, rows_of_file, rows_of_folder
from zofed.data.templates import Template

# Found by __file__, since Flower runs an installed copy of the app from somebody else's working folder.
SHIPPED = shipped("datasets_subset")

_SHIPPED_FILES = {
    "sample-dclm": ("dclm/train.jsonl",),
    "sample-pubmedqa": ("pubmedqa/train.jsonl",),
    "sample-alpaca": ("alpaca/train.jsonl",),
    "sample-sst2": ("sst2/train.jsonl", "sst2/validation.jsonl"),
}
KNOWN_NAMES = (*_SHIPPED_FILES, "pydoc")


@dataclass(frozen=True, slots=True)
class Document:
    """One text, the name of the data set it came from, its class and its topic where the data set has them.

    topic: '' where there is none; it never matters to training, only to who holds what. candidates: what may follow the
    text, where each row has its own; the label says which does. turns: of a conversation, whose text is empty.
    """

    text: str
    source: str
    label: int | None = None
    topic: str = ""
    candidates: tuple[str, ...] = ()
    turns: tuple[Turn, ...] = ()

    @property
    def size(self) -> int:
        """Characters of its text or turns."""
        return len(self.text) + sum(len(turn.text) for turn in self.turns)


@dataclass(frozen=True, slots=True)
class Reading:
    """The documents of a data set and what was read of it.

    read: the columns that were; unread: those that hold text and were not. blank: rows left out because their text is
    blank. names: what the data call the labels 0, 1, ..., if anything; is_ordered: whether that order is the data's
    own, so that a number means the same class elsewhere, or just that of the words' letters. shape: of conversations,
    with its columns or roles. left_out: what of them was, in sentences.
    """

    dataset: str
    documents: list[Document]
    read: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    blank: int = 0
    names: tuple[str, ...] = ()
    is_ordered: bool = True
    shape: str = ""
    left_out: tuple[str, ...] = ()

    def told(self) -> str:
        """One line for people."""
        name = os.path.basename(self.dataset) if os.path.isabs(self.dataset) else self.dataset
        parts = [f"{len(self.documents):,} documents of {name}"]
        if self.read or self.shape:
            parts.append(f"read from {', '.join(part for part in (self.shape, *self.read) if part)}")
        if self.unread:
            parts.append(f"text that was NOT read: {', '.join(self.unread)}")
        if self.blank:
            parts.append(f"{self.blank:,} rows without text left out")
        parts += self.left_out
        return "; ".join(parts)

    def facts(self) -> dict[str, Any]:
        """The same for a summary."""
        return {
            "dataset": self.dataset,
            "documents": len(self.documents),
            "columns_read": list(self.read),
            "text_columns_not_read": list(self.unread),
            "blank_rows": self.blank,
            **({"shape": self.shape} if self.shape else {}),
            **({"left_out": list(self.left_out)} if self.left_out else {}),
        }


def load_documents(dataset: str) -> list[Document]:
    """Read every document of a data set, in a fixed order: the documents of `read`."""
    return read(dataset).documents


def read(dataset: str, template: Template | None = None, roles: Roles = (), *, turns: bool = False) -> Reading:
    """Read every document of a data set, in a fixed order, and say which columns were read.

    `dataset` is a shipped sample ('sample-dclm', 'sample-pubmedqa', 'sample-alpaca', 'sample-sst2': train rows, then
    validation rows), 'pydoc' (Python's own reference prose, one document a topic, sorted by topic name), the name of a
    subset that `zofed data` put under the data root, or a path:

    - .txt: paragraphs, which blank lines separate, are grouped into documents of about 2,000 characters; a longer
      paragraph stays whole; a file of nothing but `label text` lines gives one document a line, see `data.readers`;
    - .label: `label text` lines;
    - .tsv: tabs separate, quotes mean nothing; the header may be missing when there are one or two columns (the text,
      and an integer label on either side of it);
    - .csv: with a header;
    - .json: an array of rows, or an object of rows keyed by id;
    - .jsonl: one row a line;
    - .parquet;
    - a folder written by the library datasets' `save_to_disk`: of several splits, train and then validation;
    - a folder written by `zofed data download` or `merge`.

    The text is the first of the columns text, sentence, content; a PubMedQA row (either spelling) gives its question,
    contexts and long answer as one text, and the label 0, 1 or 2 for yes, no or maybe; a row without a text but with a
    conversation (see `columns.Shape`) its turns as one. The column label, if there, holds integers from 0, of which -1
    marks a hidden label and counts as none, or words, numbered in sorted order. A column labels is taken for it where
    it holds such. Case and outer spaces of these names do not count. The column source, if there, names where a row
    came from. The column topic (or category, or task), if there, names what a row is about; sample-dclm's topics are
    the first parts of its urls' paths. Rows whose text is blank are left out.

    template: makes the text of each row's columns, among which `text` is what is read without one; of a conversation
    the prompt. roles: columns of other names, see `columns.roles_of`. turns: rows are read as conversations.

    Raises UserError where the name is unknown, nothing is found, or a row cannot be read.
    """
    if dataset == "pydoc":
        from pydoc_data.topics import topics

        texts = ((name, topics[name]) for name in sorted(topics))
        if turns or roles:
            raise UserError(f"data set {dataset!r} is text alone, without columns or conversations: name another")
        if template:
            texts = ((name, template.render({"text": text}, f"topic {name!r}")) for name, text in texts)
        return Reading(dataset, [Document(text, dataset) for _, text in texts])
    path = subsets.find(dataset) or Path(os.path.expanduser(dataset))
    if dataset not in _SHIPPED_FILES and (not dataset or not path.exists()):
        if dataset in CATALOG:
            raise UserError(
                f"data set {dataset!r} is not on this machine (looked in {data_root()}): zofed data download {dataset} "
                "fetches it"
            )
        raise UserError(
            f"data set {dataset!r} is neither a known name nor an existing path{_place(path)}: {suggestion(dataset)}"
            f"use one of {', '.join(KNOWN_NAMES)}, a name of zofed data list, or the path of a local file or folder"
        )
    wanted = Wanted(template.columns if template else (), roles, turns)
    try:
        if dataset in _SHIPPED_FILES:
            rows = Rows(row for name in _SHIPPED_FILES[dataset] for row in rows_of_file(SHIPPED / name).found)
        else:
            rows = rows_of_folder(path, wanted) if path.is_dir() else rows_of_file(path, wanted)
        return _reading(rows, dataset, template, wanted)
    except OSError as error:
        raise UserError(
            f"data set {dataset!r} cannot be read ({said_by(error)}): check that the file is whole and readable"
        ) from error


def documents_digest(documents: Sequence[Document]) -> str:
    """SHA-256 (hexadecimal) over texts and labels in order; lengths come first, so no two sequences share a framing."""
    digest = hashlib.sha256(len(documents).to_bytes(8, "little"))
    for document in documents:
        text = document.text.encode()
        label = b"none" if document.label is None else b"label %d" % document.label
        digest.update(b"%d %d " % (len(text), len(label)) + text + label)
        for kind, part in (
            *(("candidate", candidate) for candidate in document.candidates),
            *((turn.role, turn.text) for turn in document.turns),
        ):
            digest.update(b"%s %d " % (kind.encode(), len(part.encode())) + part.encode())
    return digest.hexdigest()


def split_held_out(
    documents: Sequence[Document], share: float, seed: int, purpose: str = "held out"
) -> tuple[list[Document], list[Document]]:
    """Split into (train, held out) by document, each side in the given order.

    Held out are the round(share * n) documents, at least one and at most n - 1, that a permutation drawn from
    (purpose, seed) puts first. Raises UserError unless 0 < share < 1 and there are at least two documents.
    """
    if not 0 < share < 1:
        raise UserError(f"held-out share {share} is not between 0 and 1: use a fraction such as 0.1")
    if len(documents) < 2:
        raise UserError(
            f"{len(documents)} document(s) cannot be split into training and held-out documents, which takes 2: "
            "use a larger data set, or separate the paragraphs of a .txt file by blank lines"
        )
    count = min(max(round(share * len(documents)), 1), len(documents) - 1)
    held_out = set(random_order(len(documents), purpose, seed)[:count].tolist())
    train = [document for position, document in enumerate(documents) if position not in held_out]
    return train, [documents[position] for position in sorted(held_out)]


def shard(documents: Sequence[Document], client: int, clients: int, seed: int) -> list[Document]:
    """The documents of client 0 <= client < clients.

    Over all clients the shards are disjoint, cover everything and differ in size by at most one; a permutation drawn
    from `seed` decides. Raises UserError when there are more clients than documents or `client` is out of range.
    """
    check_share(len(documents), client, clients)
    return [documents[position] for position in random_order(len(documents), "shard", seed)[client::clients]]


def check_share(count: int, client: int, clients: int) -> None:
    """Raise UserError where `clients` are more than the `count` documents, or `client` is not one of them."""
    if clients > count:
        raise UserError(
            f"{clients} clients are more clients than documents ({count}): "
            "use fewer clients or a data set of more documents"
        )
    if not 0 <= client < clients:
        raise UserError(f"client {client} is not one of {clients} clients: use 0 to {clients - 1}")


@lru_cache(maxsize=64)
def random_order(count: int, purpose: str, *numbers: int) -> np.ndarray:
    """A permutation of range(count), int64 (count,) and read-only: a pure function of the arguments.

    Positions are sorted by the raw words of a Philox stream, which numpy keeps stable between versions; it makes no
    such promise for `Generator.permutation`.
    """
    words = " ".join([purpose, *map(str, numbers)]).encode()
    key = int.from_bytes(hashlib.blake2b(words, digest_size=16).digest(), "little")
    order = np.random.Philox(key=key).random_raw(count).argsort(kind="stable")
    order.flags.writeable = False  # the cache hands the same array to every caller
    return order


def _place(path: Path) -> str:
    """Where a relative path or one below ~ was looked for; the working folder may not be what a person thinks."""
    return f" (there is no {str(path.absolute())!r})" if path.name else ""


def _reading(rows: Rows, dataset: str, template: Template | None, wanted: Wanted) -> Reading:
    documents: list[Document] = []
    found: dict[str, None] = {}  # in the order they are met
    unread, found_labels, chats, blank, label_column, strict = Unread(), Labels(), Conversations(), 0, "", False
    for number, (place, row) in enumerate(rows.found):
        row = with_paths(row, wanted.names())
        layout = _layout(place, row, wanted)
        if number < columns.SAMPLED:
            unread.see(row, layout.rest)
        found |= dict.fromkeys(name for name in layout.read if not layout.shape or name not in layout.shape.columns)
        label_column, strict = layout.label or label_column, strict or layout.strict
        text, turns, candidates, label = _content(place, row, layout, template, wanted, chats)
        if text.strip() or turns:
            found_labels.add(place, label)
            source, topic = _source(place, row, layout, dataset), _topic(row, layout, dataset)
            documents.append(Document(text, source, None, topic, candidates, turns))
        elif not layout.shape:
            blank += 1
    if not documents:
        what = "; ".join(chats.left_out) or "0 rows hold text"
        raise UserError(f"data set {dataset!r} is empty: {what}, at least 1 is needed; use another data set")
    numbers, words, is_ordered = found_labels.numbered(strict=strict)
    documents = [
        document if number is None else replace(document, label=number)
        for document, number in zip(documents, numbers, strict=True)
    ]
    names = words or (tuple(DECISIONS) if label_column == columns.PUBMEDQA_LABEL else rows.names.get(label_column, ()))
    if not names and dataset in CATALOG:
        names = CATALOG[dataset].classes
    read, rest, names = (tuple(map(printable, texts)) for texts in (found, unread.found(), names))  # for terminals, too
    is_ordered = is_ordered and (rows.is_ordered or bool(words))
    return Reading(dataset, documents, read, rest, blank, names, is_ordered, chats.told, chats.left_out)


def _content(
    place: str, row: dict[str, Any], layout: Columns, template: Template | None, wanted: Wanted, chats: Conversations
) -> tuple[str, tuple[Turn, ...], tuple[str, ...], int | str | None]:
    """A row's text, or its turns where those are wanted; its candidates, and its label."""
    named, label = row | {role: row[names[0]] for role, names in wanted.roles}, _label(place, row, layout)
    if layout.shape and wanted.turns:
        prompt = template.render(named, place) if template else None
        return "", chats.turns(place, row, layout.shape, prompt), (), label
    candidates = candidates_of(place, row, layout.candidates) if layout.candidates else ()
    if candidates:
        label = of_candidates(place, label, candidates)
    text = text_of(chats.turns(place, row, layout.shape)) if layout.shape else _text(place, row, layout)
    if template:
        values = named | ({"text": text} if layout.text[0] or layout.shape else {})
        text, candidates = template.render(values, place), template.candidates(values, candidates, place)
    return text, (), candidates, label


def _source(place: str, row: dict[str, Any], layout: Columns, dataset: str) -> str:
    """Where a row came from: what its column for it says, as one printable line, else the data set.

    Raises UserError for a cell without a name, so that no source is called ''.
    """
    source = row[layout.source] if layout.source else dataset
    if type(source) is int:
        return str(source)
    if not isinstance(source, str) or not source.strip():
        raise UserError(f"{place} has an empty source ({source!r}): name where the row came from, or drop the column")
    return printable(source) if layout.source else source


def _topic(row: dict[str, Any], layout: Columns, dataset: str) -> str:
    topic = row[layout.topic] if layout.topic else None
    if topic is None and dataset == "sample-dclm":  # generated with https://example.org/TOPIC/...; other urls say less
        topic = urlsplit(row["url"]).path.split("/")[1]
    return "" if topic is None or topic != topic else str(topic).strip()  # NaN: an empty cell


def text_and_label(place: str, row: dict[str, Any]) -> tuple[str, int | str | None]:
    """A row's text ('' where it has none) and class; `place` names the row in the UserError of a wrong one."""
    layout = _layout(place, row, AS_RECOGNISED)
    return _text(place, row, layout), _label(place, row, layout)


def _layout(place: str, row: dict[str, Any], wanted: Wanted) -> Columns:
    try:
        return columns.chosen(tuple(row), wanted)
    except UserError as error:
        raise UserError(f"{place} {error}") from None


def _text(place: str, row: dict[str, Any], layout: Columns) -> str:
    if layout.is_pubmedqa:
        return _pubmedqa_text(place, row, layout.text)
    return checked_text(place, layout.text[0], row[layout.text[0]]) if layout.text[0] else ""


def _label(place: str, row: dict[str, Any], layout: Columns) -> int | str | None:
    value = row.get(layout.label) if layout.label else None
    if layout.label == columns.PUBMEDQA_LABEL:
        return decision(place, value)
    try:
        return labels.read(place, value)
    except UserError:
        if layout.strict:
            raise
        return None  # `labels` may be many other things: lists of words, of tokens


def _pubmedqa_text(place: str, row: dict[str, Any], columns: tuple[str, ...]) -> str:
    question, context, long_answer = (row.get(column) for column in columns)
    contexts = context.get("contexts") if isinstance(context, dict) else context
    if not isinstance(contexts, list):
        raise UserError(
            f"{place} has a {columns[1]} without a list of contexts: "
            'use PubMedQA\'s own schema, {"contexts": ["...", "..."]} or a list'
        )
    parts = [(columns[0], question), *((columns[1], part) for part in contexts), (columns[2], long_answer)]
    texts = [checked_text(place, column, part) for column, part in parts]
    return "\n".join(text for text in texts if text.strip())
