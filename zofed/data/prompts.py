"""Prompts with label words as the integer tensors that a causal language model scores."""

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from zofed.base.errors import UserError
from zofed.core.candidates import KEY, NO_TOKEN
from zofed.core.metrics import Examples
from zofed.data.documents import Document

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def candidates_of(words: Sequence[str], tokenizer: "PreTrainedTokenizerBase") -> list[list[int]]:
    """The tokens of each label word, as they follow a prompt.

    Raises UserError for a word without tokens, and for two of the same.
    """
    found = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in words]
    for position, (word, ids) in enumerate(zip(words, found, strict=True)):
        if not ids:
            raise UserError(f"label word {word!r} has no token in this tokenizer: choose another word")
        if ids in found[:position]:
            raise UserError(
                f"label words {words[found.index(ids)]!r} and {word!r} are the same tokens: choose words that differ"
            )
    return found


def prompt_examples(
    documents: Sequence[Document], tokenizer: "PreTrainedTokenizerBase", block_size: int, words: Sequence[str]
) -> Examples:
    """One example a document, whose text is the prompt, cut and padded on the left to `block_size` tokens.

    Returns 'input_ids' and 'attention_mask' int64 (n, block_size), 'candidates' int64 (n, classes, width), NO_TOKEN
    behind the shorter ones, and 'labels' int64 (n,). The tokens a tokenizer puts before a text (a beginning of
    sequence) stay when a prompt is cut. Raises UserError where a document has no label, or one beyond the words.
    """
    if not documents:
        raise UserError("0 documents give no prompts: use a data set of at least 1 document")
    found = candidates_of(words, tokenizer)
    width = max(map(len, found))
    candidates = torch.tensor([[*ids, *[NO_TOKEN] * (width - len(ids))] for ids in found])
    labels = torch.tensor([_label(document, words) for document in documents])
    begin = _beginning(tokenizer)
    if len(begin) >= block_size:
        raise UserError(f"block-size = {block_size} holds no token of a prompt: raise it")
    prompts = [tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"] for document in documents]
    room = block_size - len(begin)
    if cut := sum(len(ids) > room for ids in prompts):
        warnings.warn(
            f"{cut:,} of {len(prompts):,} prompts are longer than block-size = {block_size} tokens: their beginnings "
            f"are left out; the longest has {max(map(len, prompts)) + len(begin):,}",
            stacklevel=2,
        )
    pad = tokenizer.pad_token_id if isinstance(tokenizer.pad_token_id, int) else 0  # masked, so that any will do
    ids = torch.full((len(documents), block_size), pad, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(prompts):
        whole = [*begin, *tokens[-room:]]
        ids[row, block_size - len(whole) :] = torch.tensor(whole)
        mask[row, block_size - len(whole) :] = 1
    return {
        "input_ids": ids,
        "attention_mask": mask,
        KEY: candidates.expand(len(documents), -1, -1).contiguous(),
        "labels": labels,
    }


def _beginning(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """What the tokenizer puts before a text, mostly nothing or one token."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    starts = [at for at in range(len(whole) - len(plain) + 1) if whole[at : at + len(plain)] == plain]
    return whole[: starts[0]] if starts else []


def _label(document: Document, words: Sequence[str]) -> int:
    if document.label is None:
        raise UserError(f"a document of data set {document.source!r} has no label: prompts take a column `label`")
    if document.label >= len(words):
        raise UserError(
            f"data set {document.source!r} has the label {document.label}, but label-words has {len(words)} words: "
            "give one for each label, from 0 on"
        )
    return document.label
