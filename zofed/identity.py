"""Which zofed runs here: all machines of a federation should run the same."""

import hashlib
from functools import cache
from pathlib import Path

from zofed import __version__

FOLDER = Path(__file__).resolve().parent


@cache
def code() -> str:
    """VERSION DIGEST FOLDER; the digest is the first 12 hex digits of SHA-256 over the package's source files."""
    digest = hashlib.sha256()
    for path in sorted(FOLDER.glob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)}\n".encode() + content)
    return f"{__version__} {digest.hexdigest()[:12]} {FOLDER}"
