"""Commands that are printed run as they were printed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from zofed.base import shell

WORDS = ["plain", "two words", "it's", '"', "$HOME", "~x", "*", "a;b", "#", "", "back\\slash", "é", "Ω λ"]
ODD = [*WORDS, "two\nlines", "tab\there", "\x1b[31m", "'\n\\", os.fsdecode(b"caf\xe9"), "digits\n123"]


def words_seen(line: str, by: str) -> list[str]:
    """What a shell makes of the words of a command line."""
    told = subprocess.run([by, "-c", f"printf '%s\\0' {line}"], capture_output=True, check=True).stdout
    return [os.fsdecode(word) for word in told.split(b"\0")[:-1]]


def test_a_shell_reads_the_words_that_were_given() -> None:
    assert words_seen(shell.command(*WORDS), "sh") == WORDS


@pytest.mark.skipif(not shutil.which("bash"), reason="no bash on PATH")
@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "cp1252"])
def test_a_word_that_no_line_or_stream_holds_is_written_as_escapes(
    monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(encoding=encoding))
    line = shell.command(*ODD)
    monkeypatch.undo()
    assert line.isprintable()
    line.encode(encoding)
    assert words_seen(line, "bash") == ODD


def test_a_path_is_never_taken_for_an_option() -> None:
    assert shell.command("zofed", "journal", "show", Path("-x")) == "zofed journal show ./-x"
    assert shell.command("zofed", "train", "--out", Path("/-x")) == "zofed train --out /-x"
