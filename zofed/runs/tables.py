"""Tables of a run: CSV files that grow by a line at a time, and of which after a crash the sure lines are kept."""

import csv
import io
import itertools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from zofed.base.errors import DiskError
from zofed.base.files import open_private, sync_folder, write_private
from zofed.base.texts import is_count

TEXTS = (
    "timestamp",
    "mode",
    "scope",
    "optimizer",
    "source",
    "task",
    "result",
    "metrics",
)  # columns of words; others hold numbers

WHOLE = ("step", "round", "client")  # columns of whole numbers

Row = dict[str, Any]


class Table:
    """A CSV file that grows by whole lines, each handed to the system as it is written.

    A machine that stops at once loses those that were not synced: `sure_rows` finds the ones that stand.
    """

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self.path, self.columns = path, columns
        self._file = open(  # noqa: SIM115, closed by close
            path, "ab", buffering=0, opener=open_private
        )
        if not path.stat().st_size:
            self._add(_line(columns))
            sync_folder(path.parent)

    def write(self, *rows: Row) -> None:
        """Add rows. Raises DiskError where the disk does not take them; half a line is cut when the run goes on."""
        self._add("".join(_line([_cell(row.get(column)) for column in self.columns]) for row in rows))

    def _add(self, text: str) -> None:
        raw = text.encode()
        try:
            written = self._file.write(raw)
        except OSError as error:
            raise DiskError(f"cannot write {self.path}: {error.strerror}; free some space") from error
        if written != len(raw):
            raise DiskError(f"cannot write {self.path}: the disk took {written} of {len(raw)} bytes; free some space")

    def sync(self) -> None:
        """Make all lines so far durable."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise DiskError(f"cannot write {self.path}: {error.strerror}; mend the disk") from error

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _line(cells: Iterable[Any]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue()


def _cell(value: Any) -> Any:
    return repr(value) if isinstance(value, float) else value  # every bit: a resumed run reads its start from here


def read_table(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV file that stand whole, from the first on; none where there is no such file.

    Every cell of a column of numbers is empty or holds one, a whole one of the columns WHOLE.
    """
    return list(itertools.takewhile(_is_whole, _sure(path)[1]))


def sure_rows(path: Path, columns: Sequence[str], stands: Callable[[int, Mapping[str, str]], bool]) -> list[Row]:
    """The rows of a table that a crash left, from the first on, as far as each is whole and `stands`.

    columns: the table's; a file whose header names another has no sure row. stands: of a row's index and the row.
    """
    header, rows = _sure(path)
    if not set(header) <= set(columns):
        return []
    pairs = itertools.takewhile(lambda pair: _is_whole(pair[1]) and stands(*pair), enumerate(rows))
    return [row for _, row in pairs]


def keep_rows(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Make a table hold these rows alone, whole or not at all; a file that is not there stays so without any.

    Raises DiskError where the disk does not take it.
    """
    lines = (_line([_cell(row.get(column)) for column in columns]) for row in rows)
    text = _line(columns) + "".join(lines)
    try:
        before = path.read_bytes() if path.exists() else None
        if before != text.encode() and (rows or before is not None):
            write_private(path, text)
    except OSError as error:
        raise DiskError(f"cannot write {path}: {error.strerror}; free some space") from error


def cut(path: Path, column: str, last: int) -> None:
    """Let go of the rows behind a round, by its column, and of what is not whole behind them.

    Raises DiskError where the disk does not take it.
    """
    header, rows = _sure(path)
    kept = [row for row in rows if is_count(row.get(column, "")) and int(row[column]) <= last]
    if len(kept) < len(rows):
        keep_rows(path, header, kept)


def _sure(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Header and rows of a file, up to the first that is cut or has more or fewer cells than the header."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return [], []
    raw = raw.split(b"\0", 1)[0]  # what was never written reads as zeros
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        text = raw[: error.start].decode()
    text = text[: text.rfind("\n") + 1]
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] = []
    rows: list[dict[str, str]] = []
    try:
        header = next(reader, [])
        for cells in reader:
            if len(cells) != len(header):
                break
            rows.append(dict(zip(header, cells, strict=True)))
    except csv.Error:
        pass
    return header, rows


def _is_whole(row: Mapping[str, str]) -> bool:
    """Whether every cell of a column of numbers is empty or holds one."""
    try:
        return all(isinstance(float(cell or 0), float) for column, cell in row.items() if column not in TEXTS) and all(
            is_count(row[column]) for column in WHOLE if row.get(column)
        )
    except ValueError:
        return False
