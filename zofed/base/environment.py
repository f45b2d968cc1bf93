"""This machine and this zofed: which code runs here, by which command, and how freed memory is kept."""

import ctypes
import hashlib
import os
import platform
import socket
import subprocess
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path

from zofed import __version__
from zofed.base import shell
from zofed.base.files import PACKAGE, ROOT

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # numbers of glibc's mallopt(3)
_KEEP_BYTES = 2**30


@cache
def code() -> str:
    """VERSION DIGEST FOLDER; the digest is the first 12 hex digits of SHA-256 over the package's source files."""
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(PACKAGE).as_posix()} {len(content)}\n".encode() + content)
    return f"{__version__} {digest.hexdigest()[:12]} {PACKAGE}"


def session() -> dict[str, str]:
    """Where and by what this process was started: host, machine, commit of zofed's code, command."""
    return {
        "host": socket.gethostname(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs",
        "commit": commit(),
        "command": command(),
    }


def command() -> str:
    """The command of zofed that runs, as typed; of another program its name alone.

    Flower hands its apps tokens as options, and what else a program was given is not zofed's to write down.
    """
    program = Path(sys.argv[0] if sys.argv else "").name
    if "zofed.commands.cli" in sys.modules and program in ("zofed", "__main__.py"):
        return shell.command("zofed", *sys.argv[1:])
    return program


@cache
def commit() -> str:
    """Commit of the checkout that zofed runs from, with `+changes` where files differ from it; empty outside of one."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, timeout=20)
        return done.stdout.strip() if done.returncode == 0 else ""

    with suppress(OSError, subprocess.SubprocessError):
        if Path(git("rev-parse", "--show-toplevel") or "/").resolve() == ROOT.resolve():
            return git("rev-parse", "--short=12", "HEAD") + (
                "+changes" if git("status", "--porcelain", "zofed") else ""
            )
    return ""


def keep_freed_memory() -> bool:
    """Tell glibc to serve large tensors from its heap and keep what is freed; False where there is no glibc.

    By default every tensor of more than 32 MiB is mapped anew and its pages are zeroed by the kernel at first touch:
    a query with materialised weights took 2.7 instead of 1.6 times its two forward passes (benchmarks/RESULTS.md).
    No number changes. The price is memory, since what is freed is not always of use for what comes next; who would
    rather wait sets glibc's own MALLOC_MMAP_THRESHOLD_=1048576, which is then left as it is.
    """
    if "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _KEEP_BYTES)) and bool(mallopt(_TRIM_THRESHOLD, 2 * _KEEP_BYTES - 1))


def give_back_freed_memory() -> None:
    """Tell glibc to return what is free at the moment to the system, once: after something large has gone for good."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
