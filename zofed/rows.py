"""Rows of a local data file or folder, each with the place where it stands, and one-line errors for damaged ones."""

import csv
import io
import json
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from zofed import subsets
from zofed.errors import UserError

TEXT_COLUMNS = ("text", "sentence", "content")
PUBMEDQA_COLUMNS = {
    "question": ("question", "context", "long_answer"),  # the hub's spelling
    "QUESTION": ("QUESTION", "CONTEXTS", "LONG_ANSWER"),  # the original repository's spelling
}
_READ_COLUMNS = {*TEXT_COLUMNS, "label", "final_decision", "source", "topic"}.union(*PUBMEDQA_COLUMNS.values())

_SUFFIXES = (".txt", ".label", ".tsv", ".csv", ".json", ".jsonl", ".parquet")

# What begins every line of a .txt file of `label text` lines: an integer, fastText's mark, or TREC's coarse:fine.
_LABELS = (r"\d{1,6}", r"__label__\S+", r"[A-Z]+:[a-z]+")

_TEXT_FILE_DOCUMENT = 2000  # characters

Row = tuple[str, dict[str, Any]]  # where the row stands, for error messages ("line 3 of 'a.jsonl'"), and its columns


def rows_of_file(path: Path) -> Iterator[Row]:
    """The rows of a .txt, .label, .tsv, .csv, .json, .jsonl or .parquet file, in file order.

    Raises UserError for another suffix, a missing file and whatever cannot be decoded or parsed, the latter while the
    rows are drawn; OSError where the system refuses to read.
    """
    suffix = path.suffix.lower()
    if suffix not in _SUFFIXES:
        raise UserError(f"suffix {suffix!r} of {str(path)!r} is not supported: use one of {', '.join(_SUFFIXES)}")
    if not path.is_file():
        raise UserError(f"file {str(path)!r} is missing: restore it, or name another data set")
    if suffix == ".parquet":
        return _parquet_rows(path)
    if suffix in (".txt", ".label") and (labelled := _label_rows(path)):
        return iter(labelled)
    text = _decoded(path)
    if suffix == ".label":
        raise UserError(f"{str(path)!r} has a line without a label and a text: begin every line with its label")
    if suffix == ".txt":
        return ((f"document {number} of {str(path)!r}", {"text": text}) for number, text in _grouped(text))
    if suffix == ".jsonl":
        return _jsonl_rows(text, path)
    if suffix == ".json":
        return _json_rows(text, path)
    return _tsv_rows(text, path) if suffix == ".tsv" else _csv_rows(text, path)


def _decoded(path: Path) -> str:
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise UserError(
            f"line {line} of {str(path)!r} is not UTF-8 (byte {data[error.start]:#04x} at offset {error.start}): "
            "convert the file to UTF-8"
        ) from error
    return text.replace("\r\n", "\n")


def _label_rows(path: Path) -> list[Row]:
    """The rows of a file of `label text` lines, UTF-8 or else Latin-1, or none where it is no such file.

    Of TREC's `DESC:manner` only the coarse DESC counts. Labels that are not all integers are numbered in sorted order.
    In a .txt file every line must begin with the same kind of label and labels must recur: a numbered list is text.
    """
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = data.decode("latin-1")
    lines = [(number, line.rstrip("\r")) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    kinds = (r"\S+",) if path.suffix.lower() == ".label" else _LABELS
    for kind in kinds:
        matches = [re.match(rf"({kind})[ \t]+(\S.*)", line) for _, line in lines]
        if lines and all(matches):
            break
    else:
        return []
    names = [match[1].split(":")[0].removeprefix("__label__") for match in matches if match]
    known = sorted(set(names))
    if kinds is _LABELS and 2 * len(known) > len(names):
        return []
    numbers = {name: number for number, name in enumerate(known)}
    if all(_is_integer(name) for name in known):
        numbers = {name: int(name) for name in known}
    texts = [match[2] for match in matches if match]
    found = zip(lines, texts, names, strict=True)
    return [(f"line {at[0]} of {str(path)!r}", {"text": text, "label": numbers[name]}) for at, text, name in found]


def _grouped(text: str) -> Iterator[tuple[int, str]]:
    """Numbered documents of about 2,000 characters; a document ends where its next paragraph would pass that."""
    number, paragraphs, length = 1, [], 0
    for paragraph in _paragraphs(text):
        if paragraphs and length + len(paragraph) > _TEXT_FILE_DOCUMENT:
            yield number, "\n\n".join(paragraphs)
            number, paragraphs, length = number + 1, [], 0
        paragraphs.append(paragraph)
        length += len(paragraph)
    if paragraphs:
        yield number, "\n\n".join(paragraphs)


def _paragraphs(text: str) -> Iterator[str]:
    lines = []
    for line in [*text.split("\n"), ""]:
        if line.strip():
            lines.append(line)
        elif lines:
            yield "\n".join(lines)
            lines = []


def _jsonl_rows(text: str, path: Path) -> Iterator[Row]:
    # Not splitlines(): JSON strings may hold U+2028 and its like unescaped, which end no line of the file.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            place = f"line {number} of {str(path)!r}"
            yield place, _as_row(place, _parsed(line, place))


def _json_rows(text: str, path: Path) -> Iterator[Row]:
    value = _parsed(text, repr(str(path)))
    if not isinstance(value, list | dict):
        raise UserError(f"{str(path)!r} holds a JSON {type(value).__name__}: use an array of rows or an object of rows")
    items = value.items() if isinstance(value, dict) else enumerate(value, 1)
    for key, row in items:
        place = f"row {key} of {str(path)!r}"
        yield place, _as_row(place, row)


def _parsed(text: str, place: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place} is not valid JSON ({one_line(error)}): mend or remove it") from error


def _as_row(place: str, value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f'{place} is a JSON {type(value).__name__}: it must be an object such as {{"text": "..."}}')
    return value


def _tsv_rows(text: str, path: Path) -> Iterator[Row]:
    lines = [(number, line.split("\t")) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        return
    header = lines[0][1]
    if any(name in _READ_COLUMNS for name in header):
        lines = lines[1:]
    elif len(header) == 1:
        header = ["text"]
    elif len(header) == 2 and any(_is_integer(cell) for cell in header):
        header = ["text", "label"] if _is_integer(header[1]) else ["label", "text"]
    yield from _table_rows(header, lines, path)


def _csv_rows(text: str, path: Path) -> Iterator[Row]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    limit = csv.field_size_limit(sys.maxsize)  # a long document is no error
    try:
        lines = [(reader.line_num, cells) for cells in reader if cells]
    except csv.Error as error:
        raise UserError(
            f"line {reader.line_num} of {str(path)!r} is not valid CSV ({error}): mend its quotes"
        ) from error
    finally:
        csv.field_size_limit(limit)
    if lines:
        yield from _table_rows(lines[0][1], lines[1:], path)


def _table_rows(header: list[str], lines: Iterable[tuple[int, list[str]]], path: Path) -> Iterator[Row]:
    for number, cells in lines:
        place = f"line {number} of {str(path)!r}"
        if len(cells) != len(header):
            raise UserError(f"{place} has {len(cells)} columns where {len(header)} are expected: mend its separators")
        yield place, dict(zip(header, cells, strict=True))


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        names = pyarrow.parquet.read_schema(path).names
        # Web crawls carry large metadata beside the text: leave it on disk, unless it is all that the error can list.
        columns = [name for name in names if name in _READ_COLUMNS] or names
        rows = pyarrow.parquet.read_table(path, columns=columns).to_pylist()
    except (pyarrow.ArrowException, ValueError) as error:
        raise UserError(
            f"{str(path)!r} is not a readable parquet file ({one_line(error)}): fetch or write it again"
        ) from error
    for number, row in enumerate(rows, 1):
        yield f"row {number} of {str(path)!r}", row


def rows_of_folder(path: Path) -> Iterator[Row]:
    """The rows of a subset that zofed made, or of a folder written by `save_to_disk`.

    Of several splits it gives train and then validation, never test. Raises UserError while the rows are drawn, where
    the folder is none, is damaged or has neither split.
    """
    if subsets.is_subset(path):
        yield from rows_of_file(subsets.rows_file(path))
        return
    from datasets import DatasetDict, load_from_disk

    if not any((path / name).is_file() for name in ("dataset_dict.json", "dataset_info.json")):
        raise UserError(
            f"folder {str(path)!r} holds no dataset_dict.json or dataset_info.json: "
            "give a folder written by save_to_disk, or a single file"
        )
    try:
        loaded = load_from_disk(str(path))
    except Exception as error:  # the library documents no common base of what it raises on a damaged folder
        raise UserError(
            f"folder {str(path)!r} is not a readable data set ({one_line(error)}): write it again by save_to_disk"
        ) from error
    splits = loaded if isinstance(loaded, DatasetDict) else {"train": loaded}
    chosen = [name for name in ("train", "validation") if name in splits]
    if not chosen:
        raise UserError(
            f"folder {str(path)!r} holds only the splits {', '.join(map(str, splits))}, neither train nor validation: "
            "name the folder of one split"
        )
    for name in chosen:
        for number, row in enumerate(splits[name], 1):
            yield f"row {number} of split {name} of {str(path)!r}", dict(row)


def _is_integer(cell: str) -> bool:
    return cell.strip().removeprefix("-").isdecimal()


def one_line(error: BaseException) -> str:
    """The error's own words without line ends, or its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__
