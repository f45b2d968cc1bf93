"""From documents to the integer tensors a model trains on, and which of them each step sees."""

import hashlib
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from zofed.base.errors import UserError
from zofed.core.metrics import IGNORED_LABEL, predicted_labels
from zofed.data.documents import (
    SHIPPED,
    Document,
    documents_digest,
    load_documents,
    random_order,
    shard,
    split_held_out,
)
from zofed.data.tokenizers import load_tokenizer, tokenizer_digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "SHIPPED",
    "Document",
    "Examples",
    "batch",
    "classification_examples",
    "default_cache",
    "documents_digest",
    "kept",
    "language_model_examples",
    "load_documents",
    "load_tokenizer",
    "sample",
    "shard",
    "split_held_out",
    "token_bytes",
    "tokenizer_digest",
    "unigram_loss",
]

# Tensors of one leading dimension n: 'input_ids' int64 (n, block); 'labels' int64, (n, block) for language models and
# (n,) for classification, which adds 'attention_mask' int64 (n, block); or 'features' float32 (n, width) and 'labels'.
Examples = dict[str, Tensor]

_DOCUMENTS_AT_ONCE = 1000  # Python lists of token ids take ten times the room of the array they end in


def language_model_examples(
    documents: Sequence[Document],
    tokenizer: "PreTrainedTokenizerBase",
    block_size: int,
    cache: Path | None = None,
    digest: str = "",
) -> Examples:
    """Blocks of `block_size` tokens cut from all documents, each ended by the end-of-sequence token.

    Returns 'input_ids' int64 (n, block_size) and 'labels', the same tensor: the model shifts. The tokens after the last
    whole block are dropped. With `cache`, a folder, the blocks are kept there in a file named by everything they depend
    on; a damaged file is made anew. digest: the tokenizer's, where it is known: of a large vocabulary it takes half a
    second. Raises UserError when the documents hold less than one block.
    """
    if block_size < 2:
        raise UserError(f"block size {block_size} leaves no token to predict: use at least 2")

    def cut() -> Tensor:
        tokens = _joined_tokens(documents, tokenizer)
        count = len(tokens) // block_size
        if count == 0:
            raise UserError(
                f"{len(documents)} document(s) give {len(tokens)} tokens, less than one block of {block_size}: "
                "use a smaller block size or a larger data set"
            )
        return torch.from_numpy(tokens[: count * block_size].reshape(count, block_size))

    if cache is None:
        blocks = cut()
    else:
        parts = ("blocks 2", documents_digest(documents), digest or tokenizer_digest(tokenizer), str(block_size))
        blocks = kept(cache, parts, cut)
    return {"input_ids": blocks, "labels": blocks}


def token_bytes(
    documents: Sequence[Document],
    tokenizer: "PreTrainedTokenizerBase",
    block_size: int,
    cache: Path | None = None,
    digest: str = "",
) -> Tensor:
    """UTF-8 bytes of text that each token of `language_model_examples` stands for: int64 (n, block_size).

    Each byte of a text counts for one token: that which ends at it or, of white space that no token holds, the next,
    in the end the end-of-sequence token. A tokenizer that does not tell where its tokens lie shares a text's bytes out
    evenly among them. cache, digest: as there.
    """

    def counted() -> Tensor:
        found = _joined_bytes(documents, tokenizer)
        return torch.from_numpy(found[: len(found) // block_size * block_size].reshape(-1, block_size))

    parts = ("token bytes 1", documents_digest(documents), digest or tokenizer_digest(tokenizer), str(block_size))
    return kept(cache, parts, counted)


def sample(count: int, limit: int, seed: int) -> Tensor:
    """Which of `count` examples an evaluation reads: `limit` of them, or all where they are no more.

    int64, rising. A pure function of the arguments, the same on every machine; a larger sample holds the smaller one.
    """
    chosen = random_order(count, "evaluation", seed)[:limit] if limit < count else np.arange(count)
    return torch.from_numpy(np.sort(chosen))


def kept(cache: Path | None, parts: Sequence[str], make: Callable[[], Tensor]) -> Tensor:
    """What `make` gives, or gave an earlier process: one tensor in a file of the folder `cache`.

    parts: all that the tensor depends on. A damaged file is made anew. Without a cache nothing is kept.
    """
    if cache is None:
        return make()
    file = cache / f"{hashlib.sha256(' '.join(parts).encode()).hexdigest()}.safetensors"
    found = _read(file)
    if found is None:
        found = make()
        _write(file, found)
    return found


def classification_examples(
    documents: Sequence[Document], tokenizer: "PreTrainedTokenizerBase", block_size: int
) -> Examples:
    """One example a document, cut or padded on the right to `block_size` tokens.

    Returns 'input_ids' and 'attention_mask' int64 (n, block_size) and 'labels' int64 (n,). Raises UserError where a
    document has no label or there is no document.
    """
    if not documents:
        raise UserError("0 documents give no examples: use a data set of at least 1 document")
    labels = []
    for position, document in enumerate(documents):
        if document.label is None:
            raise UserError(
                f"document {position + 1} of {len(documents)} (data set {document.source!r}) has no label: "
                "use a data set with labels for classification"
            )
        labels.append(document.label)
    encoded = tokenizer(
        [document.text for document in documents],
        truncation=True,
        max_length=block_size,
        padding="max_length",
        padding_side="right",  # classifiers on causal models read the last token that is not padding
        return_token_type_ids=False,
        return_tensors="pt",
    )
    return {
        "input_ids": encoded["input_ids"],
        "attention_mask": encoded["attention_mask"],
        "labels": torch.tensor(labels, dtype=torch.int64),
    }


def batch(
    examples: Examples,
    *,
    seed: int,
    client: int,
    step: int,
    batch_size: int,
    purpose: str = "batch",
    order: Literal["shuffled", "stratified"] = "shuffled",
) -> Examples:
    """The examples of one step, at `positions`; of tensors by name, each with the examples along its first dimension.

    Where the order is stratified, any stretch of an epoch holds the classes, 'labels' int64 (n,), about as all examples
    do. Tensors keep their dtypes and get the leading dimension `batch_size`. Raises UserError as `positions`.
    """
    is_stratified = order == "stratified" and examples["labels"].dim() == 1
    classes = examples["labels"].numpy().tobytes() if is_stratified else b""
    count = len(next(iter(examples.values())))
    chosen = positions(count, seed, client, step, batch_size, purpose, classes)
    return {name: tensor[torch.tensor(chosen)] for name, tensor in examples.items()}


def positions(
    count: int, seed: int, client: int, step: int, batch_size: int, purpose: str = "batch", classes: bytes = b""
) -> list[int]:
    """Which of `count` examples one step reads, a function of (purpose, seed, client, step): resuming needs no more.

    Steps walk through one permutation an epoch, each drawn from (seed, client, epoch), so every epoch visits each
    example once; a batch may cross the end of an epoch, or of several when it is larger than the data. classes: of all
    examples, as int64, to hold their shares throughout; empty: shuffled. Raises UserError for a size below 1.
    """
    if batch_size < 1:
        raise UserError(f"batch size {batch_size} is below 1: use at least 1")
    if count == 0:
        raise UserError("0 examples cannot fill a batch: use a data set of at least 1 example")
    walked = range(step * batch_size, (step + 1) * batch_size)
    spanned = range(walked[0] // count, walked[-1] // count + 1)
    epochs = {epoch: _epoch(count, purpose, seed, client, epoch, classes) for epoch in spanned}
    return [int(epochs[at // count][at % count]) for at in walked]


@lru_cache(maxsize=4)
def _epoch(count: int, purpose: str, seed: int, client: int, epoch: int, classes: bytes) -> np.ndarray:
    """The order of one epoch. classes: of all examples, as int64, to hold their shares throughout; empty: shuffled."""
    order = random_order(count, purpose, seed, client, epoch)
    if not classes:
        return order
    own = np.frombuffer(classes, np.int64)[order]
    places = np.empty(count)
    for one in np.unique(own):
        at = np.flatnonzero(own == one)  # spread evenly over the epoch, from a place that the shuffle decides
        places[at] = (np.arange(len(at)) + at[0] / count) / len(at)
    return order[places.argsort(kind="stable")]


def default_cache() -> Path:
    """The folder for token caches: $ZOFED_CACHE, else $XDG_CACHE_HOME/zofed, else ~/.cache/zofed."""
    if chosen := os.environ.get("ZOFED_CACHE"):
        return Path(chosen)
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "zofed"
    return Path.home() / ".cache" / "zofed"


def unigram_loss(train: Examples, held_out: Examples, vocabulary: int) -> float:
    """Nats per predicted token of `held_out` under the add-one smoothed token frequencies of `train`.

    Predicted are the labels from the second of each block on, as the model does; -100 is left out. It is the loss of
    the best model that sees no context: training that does not pass it has learnt frequencies only.
    """
    counts = torch.bincount(_predicted(train), minlength=vocabulary).to(torch.float64) + 1
    return float((counts.sum().log() - counts.log())[_predicted(held_out)].mean())


def _predicted(examples: Examples) -> Tensor:
    labels = predicted_labels(examples["labels"])
    return labels[labels != IGNORED_LABEL]


def _joined_tokens(documents: Sequence[Document], tokenizer: "PreTrainedTokenizerBase") -> np.ndarray:
    """All token ids, int64, each document followed by the end-of-sequence token (its separator where it has none)."""
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    if not isinstance(end, int):
        raise UserError("the tokenizer has no end-of-sequence token to put between documents: add one to its config")
    parts = []
    for start in range(0, len(documents), _DOCUMENTS_AT_ONCE):
        texts = [document.text for document in documents[start : start + _DOCUMENTS_AT_ONCE]]
        # Not verbose: a text longer than the model's context is no concern here, since blocks are cut below.
        for tokens in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]:
            parts.append(np.array([*tokens, end], dtype=np.int64))
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)


def _joined_bytes(documents: Sequence[Document], tokenizer: "PreTrainedTokenizerBase") -> np.ndarray:
    """Bytes that each token of `_joined_tokens` stands for, int64."""
    parts = []
    for start in range(0, len(documents), _DOCUMENTS_AT_ONCE):
        texts = [document.text for document in documents[start : start + _DOCUMENTS_AT_ONCE]]
        found = tokenizer(
            texts, add_special_tokens=False, verbose=False, return_offsets_mapping=bool(tokenizer.is_fast)
        )
        places = found.get("offset_mapping", [None] * len(texts))
        parts += map(_bytes_of_tokens, texts, map(len, found["input_ids"]), places)
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)


def _bytes_of_tokens(text: str, count: int, places: Sequence[tuple[int, int]] | None) -> np.ndarray:
    """Bytes of each of a text's `count` tokens and of the end behind them. places: of the tokens, in characters."""
    size = len(text.encode())
    if places is None:
        reached = np.arange(1, count + 2) * size // (count + 1)
    else:
        codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
        sizes = 1 + (codes >= 0x80).astype(np.int64) + (codes >= 0x800) + (codes >= 0x10000)
        until = np.concatenate([[0], np.cumsum(sizes)])
        ends = np.array([end for _, end in places], dtype=np.int64)
        reached = np.append(np.maximum.accumulate(until[ends]), size)
    return np.diff(reached, prepend=0)


def _read(file: Path) -> Tensor | None:
    """The cached tensor, or None where there is no file, or one that is not what was written."""
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        return None
    try:
        with safe_open(file, framework="pt") as opened:
            tensor, metadata = opened.get_tensor("tensor"), opened.metadata() or {}
    except (SafetensorError, OSError):
        return None
    return tensor if metadata.get("sha256") == _digest(tensor) else None


def _write(file: Path, tensor: Tensor) -> None:
    """Write beside the target, then rename, so that no reader and no crash ever meets half a file."""
    from safetensors.torch import save

    data = save({"tensor": tensor}, metadata={"sha256": _digest(tensor)})
    temporary = None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, suffix=".part", delete=False) as opened:
            temporary = opened.name
            opened.write(data)
        os.replace(temporary, file)
    except OSError as error:  # a cache only saves time
        warnings.warn(f"token cache {str(file.parent)!r} cannot be written ({error}): set ZOFED_CACHE", stacklevel=3)
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
