"""A folder uploaded to the Hugging Face hub as a model, where a person asks for that by name and nowhere else."""

import hashlib
from pathlib import Path
from typing import Any

from zofed.base import shell
from zofed.base.errors import UserError
from zofed.base.texts import said_by
from zofed.data import hub

MADE_BY_THE_HUB = ".gitattributes"  # in each new repository
PARTS = 2**20  # bytes of a file that are hashed at a time


def check(name: str, *, is_public: bool) -> None:
    """Raise UserError where `push` would fail whatever the folder holds, before the work that makes it.

    That is for what is no hub id, without a token or with one that the hub does not know, for an owner that it does
    not write for, without a network, and for a repository that others see (is_public: do not see) against what was
    asked for.
    """
    import huggingface_hub  # half a second, for those alone who push

    if not hub.is_id(name):
        raise UserError(f"--push {name!r} is no hub id: give OWNER/NAME, OWNER being you or an organisation of yours")
    if huggingface_hub.get_token() is None:
        raise UserError("--push: no token of the hub is here: run hf auth login, or set HF_TOKEN to one that may write")
    try:
        user = huggingface_hub.HfApi().whoami()
        found = _found(name)
    except Exception as error:  # of the library or of what it reads the network with
        raise _told(name, error) from error
    owners = [str(user.get("name")), *(str(one.get("name")) for one in user.get("orgs") or ())]
    if name.partition("/")[0].lower() not in map(str.lower, owners):
        raise UserError(f"--push {name}: the token writes for {', '.join(owners)}: choose one of them as the owner")
    if found and is_public == bool(found.private):
        there, remedy = ("private", "leave out --public") if is_public else ("public", "add --public")
        raise UserError(f"--push {name} is there and {there}: {remedy}, choose another name, or change it on the hub")


def push(folder: Path, name: str, *, is_public: bool) -> str:
    """Upload all files of a folder in one commit, into a repository that is made where there is none; its address.

    Files that are there already stay as they are: what differs is refused. Raises UserError for that, and for whatever
    keeps the hub from taking them, with the command that sends them later.
    """
    import huggingface_hub

    command = shell.command("hf", "upload", name, folder, *([] if is_public else ["--private"]))
    later = f"; the files lie in {folder}, and {command} sends them later"
    api = huggingface_hub.HfApi()
    try:
        found = _found(name)
        if found and (other := _other_files(found, folder)):
            raise UserError(
                f"--push {name} holds {other[0]} already, which is not that of this export: choose another name, or "
                f"delete the repository on the hub{later}"
            )
        address = api.create_repo(name, private=not is_public, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="zofed export")
        return str(address)
    except UserError:
        raise
    except Exception as error:  # of the library or of what it writes to the network with
        raise _told(name, error, later) from error


def _found(name: str) -> Any:
    """What the hub says of a model; None where it knows none of that name."""
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return huggingface_hub.HfApi().model_info(name, files_metadata=True)
    except errors.RepositoryNotFoundError:
        return None


def _other_files(found: Any, folder: Path) -> list[str]:
    """Files of a repository that are not those of a folder."""
    held = {file.rfilename: file for file in found.siblings or () if file.rfilename != MADE_BY_THE_HUB}
    return sorted(name for name, file in held.items() if not _is_same(file, folder / name))


def _is_same(file: Any, path: Path) -> bool:
    """Whether a file of the hub, of which git's digest or that of large files is known, is the one at `path`."""
    if not path.is_file():
        return False
    if file.lfs:
        return _digest("sha256", path) == file.lfs.sha256
    return _digest("sha1", path, b"blob %d\0" % path.stat().st_size) == file.blob_id


def _digest(kind: str, path: Path, begin: bytes = b"") -> str:
    hashed = hashlib.new(kind, begin, usedforsecurity=False)
    with path.open("rb") as opened:
        while part := opened.read(PARTS):
            hashed.update(part)
    return hashed.hexdigest()


def _told(name: str, error: Exception, later: str = "") -> UserError:
    from huggingface_hub import errors

    causes: list[BaseException] = [error]
    while (before := causes[-1].__cause__) is not None:
        causes.append(before)
    answers = [one for one in causes if isinstance(one, errors.HfHubHTTPError)]
    status = answers[0].response.status_code if answers else 0
    owner = name.partition("/")[0]
    if any(isinstance(one, errors.OfflineModeIsEnabled) for one in causes):
        remedy = "unset HF_HUB_OFFLINE"
    elif status == 401:
        remedy = "run hf auth login again, or set HF_TOKEN to a token that may write"
    elif status == 403:
        remedy = f"choose an owner in place of {owner} for whom the token may write, or a token that may"
    elif status:
        remedy = "try again later"
    else:
        remedy = hub.proxy() or "check the network"
    return UserError(f"--push {name}: the hub does not take it ({said_by(error)}): {remedy}{later}")
