"""Settings that name files and folders, or what is known by a name; absolute, so that they mean the same everywhere."""

import os

from zofed.base.errors import UserError
from zofed.config import Settings
from zofed.data import chat_templates, documents, readers, subsets, tokenizers
from zofed.models import sample_model, sources

NAMES = {
    "model": (*sources.SIZES, sample_model.NAME),
    "dataset": documents.KNOWN_NAMES,
    "bp_dataset": documents.KNOWN_NAMES,
    "eval_dataset": documents.KNOWN_NAMES,
    "tokenizer": tokenizers.KNOWN_NAMES,
    "chat_template": (chat_templates.NONE,),
}


def with_absolute_paths(settings: Settings) -> Settings:
    """The settings with local paths absolute, a hub model's commit and the text of a chat template's file.

    So they mean the same everywhere and later. Raises UserError for a revision or a file that is not there.
    """
    update = {key: absolute_path(key, getattr(settings, key)) for key in NAMES}
    update["revision"] = sources.commit(settings.model, settings.revision)
    return settings.model_copy(update=update)


def absolute_path(key: str, name: str) -> str:
    """What the setting `key` of NAMES names, as an absolute path where it is on this machine; else the name.

    Of a chat template the text, which needs no file elsewhere or later. Raises UserError for one that is not there.
    """
    if key == "chat_template":
        return chat_templates.template_text(name)
    path = os.path.expanduser(name)
    if key.endswith("dataset") and name and name not in NAMES[key] and (folder := subsets.find(name)):
        return str(folder)
    return os.path.abspath(path) if path and path not in NAMES[key] and os.path.exists(path) else name


def check_absolute(settings: Settings) -> None:
    """Raise UserError for data or a model named relative to a working folder that is not the user's.

    For what Flower starts: `flwr run` unpacks an app and runs it in a folder of its own.
    """
    for key in NAMES:
        name = getattr(settings, key)
        if not name or name in NAMES[key] or os.path.isabs(os.path.expanduser(name)):
            continue
        if key.endswith("dataset"):
            is_relative = os.sep in name or name.endswith(readers.SUFFIXES)
        elif key == "chat_template":
            is_relative = not chat_templates.is_text(name)
        else:
            is_relative = name.startswith(".") or name.count("/") > 1  # OWNER/NAME is of the hub
        if is_relative:
            raise UserError(
                f"{key.replace('_', '-')} = {name!r} is a relative path, but Flower runs the app in a folder of its "
                "own, not in yours: give the absolute path"
            )
