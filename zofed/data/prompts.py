"""Prompts with candidates as the integer tensors that a language model scores, and solved ones before them."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from zofed.base.errors import UserError
from zofed.base.texts import printable
from zofed.core.candidates import KEY, NO_TOKEN, PLACE
from zofed.core.metrics import Examples
from zofed.data.documents import Document, random_order

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BLANK = "[MASK]"  # in a template: where a masked model's mask token goes
BETWEEN = "\n\n"  # solved prompts


def is_masked(template: str) -> bool:
    """Whether a masked model fills a place in the template, and not a causal one its end."""
    return BLANK in template


@dataclass(frozen=True)
class Encoding:
    """How prompts become tokens, of at most block_size with their longest candidate.

    Raises UserError for a masked model whose tokenizer has no mask token.

    words: candidates of each prompt whose document has none of its own. is_masked: a masked model reads them.
    """

    tokenizer: "PreTrainedTokenizerBase"
    block_size: int
    words: tuple[str, ...] = ()
    is_masked: bool = False

    def __post_init__(self) -> None:
        if self.is_masked and not isinstance(self.tokenizer.mask_token_id, int):
            raise UserError(
                f"the template has {BLANK}, but the tokenizer has no mask token: give a masked language model such as "
                f"BERT or RoBERTa with its tokenizer, or take {BLANK} out, so that the word follows the prompt"
            )

    @cached_property
    def edges(self) -> tuple[list[int], list[int]]:
        """Tokens that the tokenizer puts before and behind a text, mostly none or one."""
        plain = self.ids("a")
        whole = self.tokenizer("a")["input_ids"]
        starts = [at for at in range(len(whole) - len(plain) + 1) if whole[at : at + len(plain)] == plain]
        begin, end = (whole[: starts[0]], whole[starts[0] + len(plain) :]) if starts else ([], [])
        return begin, end if self.is_masked else []

    def ids(self, text: str) -> list[int]:
        """Tokens of a text alone; of a masked model's prompt with its mask token."""
        written = text.replace(BLANK, str(self.tokenizer.mask_token)) if self.is_masked else text
        return self.tokenizer(written, add_special_tokens=False, verbose=False)["input_ids"]

    @cached_property
    def _of_words(self) -> list[list[int]]:
        return candidates_of(self.words, self, "label words")

    def candidates(self, document: Document) -> list[list[int]]:
        """Tokens of each of a document's candidates. Raises UserError for what cannot be chosen among."""
        if not document.candidates:
            return self._of_words
        return candidates_of(document.candidates, self, f"candidates of {_shown(document)}")

    def room(self, document: Document) -> int:
        """Tokens that a document's prompt may have. Raises UserError where that is none."""
        longest = max(map(len, self.candidates(document)))
        found = self.block_size - sum(map(len, self.edges)) - (0 if self.is_masked else longest - 1)
        if found < 1:
            raise UserError(
                f"block-size = {self.block_size} holds no token of a prompt beside its candidates, of which the "
                f"longest has {longest} tokens ({_shown(document)}): raise it"
            )
        return found


def candidates_of(words: Sequence[str], encoding: Encoding, what: str = "label words") -> list[list[int]]:
    """The tokens of each word, as they follow a prompt, or take the mask's place.

    Raises UserError for a word without tokens, for two of the same, and for one of several tokens at a mask.
    """
    if not words:
        raise UserError("there are no label words: a prompt is answered by one of two or more")
    found = [encoding.ids(word) for word in words]
    for position, (word, ids) in enumerate(zip(words, found, strict=True)):
        if not ids:
            raise UserError(f"{what}: {word!r} has no token in this tokenizer: choose another word")
        if ids in found[:position]:
            raise UserError(
                f"{what}: {words[found.index(ids)]!r} and {word!r} are the same tokens: choose words that differ"
            )
        if encoding.is_masked and len(ids) > 1:
            parts = ", ".join(map(repr, encoding.tokenizer.convert_ids_to_tokens(ids)))
            raise UserError(
                f"{what}: {word!r} is {len(ids)} tokens ({parts}), but one takes the place of {BLANK}: choose a word "
                "of one token; many tokenizers have it with a space before it"
            )
    return found


def prompt_examples(documents: Sequence[Document], encoding: Encoding) -> Examples:
    """One example a document, whose text is the prompt.

    Returns 'input_ids' and 'attention_mask' int64 (n, longest), 'candidates' int64 (n, classes, width), NO_TOKEN behind
    the shorter ones and for the absent ones, and 'labels' int64 (n,). Prompts are padded and cut on the left, so that
    with their longest candidate they have at most block_size tokens; those of a masked model are padded on the right,
    cut around the mask, and 'place' int64 (n,) tells where it stands. What a tokenizer puts before a text stays. Raises
    UserError where a document has no label, or one beyond its candidates.
    """
    if not documents:
        raise UserError("0 documents give no prompts: use a data set of at least 1 document")
    prompts, places, cut, longest = [], [], 0, 0
    begin, end = encoding.edges
    for document in documents:
        ids, room = encoding.ids(document.text), encoding.room(document)
        cut, longest = cut + (len(ids) > room), max(longest, len(ids) + len(begin) + len(end))
        if encoding.is_masked:
            place = _mask(ids, encoding, document)
            first = max(0, min(place - (room - 1) // 2, len(ids) - room))
            places.append(place - first + len(begin))
            prompts.append([*begin, *ids[first : first + room], *end])
        else:
            prompts.append([*begin, *ids[-room:]])
    if cut:
        parts = "parts far from the mask" if encoding.is_masked else "beginnings"
        warnings.warn(
            f"{cut:,} of {len(prompts):,} prompts are longer than block-size = {encoding.block_size} tokens with their "
            f"candidates: their {parts} are left out; the longest has {longest:,}",
            stacklevel=2,
        )
    found = _padded(prompts, encoding) | _candidates(documents, encoding)
    return found | ({PLACE: torch.tensor(places)} if encoding.is_masked else {})


def _padded(prompts: Sequence[Sequence[int]], encoding: Encoding) -> Examples:
    pad = encoding.tokenizer.pad_token_id
    width = max(map(len, prompts))
    ids = torch.full(
        (len(prompts), width), pad if isinstance(pad, int) else 0, dtype=torch.int64
    )  # masked: any will do
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(prompts):
        at = slice(len(tokens)) if encoding.is_masked else slice(width - len(tokens), None)
        ids[row, at], mask[row, at] = torch.tensor(tokens), 1
    return {"input_ids": ids, "attention_mask": mask}


def _candidates(documents: Sequence[Document], encoding: Encoding) -> Examples:
    found = [encoding.candidates(document) for document in documents]
    most, width = max(map(len, found)), max(len(ids) for own in found for ids in own)
    tensor = torch.full((len(found), most, width), NO_TOKEN, dtype=torch.int64)
    for row, own in enumerate(found):
        for number, ids in enumerate(own):
            tensor[row, number, : len(ids)] = torch.tensor(ids)
    labels = [_label(document, len(own)) for document, own in zip(documents, found, strict=True)]
    return {KEY: tensor, "labels": torch.tensor(labels)}


def right_alone(examples: Examples) -> Examples:
    """The same prompts, each with its right candidate alone: what teacher forcing trains on."""
    labels = examples["labels"]
    right = examples[KEY][torch.arange(len(labels)), labels][:, None]
    width = int((right != NO_TOKEN).sum(2).max())
    return examples | {KEY: right[..., :width].contiguous(), "labels": torch.zeros_like(labels)}


def without_content(documents: Sequence[Document], prompt: str) -> list[Document]:
    """The documents' candidates behind a prompt without content: one document for all that have none of their own."""
    found = [replace(document, text=prompt) for document in documents]
    return found if documents[0].candidates else found[:1]


def _mask(ids: Sequence[int], encoding: Encoding, document: Document) -> int:
    places = [at for at, token in enumerate(ids) if token == encoding.tokenizer.mask_token_id]
    if len(places) != 1:
        raise UserError(
            f"{_shown(document)} has {len(places)} mask tokens, but one place is filled: put {BLANK} into the template "
            "once, and leave the mask token out of the data"
        )
    return places[0]


def _label(document: Document, candidates: int) -> int:
    if document.label is None:
        raise UserError(f"a document of data set {document.source!r} has no label: prompts take a column `label`")
    if document.label >= candidates:
        whose = f"candidates of {_shown(document)}: they have" if document.candidates else "label-words: they have"
        raise UserError(
            f"data set {document.source!r} has the label {document.label}, beyond the {whose} {candidates}: "
            "number them from 0 on"
        )
    return document.label


def check_own(documents: Sequence[Document], what: str) -> None:
    """Raise UserError, which begins with `what`, where a row has not two candidates of its own, the right one among
    them.
    """
    if without := sum(not document.candidates for document in documents):
        raise UserError(
            f"{what}: {without:,} of {len(documents):,} rows have no candidates of their own, and label-words is empty"
            ": give a word for each class, separated by commas, such as ' terrible, great', or a column candidates"
        )
    for document in documents:
        if len(document.candidates) < 2:
            raise UserError(f"{what}: {_shown(document)} has a single candidate: give two or more, or leave it out")
        if document.label is not None:
            _label(document, len(document.candidates))


def check_none_own(documents: Sequence[Document], what: str) -> None:
    """Raise UserError, which begins with `what`, where a row has candidates of its own beside the label words."""
    if own := sum(bool(document.candidates) for document in documents):
        raise UserError(
            f"{what}: {own:,} of {len(documents):,} rows have candidates of their own, and there are label-words too: "
            "leave label-words empty, or call the column another name"
        )


def drawn(documents: Sequence[Document], count: int, seed: int) -> tuple[list[Document], list[Document]]:
    """(others, demonstrations): `count` documents that a permutation by the seed puts first, each class in turn.

    A document with candidates of its own counts as of no class. Raises UserError where too few are left to train on.
    """
    if not count:
        return list(documents), []
    if count >= len(documents):
        raise UserError(
            f"shots = {count} takes as many documents out of the training data, which has {len(documents):,}: lower it"
        )
    ranks: dict[int | None, int] = {}
    order = []
    for place, position in enumerate(random_order(len(documents), "shots", seed).tolist()):
        label = None if documents[position].candidates else documents[position].label
        order.append((ranks.setdefault(label, 0), place, position))
        ranks[label] += 1
    chosen = [position for _, _, position in sorted(order)[:count]]
    others = sorted(set(range(len(documents))) - set(chosen))
    return [documents[position] for position in others], [documents[position] for position in chosen]


def solved(document: Document, encoding: Encoding) -> str:
    """A prompt with its right candidate."""
    candidates = document.candidates or encoding.words
    word = candidates[_label(document, len(candidates))]
    if not encoding.is_masked:
        return f"{document.text}{word}"
    before, _, behind = document.text.partition(BLANK)
    return f"{before}{word.lstrip() if before[-1:].isspace() else word}{behind}"


def with_shots(documents: Sequence[Document], demonstrations: Sequence[Document], encoding: Encoding) -> list[Document]:
    """The documents with solved prompts before theirs, a blank line between, as MeZO has it.

    Of prompts that are too long for the block whole demonstrations are left out from the front, which is told. None
    stands before a document of the same text. Raises UserError where a demonstration has no label, or one beyond its
    candidates.
    """
    texts = [(one.text, solved(one, encoding).strip()) for one in demonstrations]
    found, short = [], 0
    for document in documents:
        own = [text for prompt, text in texts if prompt != document.text]
        whole, left_out = _fitting(own, document, encoding)
        short += left_out > 0
        found.append(replace(document, text=whole))
    if short:
        warnings.warn(
            f"{short:,} of {len(found):,} prompts have fewer than {len(demonstrations)} demonstrations before them: "
            f"more do not fit into block-size = {encoding.block_size} tokens; raise it, or lower shots",
            stacklevel=2,
        )
    return found


def block_for(documents: Sequence[Document], demonstrations: Sequence[Document], encoding: Encoding) -> int:
    """A block size that holds all demonstrations before each document's prompt, with its longest candidate."""
    # One more each: what is joined may fall into other tokens than its parts.
    shown = sum(1 + len(encoding.ids(solved(one, encoding) + BETWEEN)) for one in demonstrations)
    edges = sum(map(len, encoding.edges))
    whole = (len(encoding.ids(one.text)) + max(map(len, encoding.candidates(one))) for one in documents)
    return edges + shown + max(whole)


def _fitting(solved_ones: Sequence[str], document: Document, encoding: Encoding) -> tuple[str, int]:
    """A document's text behind as many of them as its room holds, and how many were left out."""
    room = encoding.room(document)
    for left_out in range(len(solved_ones)):
        whole = BETWEEN.join([*solved_ones[left_out:], document.text.lstrip()])
        if len(encoding.ids(whole)) <= room:
            return whole, left_out
    return document.text, len(solved_ones)


def _shown(document: Document) -> str:
    text = printable(document.text)
    return f"the prompt {text if len(text) <= 60 else f'...{text[-57:]}'!r} of data set {document.source!r}"
