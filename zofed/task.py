"""What a run's settings mean: its tokenizer, its documents and examples, its model."""

import json
import math
import os
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedTokenizerBase

from zofed import classifier, config, data, documents, metrics, models, tokenizers, worker
from zofed.config import Settings
from zofed.data import Document, Examples
from zofed.errors import UserError
from zofed.estimators import size_exponents
from zofed.memory import keep_freed_memory
from zofed.optimizers import Optimizer
from zofed.worker import Worker


@dataclass(frozen=True)
class Task:
    """One run's data and model, the same for whoever builds it from the same settings.

    train: documents any client may hold a shard of; held_out: documents nobody trains on.
    """

    settings: Settings
    tokenizer: PreTrainedTokenizerBase
    train: list[Document]
    held_out: list[Document]

    @classmethod
    def load(cls, settings: Settings) -> "Task":
        """Read tokenizer and documents. Raises UserError for what is missing or unusable."""
        classifier.check(settings)
        tokenizer = data.load_tokenizer(models.tokenizer_name(settings))
        found = data.load_documents(settings.dataset)
        if settings.task == "classification":
            _check_labels(found, settings.dataset)
        train, held_out = data.split_held_out(found, settings.held_out, settings.seed)
        return cls(settings, tokenizer, train, held_out)

    @property
    def labels(self) -> int:
        """Number of classes of a classification task, 0 for a language model."""
        if self.settings.task == "language-model":
            return 0
        return 1 + max(document.label or 0 for document in (*self.train, *self.held_out))

    def check_held_out(self) -> None:
        """Raise UserError when the held-out part is too short, before a run has written anything."""
        _ = self.held_out_examples

    def examples(self, documents: list[Document]) -> Examples:
        """Documents as the tensors the model reads."""
        return self._read_by_model(self._tokens(documents))

    def _tokens(self, documents: list[Document]) -> Examples:
        size = self.settings.block_size
        if self.labels:
            return data.classification_examples(documents, self.tokenizer, size)
        return data.language_model_examples(documents, self.tokenizer, size, data.default_cache())

    def _read_by_model(self, tokens: Examples) -> Examples:
        """The tokens; of a frozen encoder its features, computed once and kept beside the token caches."""
        if not self.settings.freeze_encoder:
            return tokens
        # Not the worker's model, which a shard does not know; this one goes when the features are there.
        model = models.create_model(self.settings, self.tokenizer, self.labels)
        assert isinstance(model, classifier.PooledClassifier)
        chosen = device(self.settings)
        depends_on = (
            "features 1",
            worker.tensors_digest(tokens),
            worker.weights_digest(model.encoder),
            json.dumps(models.describe(self.settings.model, model), sort_keys=True),
            f"{chosen.type} {torch.get_num_threads()} {torch.__version__}",
        )
        nn.Module.to(model, chosen)
        found = data.kept(data.default_cache(), depends_on, lambda: classifier.features(model, tokens))
        return {"features": found, "labels": tokens["labels"]}

    def shard(self, client: int, clients: int) -> Examples:
        """The examples of one client out of `clients`; disjoint from every other client's."""
        return self.examples(data.shard(self.train, client, clients, self.settings.seed))

    @cached_property
    def held_out_examples(self) -> Examples:
        try:
            tokens = self._tokens(self.held_out)
        except UserError as error:
            raise UserError(f"held-out part: {error}, or set held-out above {self.settings.held_out:g}") from error
        return self._read_by_model(tokens)

    def evaluate(self, model: nn.Module) -> metrics.Score:
        """Score on the held-out examples."""
        return metrics.evaluate(model, self.held_out_examples, self.settings.eval_examples)

    def baselines(self) -> dict[str, float]:
        """Held-out losses (nats) of knowing nothing: uniform guesses, and the training set's frequencies."""
        train, held_out = self._tokens(self.train), self.held_out_examples
        if self.labels:
            return metrics.class_baselines(train["labels"], held_out["labels"], self.labels)
        vocabulary = len(self.tokenizer)
        return {"uniform": math.log(vocabulary), "unigram": data.unigram_loss(train, held_out, vocabulary)}

    def inputs(self) -> dict[str, Any]:
        """All that decides what the run's steps are, apart from the genesis: settings, and digests of what it reads."""
        return config.pinned(self.settings) | self.digests()

    def digests(self) -> dict[str, str]:
        """SHA-256 of the documents and of the tokenizer: what the run read."""
        return {
            "documents": data.documents_digest([*self.train, *self.held_out]),
            "tokenizer": data.tokenizer_digest(self.tokenizer),
        }

    def worker(self) -> Worker:
        """A new replica at the base weights, on the run's device, with the genesis that pins it."""
        model = models.create_model(self.settings, self.tokenizer, self.labels)
        settings = self.settings
        names = models.trainable_names(model, settings.scope)
        matrices = models.inner_matrices(model, names) if settings.optimizer == "mudamw" else []
        optimizer = Optimizer(
            settings.optimizer, settings.momentum, settings.weight_decay, settings.cautious, frozenset(matrices)
        )
        parameters = worker.named_parameters(model)
        in_proportion = settings.mode == "zo" and settings.direction_sizes == "rms"
        genesis = worker.make_genesis(
            model,
            models.describe(settings.model, model),
            names,
            seed=settings.seed,
            kind=settings.directions,
            optimizer=optimizer,
            size_exponents=size_exponents({name: parameters[name] for name in names}) if in_proportion else None,
        )
        return Worker(nn.Module.to(model, device(settings)), genesis)


def _check_labels(documents: list[Document], dataset: str) -> None:
    labels = {document.label for document in documents}
    if None in labels:
        raise UserError(
            f"dataset = {dataset!r} has documents without a label: "
            "give one with a label column, or set task to language-model"
        )
    if len(labels) < 2 or labels != set(range(len(labels))):
        found = [str(label) for label in sorted(label for label in labels if label is not None)]
        shown = ", ".join(found[:5]) + (", ..." if len(found) > 5 else "")
        raise UserError(
            f"dataset = {dataset!r} has the labels {shown}: classification takes at least 2 classes, numbered from 0 "
            "without gaps; renumber them"
        )


NAMES = {"model": tuple(models.SIZES), "dataset": documents.KNOWN_NAMES, "tokenizer": tokenizers.KNOWN_NAMES}


def with_absolute_paths(settings: Settings) -> Settings:
    """The settings with local paths absolute, so that they mean the same from every folder and later."""
    update = {}
    for key, names in NAMES.items():
        path = os.path.expanduser(getattr(settings, key))
        if path not in names and os.path.exists(path):
            update[key] = os.path.abspath(path)
    return settings.model_copy(update=update)


def prepare_process(threads: int) -> None:
    """Set what belongs to the process and not to a model: CPU threads, memory, the library's chatter."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def device(settings: Settings) -> torch.device:
    """The device of a run. Raises UserError for a CUDA device this machine does not have."""
    if settings.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = torch.device(settings.device)
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"device = {settings.device!r}: this machine has {torch.cuda.device_count()} CUDA devices; "
            "set device to cpu or auto"
        )
    return chosen
