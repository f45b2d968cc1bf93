"""A run's model, its base or any saved one, asked as it was trained: the same tokens before an answer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from zofed.base.errors import UserError
from zofed.config import Settings, resolve
from zofed.core import metrics
from zofed.data import instructions
from zofed.data.documents import Document, Turn
from zofed.data.encoding import load_tokenizer
from zofed.models import spec
from zofed.runs.run_folder import RunFolder
from zofed.training import generation
from zofed.training.finalize import base_replica
from zofed.training.process import prepare_process
from zofed.training.replicas import place, place_model, replica_of
from zofed.training.task import Task
from zofed.training.tasks import TASKS, Encoder, TaskType, encoder_of

TUNED, BASE = "tuned", "base"


@dataclass(frozen=True)
class Request:
    """What is asked: a text, the turns of a conversation, or a row for a template."""

    text: str = ""
    turns: tuple[Turn, ...] = ()
    row: Mapping[str, Any] | None = None

    @property
    def shown(self) -> str:
        """For people."""
        return self.turns[-1].text if self.turns else self.text


@dataclass(frozen=True)
class Reply:
    """What one model says: an answer, whole or cut by the limit; or (scores) how likely each class is, from 0 to 1."""

    answer: str = ""
    is_whole: bool = True
    scores: Mapping[str, float] | None = None


@dataclass(frozen=True)
class Speaker:
    """One model, or a run's and its base, with what their prompts are made by.

    models: by name, TUNED first. stop: ids of the tokens that end an answer. has_turns: whether a prompt is a turn of a
    conversation, written by the chat template, so that earlier turns belong to it. class_names: of a task with classes.
    demonstrations: that stand before each prompt.
    """

    settings: Settings
    tokenizer: PreTrainedTokenizerBase
    models: Mapping[str, nn.Module]
    stop: tuple[int, ...] = ()
    has_turns: bool = False
    class_names: tuple[str, ...] = ()
    demonstrations: tuple[Document, ...] = ()

    @property
    def type(self) -> TaskType:
        """What the models were trained for."""
        return TASKS[self.settings.task]

    @property
    def encoder(self) -> Encoder:
        """How their documents become tokens."""
        return encoder_of(self.settings, self.tokenizer, self.class_names, self.demonstrations)

    def only(self, name: str) -> "Speaker":
        """One of the models alone."""
        return replace(self, models={name: self.models[name]})

    def ask(self, requests: Sequence[Request], max_new_tokens: int = 0) -> dict[str, list[Reply]]:
        """Each model's replies, by its name.

        max_new_tokens: of an answer; 0: as many as the setting says. Raises UserError for an empty prompt, and for one
        that leaves no room for an answer.
        """
        for request in requests:
            if not (self.type.has_classes and request.row) and not request.shown.strip():
                raise UserError("an empty prompt has no answer: write something")
        if self.type.has_classes:
            return self._classified(requests)
        how = self.stop, generation.padding(self.tokenizer), max_new_tokens or self.settings.max_new_tokens
        prompts = [self.tokens(request) for request in requests]
        found = {name: generation.answers(model, prompts, *how) for name, model in self.models.items()}
        return {
            name: [Reply(self._text(answer.ids), answer.is_whole) for answer in answers]
            for name, answers in found.items()
        }

    def _text(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def tokens(self, request: Request) -> list[int]:
        """The ids before the answer, as in training."""
        if self.has_turns:
            turns = request.turns or (Turn("user", request.text),)
            return instructions.prompt_tokens(turns, self.tokenizer)
        return list(self.tokenizer(request.shown, add_special_tokens=False, verbose=False)["input_ids"])

    def _classified(self, requests: Sequence[Request]) -> dict[str, list[Reply]]:
        documents = [Document(self.rendered(request), "prompt", 0) for request in requests]
        found = {}
        for name, model in self.models.items():
            logits = metrics.outcomes(model, self.type.examples(documents, self.encoder))[1]
            assert logits is not None, "a task with classes has logits"
            shown = self.type.words(self.settings, self.class_names) or self.class_names
            found[name] = [Reply(scores=dict(zip(shown, row.tolist(), strict=True))) for row in logits.softmax(-1)]
        return found

    def rendered(self, request: Request) -> str:
        """The text that a model with classes reads of a request."""
        template = self.type.template(self.settings)
        if template is None:
            return request.text
        return template.render(request.row if request.row is not None else {"text": request.text}, "the prompt")


def of_run(path: Path, *, compare: bool = False, changes: Mapping[str, Any] | None = None) -> Speaker:
    """A run's trained model and (compare) the base it began with.

    changes: settings, by key, of the machine. Raises UserError where there is no model yet.
    """
    folder = RunFolder.open(path)
    folder.check_has_model()
    settings = resolve(folder.settings().model_dump(by_alias=True) | dict(changes or {}))
    if not folder.has_model():
        raise UserError(f"{folder.path} has no model yet: let the run end, with {folder.go_on()}")
    prepare_process(settings.threads)
    names = tuple(map(str, folder.inputs().get("classes", ())))
    kind = TASKS[settings.task]
    tokenizer = kind.tokenizer(settings, load_tokenizer(str(folder.model)))
    own = settings.model_copy(update={"model": str(folder.model), "revision": ""})
    models: dict[str, nn.Module] = {TUNED: _loaded(own, tokenizer, len(names) if kind.has_head else 0)}
    if compare:
        began, _ = base_replica(folder)
        place_model(began, settings)
        models[BASE] = began.model
    shown = Task.load(settings).demonstrations if settings.shots else ()
    found = Speaker(settings, tokenizer, models, (), kind.reads_turns, names, shown)
    return replace(found, stop=kind.stop_tokens(found.encoder))


def of_model(name: str, *, plain: bool = False, changes: Mapping[str, Any] | None = None) -> Speaker:
    """A saved language model, in its own chat template if it has one.

    plain: without it. Raises UserError for a model that is not there.
    """
    settings = spec.as_saved(resolve({**(changes or {}), "model": name}))
    prepare_process(settings.threads)
    tokenizer = load_tokenizer(spec.tokenizer_name(settings))
    if tokenizer.chat_template and not plain:
        settings = settings.model_copy(update={"task": "instruction"})
    model: Any = _loaded(settings, tokenizer, 0)
    found = Speaker(settings, tokenizer, {TUNED: model}, has_turns=TASKS[settings.task].reads_turns)
    ends = model.generation_config.eos_token_id  # a chat's end of turn, where it is not the end of a text
    more = ends if isinstance(ends, list) else [ends] if isinstance(ends, int) else []
    return replace(found, stop=tuple(sorted({*found.type.stop_tokens(found.encoder), *more})))


def _loaded(settings: Settings, tokenizer: PreTrainedTokenizerBase, classes: int) -> nn.Module:
    model = spec.create_model(settings, tokenizer, classes)
    if settings.quantisation != "none":  # as the run's own evaluations had it
        return replica_of(settings, model).model
    place(model, settings)
    return model
