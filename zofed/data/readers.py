"""Rows of a local data file or folder, each with the place where it stands, and one-line errors for damaged ones."""

import csv
import io
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zofed.base.errors import UserError
from zofed.base.parsing import from_json
from zofed.base.texts import said_by
from zofed.data import columns, subsets
from zofed.data.cells import column_of
from zofed.data.columns import AS_RECOGNISED, Wanted

SUFFIXES = (".txt", ".label", ".tsv", ".csv", ".json", ".jsonl", ".parquet")

# What begins every line of a .txt file of `label text` lines: an integer, fastText's mark, or TREC's coarse:fine.
_LABELS = (r"\d{1,6}", r"__label__\S+", r"[A-Z]+:[a-z]+")

_TEXT_FILE_DOCUMENT = 2000  # characters

Row = tuple[str, dict[str, Any]]  # where the row stands, for error messages ("line 3 of 'a.jsonl'"), and its columns


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of a file or folder, to be drawn once, and what it calls the classes 0, 1, ... of a column.

    is_ordered: whether that order is the data's own; else the names are words of this file, in sorted order.
    """

    found: Iterator[Row]
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    is_ordered: bool = True


def rows_of_file(path: Path, wanted: Wanted = AS_RECOGNISED) -> Rows:
    """The rows of a .txt, .label, .tsv, .csv, .json, .jsonl or .parquet file, in file order.

    wanted: what is asked for beside the usual; of a parquet file no more is read. Raises UserError for another
    suffix, a missing file and whatever cannot be decoded or parsed, the latter while the rows are drawn; OSError
    where the system refuses to read.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise UserError(f"suffix {suffix!r} of {str(path)!r} is not supported: use one of {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise UserError(f"file {str(path)!r} is missing: restore it, or name another data set")
    if suffix == ".parquet":
        return _parquet_rows(path, wanted)
    if suffix in (".txt", ".label") and (labelled := _label_rows(path)):
        return labelled
    text = _decoded(path)
    if suffix == ".label":
        raise UserError(f"{str(path)!r} has a line without a label and a text: begin every line with its label")
    if suffix == ".txt":
        return Rows((f"document {number} of {str(path)!r}", {"text": text}) for number, text in _grouped(text))
    if suffix == ".tsv":
        return Rows(_tsv_rows(text, path, wanted))
    readers = {".jsonl": _jsonl_rows, ".json": _json_rows, ".csv": _csv_rows}
    return Rows(readers[suffix](text, path))


def _bytes(path: Path) -> bytes:
    """The bytes of a file of text. Raises UserError for UTF-16, which some encodings would take for their own."""
    data = path.read_bytes()
    if data.startswith((b"\xff\xfe", b"\xfe\xff")) or 8 * data[:4096].count(0) > len(data[:4096]):
        raise UserError(
            f"{str(path)!r} is no UTF-8 text but UTF-16, or no text at all: save it as UTF-8, for instance by "
            "iconv -f UTF-16 -t UTF-8"
        )
    return data


def _decoded(path: Path) -> str:
    data = _bytes(path)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise UserError(
            f"line {line} of {str(path)!r} is not UTF-8 (byte {data[error.start]:#04x} at offset {error.start}): "
            "convert the file to UTF-8"
        ) from error
    return text.replace("\r\n", "\n")


def _label_rows(path: Path) -> Rows | None:
    """The rows of a file of `label text` lines, UTF-8 or else Latin-1, or None where it is no such file.

    Of TREC's `DESC:manner` only the coarse DESC counts. Labels that are not all integers are numbered in sorted order.
    In a .txt file every line must begin with the same kind of label and labels must recur: a numbered list is text.
    """
    data = _bytes(path)
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
        return None
    names = [match[1].split(":")[0].removeprefix("__label__") for match in matches if match]
    known = sorted(set(names))
    if kinds is _LABELS and 2 * len(known) > len(names):
        return None
    are_words = not all(_is_integer(name) for name in known)
    numbers = {name: number if are_words else int(name) for number, name in enumerate(known)}
    texts = [match[2] for match in matches if match]
    found = zip(lines, texts, names, strict=True)
    rows = ((f"line {at[0]} of {str(path)!r}", {"text": text, "label": numbers[name]}) for at, text, name in found)
    return Rows(rows, {"label": tuple(known)} if are_words else {}, is_ordered=False)


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
    if text.lstrip().startswith("[") and isinstance(_or_error(text), list):  # an array under the wrong suffix
        yield from _json_rows(text, path)
        return
    # Not splitlines(): JSON strings may hold U+2028 and its like unescaped, which end no line of the file.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            place = f"line {number} of {str(path)!r}"
            yield place, _as_row(place, _parsed(line, place))


def _json_rows(text: str, path: Path) -> Iterator[Row]:
    value = _or_error(text)
    if isinstance(value, Exception):
        lines = [line for line in text.split("\n") if line.strip()]
        if len(lines) > 1 and isinstance(_or_error(lines[0]), dict):  # JSON lines, whatever the suffix says
            yield from _jsonl_rows(text, path)
            return
        value = _parsed(text, repr(str(path)))
    if not isinstance(value, list | dict):
        raise UserError(f"{str(path)!r} holds a JSON {type(value).__name__}: use an array of rows or an object of rows")
    if isinstance(value, dict) and not all(isinstance(row, dict) for row in value.values()):
        value = [value]  # JSON lines of one line
    items = value.items() if isinstance(value, dict) else enumerate(value, 1)
    for key, row in items:
        place = f"row {key} of {str(path)!r}"
        yield place, _as_row(place, row)


def _or_error(text: str) -> object:
    try:
        return from_json(text, pairs=_distinct)
    except ValueError as error:
        return error


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Of two equal keys the library would lose the first in silence."""
    made = dict(pairs)
    if len(made) < len(pairs):
        twice = next(key for at, (key, _) in enumerate(pairs) if key in (other for other, _ in pairs[:at]))
        raise ValueError(f"one object has two keys {twice!r}")
    return made


def _parsed(text: str, place: str) -> object:
    value = _or_error(text)
    if isinstance(value, Exception):
        raise UserError(f"{place} is not valid JSON ({said_by(value)}): mend or remove it") from value
    return value


def _as_row(place: str, value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f'{place} is a JSON {type(value).__name__}: it must be an object such as {{"text": "..."}}')
    return value


def _tsv_rows(text: str, path: Path, wanted: Wanted) -> Iterator[Row]:
    lines = [(number, line.split("\t")) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        return
    first = lines[0][1]
    if columns.is_header(first, wanted):
        lines = lines[1:]
    elif len(first) == 1:
        first = ["text"]
    elif len(first) == 2 and any(_is_integer(cell) for cell in first):
        first = ["text", "label"] if _is_integer(first[1]) else ["label", "text"]
    yield from _table_rows(first, lines, path)


def _csv_rows(text: str, path: Path) -> Iterator[Row]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    limit = csv.field_size_limit(sys.maxsize)  # a long document is no error
    lines, began = [], 1  # a quoted cell may hold line ends: the line where the row began is told
    try:
        for cells in reader:
            lines.append((began, cells))
            began = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"line {began} of {str(path)!r} is not valid CSV ({error}): mend its quotes") from error
    finally:
        csv.field_size_limit(limit)
    lines = [(number, cells) for number, cells in lines if cells]
    if lines:
        yield from _table_rows(lines[0][1], lines[1:], path)


def _table_rows(first: list[str], lines: Iterable[tuple[int, list[str]]], path: Path) -> Iterator[Row]:
    names = columns.header(first, f"the header of {str(path)!r}")
    for number, cells in lines:
        place = f"line {number} of {str(path)!r}"
        if len(cells) != len(names):
            raise UserError(f"{place} has {len(cells)} columns where {len(names)} are expected: mend its separators")
        # Not the first row of a file without a header; a file of one column may hold a text like its header.
        if len(names) > 1 and cells == first and cells is not first:
            raise UserError(f"{place} is the header again: remove it, as if files were joined with their headers")
        yield place, dict(zip(names, cells, strict=True))


def _parquet_rows(path: Path, wanted: Wanted) -> Rows:
    import pyarrow
    import pyarrow.parquet

    spoilt = f"{str(path)!r} is not a readable parquet file"
    try:
        # Without reading ahead: of columns that only the first rows are looked at in, no more comes from the disk.
        file = pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=2**20)
        schema = file.schema_arrow
    except (pyarrow.ArrowException, ValueError) as error:
        raise UserError(f"{spoilt} ({said_by(error)}): fetch or write it again") from error
    columns.check_distinct(schema.names, repr(str(path)))
    kinds = pyarrow.types
    texts = [one.name for one in schema if kinds.is_string(one.type) or kinds.is_large_string(one.type)]

    def found() -> Iterator[Row]:
        try:
            paths = [one for one in wanted.names() if one not in schema.names and column_of(one) in schema.names]
            chosen = columns.chosen((*schema.names, *paths), wanted).read
            read = list(dict.fromkeys(column_of(name) if name in paths else name for name in chosen))
        except UserError as error:
            raise UserError(f"row 1 of {str(path)!r} {error}") from None
        try:
            # Web crawls carry large columns beside the text: only the first rows are read with them.
            whole = read + [name for name in texts if name not in read]
            some = next(file.iter_batches(columns.SAMPLED, columns=whole), None)
            rows = some.to_pylist() if some is not None else []
            rows += pyarrow.parquet.read_table(path, columns=read).slice(len(rows)).to_pylist()
        except (pyarrow.ArrowException, ValueError) as error:
            raise UserError(f"{spoilt} ({said_by(error)}): fetch or write it again") from error
        for number, row in enumerate(rows, 1):
            yield f"row {number} of {str(path)!r}", row

    return Rows(found(), _names_in_metadata(schema.metadata))


def _names_in_metadata(metadata: Mapping[bytes, bytes] | None) -> dict[str, tuple[str, ...]]:
    """Names of the classes of each column, as the library datasets writes them into a parquet file."""
    try:
        features = from_json((metadata or {})[b"huggingface"])["info"]["features"]
        return {
            column: tuple(map(str, feature["names"]))
            for column, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
        }
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}


def rows_of_folder(path: Path, wanted: Wanted = AS_RECOGNISED) -> Rows:
    """The rows of a subset that zofed made, or of a folder written by `save_to_disk`.

    Of several splits it gives train and then validation, never test. Raises UserError where the folder is none, is
    damaged or has neither split.
    """
    if subsets.is_subset(path):
        described = subsets.info(path)
        names = tuple(map(str, described.get("classes", ())))
        found = rows_of_file(subsets.rows_file(path), wanted).found
        return Rows(found, {"label": names}, bool(described.get("classes_are_ordered", True)))
    from datasets import ClassLabel, DatasetDict, load_from_disk

    if not any((path / name).is_file() for name in ("dataset_dict.json", "dataset_info.json")):
        raise UserError(
            f"folder {str(path)!r} holds no dataset_dict.json or dataset_info.json: "
            "give a folder written by save_to_disk, or a single file"
        )
    try:
        loaded = load_from_disk(str(path))
    except Exception as error:  # the library documents no common base of what it raises on a damaged folder
        raise UserError(
            f"folder {str(path)!r} is not a readable data set ({said_by(error)}): write it again by save_to_disk"
        ) from error
    splits = loaded if isinstance(loaded, DatasetDict) else {"train": loaded}
    chosen = [name for name in ("train", "validation") if name in splits]
    if not chosen:
        raise UserError(
            f"folder {str(path)!r} holds only the splits {', '.join(map(str, splits))}, neither train nor validation: "
            "name the folder of one split"
        )
    rows = (
        (f"row {number} of split {name} of {str(path)!r}", dict(row))
        for name in chosen
        for number, row in enumerate(splits[name], 1)
    )
    features = splits[chosen[0]].features
    names = {column: tuple(kind.names) for column, kind in features.items() if isinstance(kind, ClassLabel)}
    return Rows(rows, names)


def _is_integer(cell: str) -> bool:
    return cell.strip().removeprefix("-").isdecimal()
