"""Tensors and facts in one file, whole or not there at all: checkpoints, and the gradients that a run keeps."""

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from zofed.base.errors import DiskError
from zofed.base.files import make_private, private_folder, sync_file, sync_folder, take_mode
from zofed.base.parsing import from_json
from zofed.core.digests import tensors_digest


def write(folder: Path, name: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write NAME.safetensors into `folder`, which is made; on disk before this returns. Raises DiskError."""
    temporary = folder / f".{name}.new"
    held = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    digest, written = tensors_digest(held), json.dumps(facts)
    try:
        private_folder(folder)
        make_private(temporary)
        save_file(held, temporary, {"facts": written, "digest": digest, "seal": _seal(digest, written)})
        take_mode(temporary, folder / f"{name}.safetensors")
        sync_file(temporary)
        temporary.rename(folder / f"{name}.safetensors")
        sync_folder(folder)
    except (SafetensorError, OSError) as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise DiskError(f"cannot write {temporary}: {error}; free some space") from error


def read(path: Path, wanted: str = "") -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Tensors and facts of a file, or None where it is damaged.

    wanted: the tensors' digest, hex; empty: the one in the file. A file of an earlier version has no seal over its
    facts: whoever goes by them compares them with the journal.
    """
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata()
        facts, digest = from_json(about["facts"]), about["digest"]
        if not isinstance(facts, dict) or about.get("seal", sealed := _seal(digest, about["facts"])) != sealed:
            return None
        tensors = load_file(path)
        return (tensors, facts) if tensors_digest(tensors) == (wanted or digest) else None
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None


def facts(path: Path) -> dict[str, Any]:
    """The facts of a file, unchecked, without its tensors; empty where they cannot be read."""
    try:
        with safe_open(path, "pt") as file:
            found = from_json(file.metadata()["facts"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _seal(digest: str, facts: str) -> str:
    """SHA-256, hex, over a file's facts and the digest of its tensors."""
    return hashlib.sha256(f"{digest}\n{facts}".encode()).hexdigest()
