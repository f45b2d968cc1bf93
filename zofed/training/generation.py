"""Answers of a language model: greedy, in batches padded on the left, ended by the task's stop tokens."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from zofed.base import text_scores
from zofed.base.errors import UserError
from zofed.config import Settings
from zofed.core.devices import input_device
from zofed.core.metrics import IGNORED_LABEL, Answered, without_dropout
from zofed.core.perturbation_mode import is_shared
from zofed.core.perturbed import CannotBatch
from zofed.data.encoding import Examples
from zofed.models import limits
from zofed.training.tasks import TASKS, Encoder, Question, encoder_of, tokenizer_of

SPEAKS = ("task", "model", "revision", "tokenizer", "chat-template")  # settings that decide a run's tokenizer
TOGETHER = 16  # prompts that are answered in one batch


@dataclass(frozen=True, slots=True)
class Answer:
    """ids: of the tokens before the stop token. is_whole: whether there was one, else the limit cut it."""

    ids: tuple[int, ...]
    is_whole: bool


@torch.no_grad()
def answers(
    model: nn.Module, prompts: Sequence[Sequence[int]], stop: Sequence[int], pad: int | None, max_new_tokens: int
) -> list[Answer]:
    """The likeliest next token, one after the other, behind each prompt, until a stop token or the limit.

    prompts: token ids. stop: ids that end an answer; pad: of padding, which nothing reads. Where the model's context
    ends earlier, so does the answer. Whatever the model's folder says of generation does not count, and dropout is off.
    Raises UserError for a prompt of no tokens, or one that leaves no room for an answer; CannotBatch in a pass of many
    perturbed copies, whose answers part ways at every token.
    """
    if is_shared():
        raise CannotBatch("it generates text")
    longest = limits.positions(model)
    rooms = [max_new_tokens if longest is None else min(max_new_tokens, longest - len(ids)) for ids in prompts]
    for ids, room in zip(prompts, rooms, strict=True):
        if not ids:
            raise UserError("a prompt of 0 tokens cannot be answered: write something")
        if room < 1:
            raise UserError(
                f"a prompt of {len(ids):,} tokens leaves no room for an answer in the {longest:,} that the model "
                "reads: shorten it"
            )
    found: dict[int, Answer] = {}
    with _as_it_scores(model):
        for group in _groups([len(ids) for ids in prompts], rooms, max_new_tokens):
            together = [prompts[at] for at in group]
            for at, answer in zip(group, _answered(model, together, stop, pad or 0, rooms[group[0]]), strict=True):
                found[at] = answer
    return [found[at] for at in range(len(prompts))]


def _groups(lengths: Sequence[int], rooms: Sequence[int], limit: int) -> Iterator[list[int]]:
    """Positions of prompts that run together: of like length, each with all of the limit's room, or on its own."""
    ordered = sorted(range(len(lengths)), key=lambda at: (lengths[at], at))
    free = [at for at in ordered if rooms[at] == limit]
    for start in range(0, len(free), TOGETHER):
        yield free[start : start + TOGETHER]
    yield from ([at] for at in ordered if rooms[at] < limit)


def _answered(
    model: nn.Module, prompts: Sequence[Sequence[int]], stop: Sequence[int], pad: int, room: int
) -> list[Answer]:
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    device = input_device(model)
    config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=room,
        use_cache=True,
        eos_token_id=list(stop) or None,
        pad_token_id=pad,
    )
    generate: Any = model.generate
    written = generate(ids.to(device), attention_mask=mask.to(device), generation_config=config)[:, width:].tolist()
    return [_ended(tokens, frozenset(stop)) for tokens in written]


def _ended(tokens: list[int], stop: frozenset[int]) -> Answer:
    at = next((at for at, token in enumerate(tokens) if token in stop), None)
    return Answer(tuple(tokens[:at]), at is not None)


@contextmanager
def _as_it_scores(model: Any) -> Iterator[None]:
    """Without dropout, and without what the model's folder wants of generation: penalties, samples, forced tokens."""
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        with without_dropout(model):
            yield
    finally:
        model.generation_config = own


def answered(
    model: nn.Module, questions: Sequence[Question], encoder: Encoder, stop: Sequence[int], max_new_tokens: int
) -> list[Answered]:
    """What a model answers to each question, as text; a prompt's special tokens are shown, an answer's left out.

    Questions that leave no room for an answer are left out, with a word.
    """
    tokenizer, longest = encoder.tokenizer, limits.positions(model)
    asked = [one for one in questions if longest is None or len(one.prompt) < longest]
    if left_out := len(questions) - len(asked):
        warnings.warn(
            f"{left_out} of {len(questions)} prompts leave no room for an answer in the {longest:,} tokens that the "
            "model reads: they are not answered",
            stacklevel=2,
        )
    found = answers(model, [one.prompt for one in asked], stop, padding(tokenizer), max_new_tokens)
    return [
        Answered(
            str(tokenizer.decode(list(one.prompt))),
            str(tokenizer.decode(list(answer.ids), skip_special_tokens=True)),
            one.wanted,
        )
        for one, answer in zip(asked, found, strict=True)
    ]


def padding(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Id of a tokenizer's padding, if it has one."""
    return tokenizer.pad_token_id if isinstance(tokenizer.pad_token_id, int) else None


def questions_of(batch: Examples, tokenizer: PreTrainedTokenizerBase) -> list[Question]:
    """What each example of an instruction batch asks: the tokens before its last response, and that response.

    batch: 'input_ids' and 'labels' int64 (n, block), -100 where no response is, and 'attention_mask', if any. Raises
    ValueError for an example without a prompt or a response.
    """
    found = []
    masks = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
    for ids, labels, mask in zip(batch["input_ids"].cpu(), batch["labels"].cpu(), masks.cpu(), strict=True):
        counts = labels != IGNORED_LABEL
        last = int(counts.nonzero().max()) if bool(counts.any()) else -1
        before = (~counts[: last + 1]).nonzero()
        first = int(before.max()) + 1 if len(before) else 0
        prompt = ids[:first][mask[:first].bool()].tolist()
        if last < 0 or not prompt:
            raise ValueError("an example has no prompt before its response")
        found.append(Question(tuple(prompt), str(tokenizer.decode(ids[first : last + 1], skip_special_tokens=True))))
    return found


def generated(
    model: nn.Module,
    batch: Examples,
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
    stop: Sequence[int] | None = None,
) -> list[Answered]:
    """The answers to a batch of an instruction run: what an objective of one's own scores.

    batch: as `questions_of` takes it. stop: ids that end an answer; None: the tokenizer's end of sequence.
    """
    encoder = Encoder(tokenizer, batch["input_ids"].shape[1])
    ends = TASKS["language-model"].stop_tokens(encoder) if stop is None else stop
    return answered(model, questions_of(batch, tokenizer), encoder, ends, max_new_tokens)


class TextLoss:
    """1 - the mean score of the answers to a batch, by the setting objective; no copies of a model can share its pass.

    batch: what is answered; None: what each call is handed.
    """

    batches = False

    def __init__(self, settings: Settings, model: nn.Module, batch: Examples | None) -> None:
        self._settings, self._model, self._batch = settings, model, batch
        self._score = text_scores.TEXT_SCORES[settings.objective.replace("-", "_")]

    def __call__(self, batch: Examples | None = None) -> Tensor:
        """float32 scalar. Raises ValueError for an example without a prompt or a response."""
        examples = self._batch if batch is None else batch
        assert examples is not None, "either the loss or its caller has the examples"
        settings = self._settings
        tokenizer = _tokenizer(
            *((key, value) for key, value in settings.model_dump(by_alias=True).items() if key in SPEAKS)
        )
        stop = TASKS[settings.task].stop_tokens(encoder_of(settings, tokenizer))
        found = generated(self._model, examples, tokenizer, settings.max_new_tokens, stop)
        if not found:
            raise ValueError("no example's prompt leaves room for an answer")
        return torch.tensor(1.0 - sum(self._score(one.answer, one.wanted) for one in found) / len(found))


@lru_cache(maxsize=4)
def _tokenizer(*named: tuple[str, str]) -> PreTrainedTokenizerBase:
    """Read once: each of a run's losses decodes. named: the settings of SPEAKS, with their values."""
    return tokenizer_of(Settings.model_validate(dict(named)))
