"""What a run's settings mean: its tokenizer, its documents and examples, its model."""

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from zofed.base import log, text_scores
from zofed.base.errors import UserError
from zofed.config import Settings
from zofed.core import metrics
from zofed.core.digests import tensors_digest, weights_digest
from zofed.core.replica import Replica
from zofed.data import classes, encoding, partitions, prompts
from zofed.data.classes import Classes
from zofed.data.documents import Reading, check_share
from zofed.data.encoding import Document, Examples
from zofed.models import adapters, classifier, initial, limits, spec
from zofed.models.spec import ModelSpec
from zofed.training import generation
from zofed.training.modes import mode_of
from zofed.training.process import device
from zofed.training.replicas import place, replica_of, tell_placement
from zofed.training.tasks import TASKS, Encoder, Question, TaskType, encoder_of, read, tokenizer_of

SOURCES = 16  # scored apart, at most: a column `source` may well name a page for each document


@dataclass(frozen=True, slots=True)
class Sample:
    """The examples that every evaluation of a run reads, out of the `held_out` that there are.

    bytes_per_token: UTF-8 bytes that one of their predicted tokens stands for, of a language model. empty: what their
    predictions are calibrated by.
    """

    examples: Examples
    held_out: int
    bytes_per_token: float | None = None
    empty: Examples | None = None


@dataclass(frozen=True)
class Task:
    """One run's data and model, the same for whoever builds it from the same settings.

    train: documents any client may hold a shard of; held_out: documents nobody trains on; backprop: those that
    backpropagation sees beside zeroth order (instruct, calibrate). The labels of all are numbers of the run's classes;
    named: those, None: as many as the documents show. readings: what was read of which data set. demonstrations: those
    before each prompt, which nobody trains on.
    """

    settings: Settings
    tokenizer: PreTrainedTokenizerBase
    train: list[Document]
    held_out: list[Document]
    backprop: list[Document]
    named: Classes | None = None
    readings: tuple[Reading, ...] = ()
    demonstrations: tuple[Document, ...] = ()

    @classmethod
    def load(cls, settings: Settings, named: Classes | None = None) -> "Task":
        """Read tokenizer and documents. Raises UserError for what is missing or unusable.

        named: the classes, where another has settled them: a run's server, for its clients.
        """
        classifier.check(settings)
        tokenizer = encoding.load_tokenizer(spec.tokenizer_name(settings))
        return cls.of(settings, tokenizer, read(settings, settings.dataset), named)

    @classmethod
    def of(
        cls, settings: Settings, tokenizer: PreTrainedTokenizerBase, found: Reading, named: Classes | None = None
    ) -> "Task":
        """A task whose tokenizer and documents were read already. Raises UserError for what is unusable."""
        kind = TASKS[settings.task]
        tokenizer = kind.tokenizer(settings, tokenizer)
        named = (named or kind.classes(settings, found)) if kind.has_classes else None
        readings = [found]

        def labelled(reading: Reading, key: str) -> list[Document]:
            return kind.labelled(settings, reading, named, f"{key} = {reading.dataset!r}")

        def more(dataset: str, key: str) -> list[Document]:
            readings.append(read(settings, dataset))
            return labelled(readings[-1], key)

        train = labelled(found, "dataset")
        if settings.eval_dataset:
            held_out = more(settings.eval_dataset, "eval-dataset")
        else:
            train, held_out = encoding.split_held_out(train, settings.held_out_fraction, settings.seed)
        train, shots = prompts.drawn(train, settings.shots, settings.seed)
        backprop = train
        if mode_of(settings).helps_zeroth_order and settings.bp_dataset:
            backprop = more(settings.bp_dataset, "bp-dataset")
        elif mode_of(settings).helps_zeroth_order and settings.bp_data_fraction:
            train, backprop = encoding.split_held_out(train, settings.bp_data_fraction, settings.seed, "backprop")
        return cls(settings, tokenizer, train, held_out, backprop, named, tuple(readings), tuple(shots))

    @classmethod
    def to_score(cls, settings: Settings, share: float = 0.0) -> "Task":
        """The task of a model that is scored and not trained: its held-out part alone need be there.

        share: of the eval-dataset that is scored, split off by the seed; 0: all. Raises UserError as `load`.
        """
        if settings.eval_dataset and not TASKS[settings.task].needs_training_data_to_score:
            tokenizer = tokenizer_of(settings)
            found = read(settings, settings.eval_dataset)
            task = cls(settings, tokenizer, [], found.documents, [], readings=(found,))
        else:
            task = cls.load(settings)
        return (
            replace(task, held_out=encoding.split_held_out(task.held_out, share, settings.seed)[1]) if share else task
        )

    @classmethod
    def own(cls, settings: Settings, dataset: str, named: Classes | int = 0) -> "Task":
        """The task of a node that reads its own `dataset` and needs none of the run's: client 0 of 1 holds it all.

        Nothing is held out here; `client_parts` does. dataset: an absolute path or a known name. named: the run's
        classes, of which a node may lack some, or how many they are where they are only numbers; 0: as many as the
        documents show. Raises UserError naming the key for a file that is missing, a document without a label and a
        label that is none of the classes.
        """
        classifier.check(settings)
        kind, what = TASKS[settings.task], f"node config dataset = {dataset!r}"
        if settings.shots:
            raise UserError(
                f"{what}, but the {settings.shots} shots come from the run's own data set, which this node does not "
                "read: write solved examples into the template and set shots to 0, or leave the node's dataset out"
            )
        found = read(settings, dataset, partitions.own)
        known = Classes.numbered(named) if isinstance(named, int) else named
        shown = known if len(known) or not kind.has_classes else classes.shown(found, what)
        own = kind.labelled(settings, found, shown, what)
        return cls(settings, tokenizer_of(settings), own, [], own, known if len(known) else None, (found,))

    @property
    def type(self) -> TaskType:
        """What the setting `task` is."""
        return TASKS[self.settings.task]

    @property
    def labels(self) -> int:
        """Number of classes of a classification task, 0 for a language model and where each row has its own choice."""
        if not self.type.has_classes or self.type.has_own_candidates(self.settings):
            return 0
        if self.named:
            return len(self.named)
        return 1 + max(document.label or 0 for document in (*self.train, *self.held_out, *self.backprop))

    @property
    def outputs(self) -> int:
        """Number of classes that the model's own head tells apart; 0 for a language model."""
        return self.labels if self.type.has_head else 0

    @property
    def class_names(self) -> tuple[str, ...]:
        """Of a classification task, the name of each class; of a language model none."""
        return (self.named or Classes.numbered(self.labels)).names if self.labels else ()

    def told(self) -> str:
        """Lines for people: what was read of which data set, and which classes there are."""
        lines = [reading.told() for reading in self.readings]
        if self.named:
            lines.append(classes.told(self.named, [*self.train, *self.held_out]))
        lines += self.type.told(self.settings, self.class_names)
        return "\n".join(f"data: {line}" for line in lines)

    def check_held_out(self) -> None:
        """Raise UserError when the held-out part is too short, before a run has written anything."""
        _ = self.held_out_sample

    def examples(self, documents: list[Document], cache: bool = True) -> Examples:
        """Documents as the tensors the model reads. cache: keep and find them in the user's cache."""
        return self._read_by_model(self._tokens(documents, cache), cache)

    def examples_to_train(self, documents: list[Document]) -> Examples:
        """The same, of which the task may leave something out that only scores need."""
        return self.type.to_train(self.settings, self.examples(documents))

    def _tokens(self, documents: list[Document], cache: bool = True) -> Examples:
        return self.type.examples(documents, self._encoder(cache))

    def _encoder(self, cache: bool = True) -> Encoder:
        encoder = encoder_of(self.settings, self.tokenizer, self.class_names, self.demonstrations)
        if not (cache and self.type.keeps_tokens):
            return encoder
        return replace(encoder, cache=encoding.default_cache(), digest=self.tokenizer_digest)

    def block_for(self, documents: list[Document]) -> int:
        """The block-size that holds all demonstrations before each document's prompt."""
        return self.type.block_for(documents, self._encoder())

    @cached_property
    def _model_config(self) -> Any:
        """Read once: a process may serve a thousand clients."""
        return ModelSpec.of(self.settings).saved_config()

    @cached_property
    def tokenizer_digest(self) -> str:
        """Computed once: a process may serve a thousand clients."""
        return encoding.tokenizer_digest(self.tokenizer)

    def _read_by_model(self, tokens: Examples, cache: bool = True) -> Examples:
        """The tokens; of a frozen encoder its features, computed once and kept beside the token caches.

        Raises UserError where the model cannot read them.
        """
        settings = self.settings
        at_end = self.outputs > 0 and settings.pooling == "auto" and not settings.freeze_encoder
        limits.check_tokens(tokens, self.tokenizer, self._model_config, settings.model, at_end=at_end)
        if not settings.freeze_encoder:
            return tokens
        # Not the replica's model, which a shard does not know; this one goes when the features are there.
        model = spec.create_model(self.settings, self.tokenizer, self.outputs)
        assert isinstance(model, classifier.PooledClassifier)
        chosen = device(self.settings)
        depends_on = (
            "features 1",
            tensors_digest(tokens),
            weights_digest(model.encoder),
            json.dumps(spec.describe(self.settings.model, model), sort_keys=True),
            f"{chosen.type} {torch.get_num_threads()} {torch.__version__}",
        )
        place(model, self.settings)
        found = encoding.kept(
            encoding.default_cache() if cache else None, depends_on, lambda: classifier.features(model, tokens)
        )
        return {"features": found, "labels": tokens["labels"]}

    def client_documents(self, client: int, clients: int) -> list[Document]:
        """The training documents of one client out of `clients`, by the setting partition."""
        check_share(len(self.train), client, clients)
        if clients not in self._dealt:
            self._dealt[clients] = partitions.deal(self.train, clients, self.settings)
        return self._dealt[clients][client]

    @cached_property
    def _dealt(self) -> dict[int, list[list[Document]]]:
        """By number of clients: dealt once, however many of them a process serves."""
        return {}

    def shard(self, client: int, clients: int) -> Examples:
        """The examples of one client out of `clients`; disjoint from every other client's."""
        found = self.client_documents(client, clients)
        with _named(f"client {client} of {clients}" if clients > 1 else ""):
            return self.examples_to_train(found)

    def client_parts(self, client: int, clients: int, share: float) -> tuple[Examples, Examples | None]:
        """(training, held-out) examples of one client: `share` of its documents, split off by the seed; 0: None.

        Raises UserError where either part has not one example, or share is not in [0, 1).
        """
        if share == 0:
            return self.shard(client, clients), None
        found = self.client_documents(client, clients)
        whose = f"client {client} of {clients}" if clients > 1 else "this client"
        with _named(f"client-held-out-fraction = {share:g}, {whose}"):
            train, held_out = encoding.split_held_out(found, share, self.settings.seed, "client held out")
        with _named(f"training part of {whose}", "or lower client-held-out-fraction"):
            examples = self.examples_to_train(train)
        with _named(f"held-out part of {whose}", "or raise client-held-out-fraction"):
            return examples, self.examples(held_out)

    @cached_property
    def held_out_sample(self) -> Sample:
        """What the whole held-out part is scored by. Raises UserError where it has not one example."""
        settings = self.settings
        if settings.eval_dataset:
            with _named(f"eval-dataset = {settings.eval_dataset!r}"):
                return self._sample(self.held_out)
        with _named("held-out part", f"or set held-out-fraction above {settings.held_out_fraction:g}"):
            return self._sample(self.held_out)

    @cached_property
    def backprop_examples(self) -> Examples:
        """What backpropagation sees. Raises UserError where its part of the data is smaller than one batch."""
        settings = self.settings
        need = settings.gradient_accumulation * (settings.bp_batch_size or settings.batch_size)
        try:
            found = self.examples_to_train(self.backprop)
        except UserError as error:
            raise UserError(f"backprop's part of the data: {error}") from error
        if len(found["labels"]) < need and self.backprop is not self.train:
            raise UserError(
                f"backprop's part of the data has {len(found['labels'])} examples, less than one batch of {need}: "
                "raise bp-data-fraction, give more data, or lower bp-batch-size"
            )
        return found

    def evaluate(self, model: nn.Module) -> metrics.Scores:
        """Scores on samples of the held-out examples, the same in every evaluation of a run.

        Of all of them, and of each source where there are several; of more than SOURCES only those of most documents.
        """
        whole, sources = self.held_out_sample, self._samples_by_source
        of_sources = len({document.source for document in self.held_out})
        coverage = metrics.Coverage(
            len(whole.examples["labels"]), whole.held_out, len(sources), of_sources if of_sources > 1 else 0
        )
        answered = self._answered(model)
        score = replace(self._score(model, whole), **text_scores.means((one.answer, one.wanted) for one in answered))
        return metrics.Scores(
            score, {name: self._score(model, own) for name, own in sources.items()}, coverage, answered
        )

    def _score(self, model: nn.Module, sample: Sample) -> metrics.Score:
        found = metrics.evaluate(model, sample.examples, bytes_per_token=sample.bytes_per_token, empty=sample.empty)
        # Candidates of a row's own are no classes: only whether the right one was chosen says something.
        return found if self.labels or found.accuracy is None else replace(found, f1=None, auc=None)

    def _answered(self, model: nn.Module) -> tuple[metrics.Answered, ...]:
        """A model's answers to some held-out prompts, the same in every evaluation of a run; none of other tasks."""
        if not self._questions:
            return ()
        encoder = self._encoder()
        stop = self.type.stop_tokens(encoder)
        return tuple(generation.answered(model, self._questions, encoder, stop, self.settings.max_new_tokens))

    @cached_property
    def _questions(self) -> list[Question]:
        chosen = encoding.sample(len(self.held_out), self.settings.generated_examples, self.settings.seed)
        return self.type.prompts_to_answer([self.held_out[at] for at in chosen.tolist()], self._encoder())

    @property
    def scored_documents(self) -> list[Document]:
        """The held-out documents that evaluations read, of a task with one example a document."""
        chosen = encoding.sample(len(self.held_out), self.settings.eval_examples, self.settings.seed)
        return [self.held_out[at] for at in chosen.tolist()]

    @cached_property
    def _samples_by_source(self) -> dict[str, Sample]:
        """By the sources' names, rising; a source too short for one example is left out."""
        counts = Counter(document.source for document in self.held_out)
        largest = sorted(counts, key=lambda source: (-counts[source], source))[:SOURCES]
        found = {}
        for source in sorted(largest) if len(counts) > 1 else ():
            try:
                found[source] = self._sample([document for document in self.held_out if document.source == source])
            except limits.Unreadable:
                raise
            except UserError:
                continue
        return found

    def _sample(self, documents: list[Document]) -> Sample:
        tokens = self._tokens(documents)
        chosen = self._chosen(tokens)
        examples, count = self._read_by_model(_at(tokens, chosen)), len(tokens["labels"])
        sizes = self.type.token_bytes(documents, self._encoder())
        if sizes is None:  # then an example is a document
            of_sample = [documents[position] for position in chosen.tolist()]
            return Sample(examples, count, empty=self.type.empty(self.settings, of_sample, self._encoder()))
        return Sample(examples, count, float(metrics.predicted_labels(sizes[chosen]).double().mean()))

    def sampled(self, examples: Examples) -> Examples:
        """Those of a client's own held-out examples that its evaluations read, the same each time."""
        return _at(examples, self._chosen(examples))

    def _chosen(self, examples: Examples) -> Tensor:
        return encoding.sample(len(examples["labels"]), self.settings.eval_examples, self.settings.seed)

    def baselines(self) -> dict[str, float]:
        """What knowing nothing scores on the very examples that evaluations read: losses in nats, and shares."""
        train, held_out = self._tokens(self.train), self.held_out_sample.examples
        return self.type.baselines(train, held_out, len(self.tokenizer), self.labels)

    def first_replica(self) -> Replica:
        """`replica`, of whoever begins a run: says what its saved model lacks, what adapts it, where its layers lie."""
        replica = self.replica()
        if adapter := adapters.described(replica.model):
            log.tell(adapter)
        if names := initial.drawn(replica.model):
            log.tell(initial.described(names))
        tell_placement(replica, self.settings)
        return replica

    def replica(self) -> Replica:
        """A new replica at the base weights, on the run's device, with the genesis that pins it."""
        model = spec.create_model(self.settings, self.tokenizer, self.outputs)
        if self.type.reads_turns and self.settings.packing:
            limits.check_packs(model, self.settings.model)
        return replica_of(self.settings, model)


def _at(examples: Examples, positions: Tensor) -> Examples:
    return {name: tensor[positions] for name, tensor in examples.items()}


@contextmanager
def _named(part: str, remedy: str = "") -> Iterator[None]:
    """Say in a UserError's line whose data it speaks of, and a remedy more."""
    try:
        yield
    except UserError as error:
        told = f"{part}: {error}" if part else str(error)
        if isinstance(error, limits.Unreadable):  # no other share of the documents mends that
            raise limits.Unreadable(told) from error
        raise UserError(f"{told}, {remedy}" if remedy else told) from error
