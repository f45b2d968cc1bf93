"""Other people's regular expressions, which may take longer than a life: searched within seconds, or given up."""

import json
import re
import subprocess
import sys
from collections.abc import Sequence

LONGEST = 1000  # characters
SECONDS = 1  # of a processor
LONGEST_WAIT_S = 30.0  # for them, on a busy machine
MEGABYTES = 256
# Neither repeats anything nor holds more than one group: its work is its length times that of what is searched.
_PLAIN = re.compile(r"[\w.^$|\\-]*(\((\?[:!=])?[\w.^$|\\-]*\))?[\w.^$|\\-]*")
# A process of its own, since Python's engine cannot be told when to stop but in a process's main thread.
_SEARCH = f"""
import json, re, resource, sys
resource.setrlimit(resource.RLIMIT_CPU, ({SECONDS}, {SECONDS + 1}))
resource.setrlimit(resource.RLIMIT_DATA, ({MEGABYTES * 10**6}, {MEGABYTES * 10**6}))
pattern, names = json.load(sys.stdin)
try:
    compiled = re.compile(pattern)
    json.dump([bool(compiled.search(name)) for name in names], sys.stdout)
except re.error as error:
    json.dump(str(error), sys.stdout)
except (RecursionError, MemoryError, OverflowError):
    json.dump("it nests or repeats too much", sys.stdout)
"""


class TooMuch(ValueError):  # noqa: N818, a state of a pattern
    """A pattern that is too long, or takes too long; the text says which."""


def searched(pattern: str, names: Sequence[str]) -> list[str]:
    """Those of the names in which the pattern is found. Raises re.error for none, TooMuch beyond LONGEST or SECONDS."""
    if len(pattern) > LONGEST:
        raise TooMuch(f"has {len(pattern):,} characters, more than {LONGEST:,}")
    if _PLAIN.fullmatch(pattern):
        return [name for name in names if re.search(pattern, name)]
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _SEARCH],
            input=json.dumps([pattern, list(names)]),
            capture_output=True, text=True, timeout=LONGEST_WAIT_S, check=True,
        )  # fmt: skip
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError):
        raise TooMuch(f"takes more than {SECONDS} second of a processor or {MEGABYTES} MB to be searched") from None
    found = json.loads(done.stdout)
    if isinstance(found, str):
        raise re.error(found)
    return [name for name, is_found in zip(names, found, strict=True) if is_found]
