"""Merge data sets into one that knows its sources, and describe a data set: counts, lengths, evenness of the mix."""

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from zofed.base.errors import UserError
from zofed.data import subsets
from zofed.data.catalog import CATALOG, data_root
from zofed.data.classes import Classes, renumbered
from zofed.data.documents import Document, Reading, documents_digest, random_order, read

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PERCENTILES = (5, 25, 50, 75, 95, 99)
SIGNIFICANCE = 0.01
_LEAST_EXPECTED = 5  # documents of a source in a chunk, below which the chi-square distribution does not hold
_DOCUMENTS_AT_ONCE = 1000


def source_name(dataset: str) -> str:
    """What a data set is called as a source: its name, or the name of its file or folder."""
    return dataset if dataset in CATALOG or subsets.find(dataset) else Path(dataset).stem


def merge(datasets: Sequence[str], folder: Path | None, seed: int, force: bool = False) -> tuple[Path, dict[str, Any]]:
    """Write the documents of several data sets, shuffled by `seed`, as one subset; returns its folder and info.

    Each row has text, source and, where the document has one, label: as it was, or numbered anew by the names that the
    data sets have for their classes, which info.json keeps. The folder is by default NAME_NAME_merged below the data
    root. Raises UserError for fewer than two data sets, two of one name, one that cannot be read or is empty, labels
    that are words in one and numbers in another, and a folder that holds a subset already (`force` exchanges it once
    the new one is whole).
    """
    if len(datasets) < 2:
        raise UserError(f"{len(datasets)} data set(s) cannot be merged: name at least 2")
    names = [source_name(dataset) for dataset in datasets]
    for name, count in Counter(names).items():
        if count > 1:
            raise UserError(f"{count} data sets would both be the source {name!r}: rename a file, or name it once")
    folder = folder or data_root() / f"{'_'.join(names)}_merged"
    if subsets.is_subset(folder) and not force:
        raise UserError(f"{str(folder)!r} holds a subset already: --force replaces it, --out names another folder")
    readings = [read(dataset) for dataset in datasets]
    known = _common_classes(readings)
    loaded = [
        renumbered(reading, known, repr(reading.dataset)) if known and _is_labelled(reading) else reading.documents
        for reading in readings
    ]
    inputs = [
        {"name": name, "documents": len(documents), "documents_sha256": documents_digest(documents)}
        for name, documents in zip(names, loaded, strict=True)
    ]
    # A document of a merged set keeps the source it has there.
    rows = [
        _row(document, name if document.source == dataset else document.source)
        for dataset, name, documents in zip(datasets, names, loaded, strict=True)
        for document in documents
    ]
    with subsets.locked(folder):
        part = folder / "rows.merged.part"
        try:
            with open(part, "w", encoding="utf-8") as file:
                file.writelines(
                    json.dumps(rows[at], ensure_ascii=False) + "\n" for at in random_order(len(rows), "merge", seed)
                )
            named = {"classes": list(known.names), "classes_are_ordered": known.by_number} if known else {}
            info = subsets.publish(folder, part, {"rows": len(rows), "seed": seed, "inputs": inputs} | named)
        finally:
            part.unlink(missing_ok=True)
    return folder, info


def _common_classes(readings: Sequence[Reading]) -> Classes | None:
    """The classes of all labelled data sets together, None where none of them names its own.

    Raises UserError where one has words and another numbers: nobody knows which is which.
    """
    labelled = [reading for reading in readings if _is_labelled(reading)]
    orders = list(dict.fromkeys(reading.names for reading in labelled if reading.names))
    if not orders:
        return None
    words = next((reading for reading in labelled if reading.names and not reading.is_ordered), None)
    numbers = next((reading for reading in labelled if not reading.names), None)
    if numbers and (words or len(orders) > 1):
        other = words or next(reading for reading in labelled if reading.names)
        raise UserError(
            f"the labels of {numbers.dataset!r} are numbers without names, those of {other.dataset!r} mean "
            f"{', '.join(other.names)}: give all of them words (a .label file), or all numbers of the same classes"
        )
    if numbers and max(document.label or 0 for document in numbers.documents) >= len(orders[0]):
        return None  # other classes than the named ones: as they were
    # The names of the first, then those that only later ones have.
    return Classes(tuple(dict.fromkeys(name for names in orders for name in names)), not words and len(orders) == 1)


def _is_labelled(reading: Reading) -> bool:
    return any(document.label is not None for document in reading.documents)


def _row(document: Document, source: str) -> dict[str, Any]:
    row: dict[str, Any] = {"text": document.text, "source": source}
    label = {} if document.label is None else {"label": document.label}
    return row | label | ({"topic": document.topic} if document.topic else {})


@dataclass(frozen=True, slots=True)
class Stats:
    """characters and tokens: the lengths of the documents in order, int64 (n,); duplicates: documents whose exact text
    stood before; sources and labels: documents of each, None being no label."""

    characters: np.ndarray
    tokens: np.ndarray
    duplicates: int
    sources: Counter[str]
    labels: Counter[int | None]


def stats(
    documents: Sequence[Document],
    tokenizer: "PreTrainedTokenizerBase",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Stats:
    """Count a data set. `progress` hears of documents done and their total."""
    tokens: list[int] = []
    for start in range(0, len(documents), _DOCUMENTS_AT_ONCE):
        texts = [document.text for document in documents[start : start + _DOCUMENTS_AT_ONCE]]
        tokens += map(len, tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"])
        progress(len(tokens), len(documents))
    return Stats(
        np.array([len(document.text) for document in documents]),
        np.array(tokens),
        len(documents) - len({document.text for document in documents}),
        Counter(document.source for document in documents),
        Counter(document.label for document in documents),
    )


@dataclass(frozen=True, slots=True)
class Distribution:
    """counts: documents of each source (rows, in the order of `sources`) in each chunk, int64 (sources, chunks)."""

    sources: list[str]
    counts: np.ndarray
    chi_square: float
    freedom: int
    p_value: float

    @property
    def even(self) -> bool:
        return self.p_value >= SIGNIFICANCE


def distribution(documents: Sequence[Document], chunks: int = 0) -> Distribution:
    """Pearson's chi-square test of whether the sources are mixed alike in consecutive chunks of equal size.

    `chunks` 0 takes 10, or as many as leave every source 5 expected documents in each. Raises UserError for a single
    source and for chunks too small to hold that.
    """
    sources = sorted({document.source for document in documents})
    if len(sources) < 2:
        raise UserError(f"the only source is {sources[0]!r}: there is nothing to mix; merge takes at least 2 data sets")
    at = np.array([sources.index(document.source) for document in documents])
    totals = np.bincount(at)
    rarest, most = sources[int(totals.argmin())], int(totals.min()) // _LEAST_EXPECTED
    chosen = chunks or max(2, min(10, most))
    if not 2 <= chosen <= most:
        limit = f"use --chunks 2 to {most}" if most >= 2 else "merge more documents of it"
        raise UserError(
            f"{chosen} chunks do not suit the {totals.min()} documents of source {rarest!r}, at least 2 chunks of "
            f"{_LEAST_EXPECTED} expected documents are needed: {limit}"
        )
    parts = np.array_split(at, chosen)
    counts = np.stack([np.bincount(part, minlength=len(sources)) for part in parts], axis=1)
    expected = np.outer(totals, counts.sum(axis=0)) / len(documents)
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    freedom = (len(sources) - 1) * (chosen - 1)
    return Distribution(sources, counts, chi_square, freedom, chi_square_tail(chi_square, freedom))


def chi_square_tail(value: float, freedom: int) -> float:
    """The probability that a chi-square variable of `freedom` degrees passes `value`."""
    import torch

    if not math.isfinite(value):
        return 0.0
    half = torch.tensor([freedom / 2, value / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))
