"""Fetch the first rows of a data set from the hub, or from a local copy of it, into a subset; resumable."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from zofed.base.errors import UserError
from zofed.base.files import write_whole
from zofed.base.parsing import from_json
from zofed.base.texts import said_by
from zofed.data import columns, documents, hub, subsets
from zofed.data.catalog import DatasetInfo

_ROWS_BETWEEN_STATES = 500

Progress = Callable[[int, int], None]  # rows written so far, rows wanted


def download(
    entry: DatasetInfo,
    folder: Path,
    *,
    samples: int,
    revision: str = "",
    config: str = "",
    source: Path | None = None,
    force: bool = False,
    progress: Progress = lambda done, wanted: None,
) -> dict[str, Any]:
    """Write the first `samples` rows that hold text (0: all) to the subset in `folder`; returns its info.

    `source`, a local folder of parquet or JSON-lines files in the hub's schema, stands in for the hub. Rows are
    streamed. After an interruption the same request goes on from the last state written; a finished one is returned at
    once.
    Raises UserError for a request other than the one that lies there (`force` begins anew; the old subset stays until
    the new one is whole), no network, a wrong schema, no rows, a full disk.
    """
    if not entry.repository:
        raise UserError(f"data set {entry.name!r} is on this machine already: use it by its name")
    place = str(source.absolute()) if source else entry.repository
    config, revision = config or entry.config, revision or entry.revision
    request = {"name": entry.name, "from": place, "config": config, "split": entry.split}
    request |= {"asked_revision": revision, "max_samples": samples}
    with subsets.locked(folder):
        if subsets.is_subset(folder) and not force:
            there = subsets.info(folder)
            if there.get("request") == request:
                subsets.rows_file(folder)
                return there
            raise UserError(f"{str(folder)!r} holds another subset ({_told(there)}): --force replaces it")
        state = _state(folder, request, force)
        found = _fingerprint(source) if source else state.get("revision") or _resolved(entry.repository, revision)
        if state.get("revision", found) != found:
            raise UserError(f"the files in {place!r} changed since the download began: --force begins anew")
        rows = _stream(entry, source, config, found)
        state |= {"request": request, "revision": found}
        try:
            state = _write(folder, entry, rows, state, samples, progress)
        except UserError:
            if not (folder / "rows.state.json").exists():
                (folder / "rows.part").unlink(missing_ok=True)
            raise
        about = {key: state[key] for key in ("request", "revision", "rows", "blank")}
        about |= {"classes": list(entry.classes)} if entry.classes else {}
        described = subsets.publish(folder, folder / "rows.part", about)
        (folder / "rows.state.json").unlink()
        return described


def _state(folder: Path, request: dict[str, Any], force: bool) -> dict[str, Any]:
    """Where an interrupted download of the same request stands, or the beginning."""
    new = {"rows": 0, "blank": 0, "bytes": 0, "position": None}
    path = folder / "rows.state.json"
    if not path.is_file():
        return new
    try:
        state = from_json(path.read_text(encoding="utf-8"))
        same = state["request"] == request and (folder / "rows.part").stat().st_size >= state["bytes"]
    except (ValueError, KeyError, TypeError, OSError):
        return new
    if same:
        return state
    if force:
        return new
    raise UserError(
        f"{str(folder)!r} holds an unfinished download ({_told(state)}): ask for the same again to go on, or --force "
        "to begin anew"
    )


def _told(described: dict[str, Any]) -> str:
    request = described.get("request", {})
    return ", ".join(f"{key} {request[key]}" for key in ("from", "max_samples", "asked_revision") if request.get(key))


def _resolved(repository: str, revision: str) -> str:
    """The commit a revision names now: every later read, and a resumed one, is of that commit."""
    import httpx
    from huggingface_hub import HfApi, errors

    try:
        return HfApi().dataset_info(repository, revision=revision or None, timeout=30).sha or revision
    except errors.RevisionNotFoundError as error:
        raise UserError(f"{repository} has no revision {revision!r} on the hub: name another --revision") from error
    except errors.RepositoryNotFoundError as error:  # the hub answers so for private repositories, too
        raise UserError(f"{repository} is not on the hub, or not open to you: log in with `hf auth login`") from error
    except (httpx.HTTPError, httpx.InvalidURL, OSError, ImportError, ValueError) as error:  # the last two of proxies
        way = hub.proxy() or "go online (unset HF_HUB_OFFLINE)"
        raise UserError(
            f"the hub cannot be reached for {repository} ({said_by(error)}): {way}, or give a local copy by "
            "--from FOLDER"
        ) from error


def _fingerprint(source: Path) -> str:
    """Names, sizes and times of a folder's files. Raises UserError where the folder or its data are missing."""
    files = sorted(path for path in source.rglob("*") if path.is_file()) if source.is_dir() else []
    if not files:
        raise UserError(f"--from {str(source)!r} is no folder of data files: name one of parquet or JSON-lines files")
    stats = [(str(path.relative_to(source)), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return "folder " + hashlib.sha256(repr(stats).encode()).hexdigest()[:16]


def _stream(entry: DatasetInfo, source: Path | None, config: str, revision: str) -> Any:
    import datasets

    # A bare folder has no configurations; the card of a full copy of the repository names them.
    name = (config if (source / "README.md").is_file() else "") if source else config
    try:
        return datasets.load_dataset(
            str(source.absolute()) if source else entry.repository,
            name or None,
            split=entry.split,
            streaming=True,
            revision=None if source else revision,
        )
    except Exception as error:  # the library documents no common base of what it raises
        raise UserError(
            f"{source or entry.repository} cannot be read as {entry.name} ({said_by(error)}): check --config, "
            "--revision, --from and the network"
        ) from error


def _write(
    folder: Path, entry: DatasetInfo, rows: Any, state: dict[str, Any], samples: int, progress: Progress
) -> dict[str, Any]:
    if state["position"]:
        rows.load_state_dict(state["position"])
    source = iter(rows)
    try:
        with open(folder / "rows.part", "r+b" if state["bytes"] else "wb") as part:
            part.truncate(state["bytes"])
            part.seek(state["bytes"])
            while not samples or state["rows"] < samples:
                row = _next(source, state, entry)
                if row is None:
                    break
                kept = _kept(row, entry, state["rows"] + state["blank"] + 1)
                if kept is None:
                    state["blank"] += 1
                else:
                    part.write(kept)
                    state["rows"] += 1
                if (state["rows"] + state["blank"]) % _ROWS_BETWEEN_STATES == 0:
                    _save(folder, part, state | {"position": rows.state_dict()})
                    progress(state["rows"], samples)
            _save(folder, part, state | {"position": rows.state_dict()})
    except OSError as error:
        raise UserError(
            f"{str(folder)!r} cannot be written after {state['rows']} rows ({error.strerror}): free some space and "
            "give the same command again, it goes on from there"
        ) from error
    progress(state["rows"], samples)
    if not state["rows"]:
        (folder / "rows.state.json").unlink()
        raise UserError(f"{state['request']['from']} gave no row with text: check --config and --from")
    return state


def _next(source: Any, state: dict[str, Any], entry: DatasetInfo) -> dict[str, Any] | None:
    try:
        return next(source, None)
    except Exception as error:  # network and damaged files alike; what was written stays
        raise UserError(
            f"{entry.name} broke off after {state['rows']} rows ({said_by(error)}): give the same command "
            "again, it goes on from the last rows kept"
        ) from error


def _kept(row: dict[str, Any], entry: DatasetInfo, number: int) -> bytes | None:
    """The row's line for the file, or None where its text is blank."""
    missing = [column for column in entry.columns if column not in row]
    if missing:
        raise UserError(
            f"row {number} of {entry.name} lacks the column {missing[0]}: it has {', '.join(row)}; "
            "name another --config or --revision, or a --from folder in the hub's schema"
        )
    kept = {column: row[column] for column in entry.columns}
    if {*columns.TEXT_COLUMNS, "long_answer"} & set(entry.columns):
        text, _ = documents.text_and_label(f"row {number} of {entry.name}", kept)
    else:  # a task says what is read of it
        text = "".join(_texts(kept))
    return (json.dumps(kept, ensure_ascii=False, default=str) + "\n").encode() if text.strip() else None


def _texts(value: Any) -> Iterator[str]:
    """Every text in a cell, in lists and in tables."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for own in value.values() if isinstance(value, dict) else value:
            yield from _texts(own)


def _save(folder: Path, part: BinaryIO, state: dict[str, Any]) -> None:
    """First the rows, then the state that counts them: a crash in between only costs the rows after the old state."""
    part.flush()
    os.fsync(part.fileno())
    state["bytes"] = part.tell()
    write_whole(folder / "rows.state.json", json.dumps(state))
