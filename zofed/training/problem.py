"""What a run trains: a model, its data, what both are scored by; here that which settings name, a task."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zofed.base.errors import UserError
from zofed.config import Settings
from zofed.core import metrics
from zofed.core.digests import named_parameters, weights_digest
from zofed.core.metrics import Scores
from zofed.core.replica import Replica
from zofed.data import partitions
from zofed.data.classes import Classes
from zofed.models import adapters, initial, spec
from zofed.models.precision import Model
from zofed.models.spec import ModelSpec
from zofed.runs.run_folder import RunFolder
from zofed.training import baselines, finalize, pins
from zofed.training.shards import Data
from zofed.training.task import Task

Place = tuple[int, int]  # index of a client, and among how many the data are dealt out


class Problem(ABC):
    """One run's model, data and scores, the same on every machine that takes part."""

    settings: Settings
    named: Classes | None = None  # classes whose labels nodes number as the run does
    tokens_per_example: int = 0
    parts_share_one: bool = False  # whether a node's own data are all one part, whatever its place

    @abstractmethod
    def told(self) -> str:
        """Lines for people, before the run begins."""

    @abstractmethod
    def held_out(self) -> str:
        """How much is held out, in words. Raises UserError where it is too little to score."""

    @abstractmethod
    def first_replica(self) -> Replica:
        """`replica`, of whoever begins a run, with what people should know of it told."""

    @abstractmethod
    def replica(self) -> Replica:
        """A new replica at the base weights, on the run's device, with the genesis that pins it."""

    @abstractmethod
    def rebuilt(self, folder: RunFolder) -> Replica:
        """A new replica at the base weights of the run in a folder, for a replay that proves it."""

    @abstractmethod
    def backprop_data(self) -> Data:
        """What the server backpropagates on, where the settings say that it does. Raises UserError for none."""

    @abstractmethod
    def parts(self, place: Place, node: Any) -> tuple[Data, Data | None]:
        """What one client trains on, and what it scores itself on. node: what the client's machine tells of itself.

        Raises UserError for data that are missing or of no use.
        """

    @abstractmethod
    def counts(self, place: Place, node: Any) -> dict[str, int]:
        """What a client holds, by group."""

    @abstractmethod
    def evaluate(self, model: nn.Module) -> Scores:
        """Scores on the held-out examples, the same ones in every evaluation of a run."""

    @abstractmethod
    def evaluate_part(self, model: nn.Module, held_out: Data) -> tuple[metrics.Score, int]:
        """Scores of a client's own held-out part, and how many examples they read."""

    @abstractmethod
    def pins(self) -> dict[str, Any]:
        """What a run that goes on must find unchanged, apart from its genesis."""

    @abstractmethod
    def keep_baselines(self, model: nn.Module, folder: RunFolder) -> None:
        """Measure what takes passes of the base weights, once a run."""

    @abstractmethod
    def baselines(self, folder: RunFolder) -> dict[str, float]:
        """What no learning gives, by name."""

    @abstractmethod
    def facts(self, replica: Replica) -> dict[str, Any]:
        """What the run was made of, for its summary."""

    @abstractmethod
    def save(self, replica: Replica, path: Path) -> None:
        """Write the trained model into a folder, which is there and empty."""


class TaskProblem(Problem):
    """What settings name. is_own: a node reads a data set of its own, all of it."""

    def __init__(self, task: Task, *, is_own: bool = False) -> None:
        self.task, self.settings, self.named = task, task.settings, task.named
        self.tokens_per_example, self.parts_share_one = task.settings.block_size, is_own

    def told(self) -> str:
        """What was read of which data set."""
        return self.task.told()

    def held_out(self) -> str:
        """Documents."""
        self.task.check_held_out()
        return f"{len(self.task.held_out)} documents held out"

    def first_replica(self) -> Replica:
        """The task's."""
        return self.task.first_replica()

    def replica(self) -> Replica:
        """The task's."""
        return self.task.replica()

    def rebuilt(self, folder: RunFolder) -> Replica:
        """From the run's files alone."""
        return finalize.base_replica(folder)[0]

    def backprop_data(self) -> Data:
        """The setting bp-dataset."""
        if not self.settings.bp_dataset:
            raise UserError("gradient-source = 'server' backpropagates on public data: set bp-dataset to it")
        return self.task.backprop_examples

    def parts(self, place: Place, node: Any) -> tuple[Data, Data | None]:
        """A share of the documents, dealt out by the setting partition; all of a node's own."""
        return self.task.client_parts(*self._share(place), self.settings.client_held_out_fraction)

    def counts(self, place: Place, node: Any) -> dict[str, int]:
        """Documents by label or source."""
        return partitions.counts(self.task.client_documents(*self._share(place)), self.settings.partition)

    def _share(self, place: Place) -> Place:
        return (0, 1) if self.parts_share_one else place

    def evaluate(self, model: nn.Module) -> Scores:
        """The task's."""
        return self.task.evaluate(model)

    def evaluate_part(self, model: nn.Module, held_out: Data) -> tuple[metrics.Score, int]:
        """Of the same sample each time."""
        assert isinstance(held_out, dict), "a task's parts are tensors by name"
        sample = self.task.sampled(held_out)
        return metrics.evaluate(model, sample), len(sample["labels"])

    def pins(self) -> dict[str, Any]:
        """Settings, and digests of all that it reads."""
        return pins.of(self.task)

    def keep_baselines(self, model: nn.Module, folder: RunFolder) -> None:
        """Those of a prompt's task."""
        baselines.keep(self.task, model, folder)

    def baselines(self, folder: RunFolder) -> dict[str, float]:
        """The task's, and what was kept."""
        return baselines.of(self.task, folder)

    def facts(self, replica: Replica) -> dict[str, Any]:
        """Its model and its data."""
        task, settings, adapted = self.task, self.settings, adapters.of(replica.model)
        weights = adapted.base if adapted else replica.genesis["weights"]  # without the adapter, which is drawn
        return {
            "base": {"model": settings.model, "revision": settings.revision, "weights": weights},
            "drawn": list(initial.drawn(replica.model)),
            "data": pins.digests(task),
            "data_read": [reading.facts() for reading in task.readings],
            **({"classes": list(task.class_names)} if task.labels else {}),
        }

    def save(self, replica: Replica, path: Path) -> None:
        """As a Hugging Face folder, safetensors and tokenizer, that AutoModel loads.

        Raises UserError as `_whole_model`.
        """
        task = self.task
        spec.save(self._whole_model(replica), task.tokenizer, path, task.class_names, ModelSpec.of(self.settings).base)

    @torch.no_grad()
    def _whole_model(self, replica: Replica) -> Model:
        """The replica's model; with a quantised base the unquantised one, read once more, with the weights that
        trained.

        Of an adapter, which is saved alone, no base need be read. Raises UserError where what is read is no longer the
        base of the run.
        """
        task, settings = self.task, self.settings
        if not replica.genesis.get("quantised") or spec.saves_adapter(replica.model, ModelSpec.of(settings).base):
            return replica.model  # type: ignore[return-value]
        model = spec.create_model(settings, task.tokenizer, task.outputs)
        if weights_digest(model) != replica.genesis["weights"]:
            raise UserError(
                f"model = {settings.model!r} has changed since the run began, and what trained belongs to the weights "
                "that it had: bring it back, then go on with zofed train --resume"
            )
        parameters: Mapping[str, nn.Parameter] = named_parameters(model)
        for name, trained in replica.parameters.items():
            parameters[name].copy_(trained)
        return model
