"""Text from elsewhere, files, libraries, other machines, as one line that any file and terminal can hold; durations."""

LONGEST, LONGEST_ERROR = 500, 200  # characters of a line, of what an error says


def printable(text: str) -> str:
    """The text with all that cannot be seen as Python escapes it.

    That is every control character, line end and terminal escape, every space but the plain one, every mark of writing
    direction and every lone surrogate.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def one_line(text: str, longest: int = LONGEST) -> str:
    """The text as one printable line of at most `longest` characters, white space as one space; cut, it ends in …"""
    some = text[: 2 * longest]
    line = " ".join("".join(c if c.isspace() else printable(c) for c in some).split())
    return line if len(line) <= longest and len(text) <= 2 * longest else line[: longest - 1] + "…"


def is_count(text: str) -> bool:
    """Whether a text is a whole number from 0 on that 64 bits hold: what Python need not refuse to read."""
    return text.isdecimal() and len(text) <= 18


def said_by(error: BaseException) -> str:
    """An error's own words as one printable line without a full stop, to stand in a sentence.

    At most LONGEST_ERROR characters of them. A KeyError says no more than the key, others may say nothing: the type
    then stands before it, or alone.
    """
    words = one_line(str(error), LONGEST_ERROR).rstrip(".")
    return words if words and not isinstance(error, KeyError) else f"{type(error).__name__} {words}".rstrip()


def duration(seconds: float) -> str:
    """Seconds in words, to two digits or so."""
    if seconds < 120:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
