"""What commands print arrives whatever the stream is; of a stream that is gone comes a status and nothing worse."""

import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from zofed.base import streams
from zofed.commands import cli
from zofed.commands.console import console

Run = Callable[..., int]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, zofed_command: object) -> Iterator[Run]:
    """The command in this process with another standard output and error; its status."""

    def command(stdout: io.TextIOBase, stderr: io.TextIOBase, *arguments: object) -> int:
        with monkeypatch.context() as patched:
            patched.setattr(sys, "argv", ["zofed", *map(str, arguments)])
            patched.setattr(sys, "stdout", stdout)
            patched.setattr(sys, "stderr", stderr)
            with pytest.raises(SystemExit) as ended:
                cli.main()
        return ended.value.code or 0  # type: ignore[return-value]

    yield command
    console.begin_capture()  # what no stream took would be printed by the next command of this process
    console.end_capture()


def encoded(encoding: str) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(), encoding=encoding)


def written(stream: io.TextIOWrapper) -> str:
    stream.flush()
    return stream.buffer.getvalue().decode(stream.encoding)  # type: ignore[attr-defined]


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1", "utf-8"])
def test_text_that_a_stream_cannot_encode_is_escaped(run: Run, tmp_path: Path, encoding: str) -> None:
    name = os.fsdecode("é Ω \U0001f33b ".encode() + b"\xe9")
    (tmp_path / name).mkdir()
    told, errors = encoded(encoding), encoded(encoding)
    assert run(told, errors, "keys", "node", "a", "--out", tmp_path / name) == 0
    shown = written(told)
    assert "\\udce9" in shown and ("\\u03a9" in shown) == (encoding != "utf-8")
    assert run(told, errors, "journal", "show", tmp_path / name) == 2
    assert "\\udce9" in written(errors) and "is not the folder of a run" in written(errors)


@pytest.mark.parametrize("command", [["settings"], ["data", "list"], ["train", "--help"]], ids=" ".join)
def test_a_reader_that_goes_away_ends_a_command_quietly(run: Run, command: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    errors = encoded("utf-8")
    with open(writing, "w") as gone:
        assert run(gone, errors, *command) == streams.READER_GONE
    assert written(errors) == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a device that is always full")
def test_output_that_finds_no_space_is_told_once(run: Run) -> None:
    errors = encoded("utf-8")
    with open("/dev/full", "w") as full:
        assert run(full, errors, "settings") == 2
    assert written(errors).startswith("zofed: cannot write") and "No space left" in written(errors)


def test_what_is_printed_on_closed_streams_lands_in_no_file(tmp_path: Path) -> None:
    code = f"""
from zofed.base import streams
streams.prepare()
with open({str(tmp_path / "first")!r}, "w") as file:
    print("lost", flush=True)
    file.write("kept")
"""
    close = f"import os; os.closerange(0, 3); os.execv({sys.executable!r}, ['python', '-c', {code!r}])"
    assert subprocess.run([sys.executable, "-c", close], timeout=60).returncode == 0
    assert (tmp_path / "first").read_text() == "kept"
