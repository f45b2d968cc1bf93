"""Conversations as examples, of whose tokens the assistant's train, and the one that ends each of its turns."""

import warnings
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from zofed.base.errors import UserError
from zofed.base.texts import printable
from zofed.core.metrics import IGNORED_LABEL, Examples
from zofed.core.packed import KEY
from zofed.data.chat_templates import Writer, Written, beginning_of, is_plain, prompt_tokens, stop_tokens
from zofed.data.conversations import Turn
from zofed.data.documents import Document

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["instruction_examples", "prompt_tokens", "stop_tokens"]

_OPEN_BLOCKS = 64  # that a packed example may still go to
_FEW = 20  # conversations that may well all have the same prompt


def instruction_examples(
    documents: Sequence[Document],
    tokenizer: "PreTrainedTokenizerBase",
    block_size: int,
    loss_on: str = "response",
    packing: bool = False,
) -> Examples:
    """One example a conversation, or several in each where they are packed, padded on the right to `block_size` tokens.

    Returns 'input_ids', 'attention_mask' and 'labels' int64 (n, block_size), -100 where a token does not train; packed
    'segments' in place of the mask, see `core.packed`. Of a conversation that is too long the prompt loses its
    beginning, then the response its end. What was cut or left out is told in warnings. Raises UserError where a
    document holds no turns, and where not one token trains.
    """
    if not documents:
        raise UserError("0 documents give no conversations: use a data set of at least 1 document")
    if block_size < 2:
        raise UserError(f"block-size = {block_size} leaves no token to predict: use at least 2")
    writer, told, special = Writer(tokenizer), Counter[str](), tuple(tokenizer.all_special_tokens)
    rows: list[tuple[list[int], list[int]]] = []
    for number, document in enumerate(documents, 1):
        if not document.turns:
            raise UserError(
                f"document {number} of {len(documents)} is text, no conversation: set task to language-model"
            )
        try:
            written = writer.conversation(document.turns)
        except UserError as error:
            raise UserError(f"conversation {number} of {len(documents)} ({_begin(document)}): {error}") from None
        told["rewritten"] += written.is_rewritten
        told["merged"] += writer.merges_system and document.turns[0].role == "system"
        told["joined"] += is_plain(tokenizer) and _runs_on(document.turns)
        told["special"] += any(token in turn.text for turn in document.turns for token in special)
        told["longest"] = max(told["longest"], len(written.ids))
        row = _fitted(written, block_size, beginning_of(written.ids, tokenizer), loss_on, told)
        if any(label != IGNORED_LABEL for label in row[1][1:]):
            rows.append(row)
    told["dropped"] = len(documents) - len(rows)
    prompt = documents[0].turns[:-1]
    if len(documents) >= _FEW and prompt and all(document.turns[:-1] == prompt for document in documents):
        told["same"] = len(documents)
    if not rows:
        raise UserError(
            f"none of {len(documents)} conversations has a token that trains in its first {block_size}: "
            "raise block-size, or look at the responses"
        )
    _tell(told, len(documents), block_size)
    return _packed(rows, tokenizer, block_size) if packing else _padded(rows, tokenizer, block_size)


def _fitted(
    written: Written, block_size: int, begin: int, loss_on: str, told: Counter[str]
) -> tuple[list[int], list[int]]:
    """Tokens and labels of at most `block_size`. begin: tokens at the start that always stay."""
    ids = written.ids
    labels = list(ids) if loss_on == "all" else [IGNORED_LABEL] * len(ids)
    start, _ = written.spans[-1]
    over = len(ids) - block_size
    first = min(begin + max(over, 0), max(begin, start - 1))  # of those that stay; one precedes each that is predicted
    if loss_on != "all":
        for one, other in written.spans:
            if first == begin or one > first:  # a response without its beginning teaches nothing
                labels[one:other] = ids[one:other]
    if over > 0:
        told["cut"] += first > begin
        ids, labels = [*ids[:begin], *ids[first:]], [*labels[:begin], *labels[first:]]
        told["ends"] += len(ids) > block_size
    return ids[:block_size], labels[:block_size]


def _padded(rows: Sequence[tuple[list[int], list[int]]], tokenizer: "PreTrainedTokenizerBase", size: int) -> Examples:
    made = _blank(len(rows), tokenizer, size)
    mask = torch.zeros_like(made["labels"])
    for number, (ids, labels) in enumerate(rows):
        made["input_ids"][number, : len(ids)] = torch.tensor(ids)
        made["labels"][number, : len(ids)] = torch.tensor(labels)
        mask[number, : len(ids)] = 1
    return {"input_ids": made["input_ids"], "attention_mask": mask, "labels": made["labels"]}


def _packed(rows: Sequence[tuple[list[int], list[int]]], tokenizer: "PreTrainedTokenizerBase", size: int) -> Examples:
    """Each example goes to the first of the last blocks that has room for it."""
    blocks: list[list[int]] = []  # numbers of rows
    used: list[int] = []
    for number, (ids, _) in enumerate(rows):
        last = range(max(0, len(blocks) - _OPEN_BLOCKS), len(blocks))
        place = next((block for block in last if used[block] + len(ids) <= size), len(blocks))
        if place == len(blocks):
            blocks.append([])
            used.append(0)
        blocks[place].append(number)
        used[place] += len(ids)
    made = _blank(len(blocks), tokenizer, size)
    segments = torch.zeros_like(made["labels"])
    for block, numbers in enumerate(blocks):
        at = 0
        for segment, number in enumerate(numbers, 1):
            ids, labels = rows[number]
            made["input_ids"][block, at : at + len(ids)] = torch.tensor(ids)
            made["labels"][block, at : at + len(ids)] = torch.tensor([IGNORED_LABEL, *labels[1:]])
            segments[block, at : at + len(ids)] = segment
            at += len(ids)
    return {"input_ids": made["input_ids"], KEY: segments, "labels": made["labels"]}


def _blank(count: int, tokenizer: "PreTrainedTokenizerBase", size: int) -> Examples:
    pad = tokenizer.pad_token_id if isinstance(tokenizer.pad_token_id, int) else 0  # masked, so that any will do
    return {
        "input_ids": torch.full((count, size), pad, dtype=torch.int64),
        "labels": torch.full((count, size), IGNORED_LABEL, dtype=torch.int64),
    }


def _tell(told: Counter[str], count: int, block_size: int) -> None:
    of = f"of {count:,} conversations"
    longer = f"longer than block-size = {block_size} tokens"
    sentences = {
        "cut": f"{of} are {longer}: their prompts lost their beginnings; the longest has {told['longest']:,}",
        "ends": f"{of} have a last response {longer}: it lost its end, and with it the stop token",
        "dropped": f"{of} have no token that trains and are left out",
        "rewritten": f"{of} train on their last response alone: the chat template rewrites earlier turns",
        "merged": f"{of} have a system turn, which goes before the user's: the chat template has no place for it",
        "same": f"{of} have one and the same prompt: look whether columns and template name what differs",
        "special": f"{of} hold the text of a special token, which is read as that token",
        "joined": f"{of} have a prompt that runs into its response without white space: end the template by some, or "
        "give a chat-template",
    }
    for key, sentence in sentences.items():
        if told[key]:
            warnings.warn(f"{told[key]:,} {sentence}", stacklevel=3)


def _runs_on(turns: Sequence[Turn]) -> bool:
    """Whether words of a prompt and its response would become one."""
    return any(
        turn.role == "assistant"
        and before.text[-1:].isalnum() | (before.text[-1:] in ".?!")
        and turn.text[:1].isalnum()
        for before, turn in pairwise(turns)
    )


def _begin(document: Document) -> str:
    return repr(printable(document.turns[0].text[:40]))
