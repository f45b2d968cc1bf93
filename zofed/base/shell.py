"""Commands that are printed for a person to run: quoted, so that a shell runs them as they stand."""

import os
import shlex
import sys
from pathlib import Path


def command(*words: str | Path) -> str:
    """A command line of these words, each quoted where a shell would take it for something else.

    A relative path that begins with a dash gets ./ before it, since a command would take it for an option.
    """
    return " ".join(
        _quoted(f"./{word}" if isinstance(word, Path) and str(word)[0] == "-" else str(word)) for word in words
    )


def _quoted(word: str) -> str:
    return shlex.quote(word) if word.isprintable() and _can_be_shown(word) else _escaped(word)


def _can_be_shown(word: str) -> bool:
    """Whether both output streams can encode it."""
    try:
        for stream in (sys.stdout, sys.stderr):
            word.encode(getattr(stream, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _escaped(word: str) -> str:
    """The word's bytes in $'...', which bash, zsh and ksh read: on one line, and in ASCII alone."""
    try:
        raw = os.fsencode(word)
    except UnicodeEncodeError:  # a character that this locale's file names cannot have
        raw = word.encode("utf-8", "surrogatepass")
    plain = (f"\\{byte:03o}" if byte in b"'\\" or not 32 <= byte < 127 else chr(byte) for byte in raw)
    return f"$'{''.join(plain)}'"
