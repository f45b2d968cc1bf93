"""What a resumed run must find unchanged: its settings, and digests of all that it reads."""

import hashlib
import json
from typing import Any

from zofed import config
from zofed.data import encoding, partitions
from zofed.training.task import Task


def of(task: Task) -> dict[str, Any]:
    """All that decides what the run's steps are, apart from the genesis: settings, and digests of what it reads."""
    names = {"classes": list(task.class_names)} if task.labels else {}
    return config.pinned(task.settings) | digests(task) | names


def digests(task: Task) -> dict[str, str]:
    """SHA-256 of the documents and of the tokenizer: what the run read."""
    found = {"documents": encoding.documents_digest([*task.train, *task.held_out])}
    if task.backprop is not task.train:
        found["backprop"] = encoding.documents_digest(task.backprop)
    if task.demonstrations:
        found["shots"] = encoding.documents_digest(task.demonstrations)
    if task.settings.partition != "iid":  # who holds which document, which the texts do not tell
        groups = [partitions.group(document, task.settings.partition) for document in task.train]
        found["groups"] = hashlib.sha256(json.dumps(groups).encode()).hexdigest()
    found["tokenizer"] = task.tokenizer_digest
    if task.type.reads_turns:
        found["chat template"] = hashlib.sha256(str(task.tokenizer.chat_template).encode()).hexdigest()
    return found
