"""Models of the Hugging Face hub: read from the local cache alone, fetched only by `download`."""

import os
import re
from pathlib import Path
from urllib.parse import urlsplit

from zofed.base import proxies
from zofed.base.errors import UserError
from zofed.base.texts import said_by

WANTED = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")  # weights, configs, tokenizer; no pickle, no code
BELOW = ("*/*",)  # exports for other programs lie in folders of their own

# Owners that names of one word have on the hub now, by what such a name begins with.
_OWNERS = {
    "gpt2": "openai-community",
    "openai-gpt": "openai-community",
    "distil": "distilbert",
    "bert-": "google-bert",
    "roberta-": "FacebookAI",
    "xlm-": "FacebookAI",
    "t5-": "google-t5",
    "albert-": "albert",
    "xlnet-": "xlnet",
    "camembert-": "almanach",
}
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def is_id(name: str) -> bool:
    """Whether a name has the form of a hub id, OWNER/NAME."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None


def meant(name: str) -> str:
    """The hub id that a name which is none may mean: with spaces, with the hub's address, or without an owner."""
    name = re.sub(r"^https?://[^/]+/", "", name.strip()).strip("/")
    if is_id(name):
        return name
    owners = [owner for beginning, owner in _OWNERS.items() if re.fullmatch(rf"{beginning}[\w.-]*", name)]
    return f"{owners[0]}/{name}" if owners else ""


def snapshot(name: str, revision: str = "") -> Path:
    """The folder of a model in the local cache, named by its commit; the network is never asked.

    revision: a commit, branch or tag; empty: main. Raises UserError where it is not cached.
    """
    import huggingface_hub  # half a second, for those alone who name a hub model

    try:
        found = huggingface_hub.snapshot_download(
            name, revision=revision or None, local_files_only=True, allow_patterns=[*WANTED], ignore_patterns=[*BELOW]
        )
    except (OSError, ValueError) as error:  # not there, half there, or no valid id
        raise missing(name, revision) from error
    return Path(found)


def missing(name: str, revision: str = "") -> UserError:
    """The error of a model that is not in the local cache."""
    at = f" at revision {revision!r}" if revision else ""
    held = _commits(name)
    other = f", or set revision to a commit that is: {', '.join(held[:3])}" if held else ""
    return UserError(
        f"model {name!r}{at} is no folder and not whole in the hub's cache: run zofed models download {name}"
        f"{f' --revision {revision}' if revision else ''}{other}"
    )


def download(name: str, revision: str = "") -> Path:
    """Fetch a model into the local cache, safetensors, configs and tokenizer only; its folder, named by the commit.

    The only function of zofed that fetches a model. Raises UserError for a name, revision or model that
    cannot be had or has no safetensors.
    """
    import huggingface_hub

    if not is_id(name):
        raise UserError(f"{name!r} is no hub id: give OWNER/NAME, such as {meant(name) or 'openai-community/gpt2'}")
    what = f"hub model {name!r}" + (f" at revision {revision!r}" if revision else "")
    try:
        files = huggingface_hub.HfApi().list_repo_files(name, revision=revision or None)
        if not any(file.endswith(".safetensors") and "/" not in file for file in files):
            pickles = [file for file in files if file.endswith(_PICKLES)]
            held = f"only the pickle {pickles[0]!r}, which can run code when read" if pickles else "no weights"
            raise UserError(f"{what} holds {held}: choose a model or a revision with safetensors")
        return Path(
            huggingface_hub.snapshot_download(
                name, revision=revision or None, allow_patterns=[*WANTED], ignore_patterns=[*BELOW]
            )
        )
    except UserError:
        raise
    except Exception as error:  # of the library or of what it reads the network with
        raise UserError(f"{what} cannot be had ({said_by(error)}): {_remedy(error)}") from error


def cached() -> list[str]:
    """Ids of the models and adapters in the local cache that have a config and safetensors, sorted."""
    whole = (folder for folder in _cache().glob("models--*--*/snapshots/*") if has_config(folder))
    folders = {folder.parents[1].name for folder in whole if any(folder.glob("*.safetensors"))}
    return sorted(name.removeprefix("models--").replace("--", "/", 1) for name in folders)


def has_config(folder: Path) -> bool:
    """Whether a folder has the config of a model, or of an adapter as peft writes it."""
    return any((folder / name).is_file() for name in ("config.json", "adapter_config.json"))


def proxy() -> str:
    """The proxy of the environment between this machine and the hub, and what to do where it fails; empty if none."""
    import huggingface_hub

    place = urlsplit(huggingface_hub.constants.ENDPOINT)
    return proxies.unusable(os.environ) or proxies.in_the_way(place.scheme, place.hostname or "", os.environ)


def _commits(name: str) -> list[str]:
    """Commits of a model that the cache holds, the newest first."""
    folder = _cache() / f"models--{name.replace('/', '--')}" / "snapshots"
    found = [path for path in folder.glob("*") if has_config(path)]
    return [path.name for path in sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)]


def _cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _remedy(error: Exception) -> str:
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return "accept its terms on the hub and set HF_TOKEN"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "check its name, and set HF_TOKEN if it is private"
    if isinstance(error, errors.RevisionNotFoundError):
        return "choose another --revision"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "unset HF_HUB_OFFLINE"
    return proxy() or "check the network, or copy the hub's cache of a machine that has the model"
