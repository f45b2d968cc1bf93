"""A module of a person's own as what a run trains: their builder, their loss, their data and metrics."""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_model
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from zofed import config
from zofed.base.errors import UserError
from zofed.config import Settings
from zofed.core import metrics
from zofed.core.digests import named_parameters, raw_bytes
from zofed.core.metrics import Coverage, Score, Scores
from zofed.core.perturbed import each_tensor
from zofed.core.replica import Replica
from zofed.core.sanitize import LARGEST_LOSS, MOST_MEASURES
from zofed.data import encoding
from zofed.models import scopes
from zofed.runs.run_folder import RunFolder
from zofed.training import own_data, own_settings, replicas
from zofed.training.own_data import OwnData, OwnLoss, OwnShard
from zofed.training.problem import Place, Problem
from zofed.training.shards import Batch, Data

TOGETHER = 64  # examples of one pass of an evaluation
LONGEST_NAME = 64

Metrics = Callable[[nn.Module, Sequence[Any]], Mapping[str, float]]  # of (module, batches)
DataOf = Callable[[Any], Any]  # of what a node tells of itself


class Batches(Sequence[Batch]):
    """Examples that an evaluation reads, in batches where the module reads them."""

    def __init__(self, data: OwnData, chosen: Sequence[int], model: nn.Module) -> None:
        self._data, self._model = data, model
        self._parts = [chosen[start : start + TOGETHER] for start in range(0, len(chosen), TOGETHER)]
        self.sizes = [len(part) for part in self._parts]

    def __len__(self) -> int:
        return len(self._parts)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[one] for one in range(*index.indices(len(self)))]
        with metrics.ready(self._model, self._data.at(self._parts[index])) as ready:
            return ready

    def __iter__(self) -> Iterator[Batch]:
        return (self[index] for index in range(len(self)))


@dataclass(frozen=True, slots=True)
class OwnModule:
    """What a person brings to server and clients alike.

    model: makes the untrained module, the same at every call under one seed of torch. loss: of (module, batch), a
    scalar, the mean over the batch. metrics: of (module, batches), numbers by name; None: the loss alone.
    """

    model: Callable[[], nn.Module]
    loss: OwnLoss
    metrics: Metrics | None = None

    def __post_init__(self) -> None:
        if isinstance(self.model, nn.Module) or not callable(self.model):
            is_made = isinstance(self.model, nn.Module)
            what = f"{own_data.kind_of(self.model)} that is made already" if is_made else repr(self.model)
            raise UserError(f"model = {what}: give the class, or a function that makes it anew at each call")
        for name, function in (("loss", self.loss), ("metrics", self.metrics)):
            if not callable(function) and not (name == "metrics" and function is None):
                raise UserError(f"{name} = {function!r} cannot be called: give a function of (module, batch)")

    @property
    def name(self) -> str:
        """What makes the module, by name."""
        return getattr(self.model, "__qualname__", type(self.model).__qualname__)

    def built(self, seed: int) -> nn.Module:
        """The untrained module. torch's random numbers stand where they stood. Raises UserError for what is none."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.model()
        if not isinstance(model, nn.Module):
            raise UserError(f"model = {self.name} gives {own_data.kind_of(model)}, not a torch.nn.Module")
        return model

    def scored(self, model: nn.Module, data: OwnData, chosen: Sequence[int]) -> Score:
        """Mean loss of the examples at these positions, dropout being off, and their own metrics of them."""
        with metrics.without_dropout(model), torch.no_grad():
            batches = Batches(data, chosen, model)
            losses = [float(self.checked(self.loss(model, batch), of="held-out data")) for batch in batches]
            total = math.fsum(loss * size for loss, size in zip(losses, batches.sizes, strict=True))
            found = self._measured(self.metrics(model, batches)) if self.metrics else {}
        accuracy, f1, auc = (found.get(name) for name in ("accuracy", "f1", "auc"))  # which tables have columns for
        return Score(total / len(chosen), accuracy, f1, auc=auc, own=found)

    def _measured(self, given: Any) -> dict[str, float]:
        """What `metrics` gave; a number that is not finite is left out."""
        if not isinstance(given, Mapping) or len(given) > MOST_MEASURES:
            raise UserError(f"metrics gives {own_data.kind_of(given)}: give a dict of at most {MOST_MEASURES} numbers")
        for name, value in given.items():
            is_number = isinstance(value, int | float) or (isinstance(value, Tensor) and value.numel() == 1)
            if not isinstance(name, str) or not 0 < len(name) <= LONGEST_NAME or not is_number:
                raise UserError(f"metrics gives {name!r}: {type(value).__name__}: give a number by a short name")
        return {name: float(value) for name, value in given.items() if math.isfinite(value)}

    def checked(self, loss: Any, of: str) -> Tensor:
        """A loss that their function gave. Raises UserError for what no run can follow, with what it is of."""
        if not isinstance(loss, Tensor):
            raise UserError(f"loss gives {own_data.kind_of(loss)} of {of}: give the tensor itself, without .item()")
        if loss.numel() != 1:
            raise UserError(f"loss gives a tensor of shape {tuple(loss.shape)} of {of}: give its mean, one number")
        if not loss.is_floating_point():
            raise UserError(f"loss gives {loss.dtype} of {of}: give a number with a fraction, as float32")
        return loss


class OwnProblem(Problem):
    """held_out: what the server scores, in a form of `own_data.read`; None on a client. data: a client's, of its node.

    values: settings, by key. Raises UserError for those that say what their own code says here.
    """

    def __init__(
        self, values: Mapping[str, Any], own: OwnModule, *, held_out: Any = None, data: DataOf | None = None
    ) -> None:
        self.own, self._data = own, data
        self.settings: Settings = own_settings.of(values, own.name)
        self._held_out = None if held_out is None else own_data.read(held_out, "the server's held_out")
        self._first: Replica | None = None
        self._latest: Replica | None = None

    def told(self) -> str:
        """How large the module is."""
        replica = self._latest or self.replica()
        train = sum(tensor.numel() for tensor in replica.parameters.values())
        return f"module: {self.own.name}, {train:,} of {scopes.true_count(replica.model):,} parameters train"

    def _scored_data(self) -> OwnData:
        assert self._held_out is not None, "a server has some"
        return self._held_out

    def held_out(self) -> str:
        """Examples."""
        return f"{self._scored_data().count:,} examples held out"

    def first_replica(self) -> Replica:
        """The same; what it holds, `told` says."""
        self._first = self.replica()
        return self._first

    def replica(self) -> Replica:
        """A module that is made anew. Raises UserError where nothing of it would train."""
        settings = self.settings
        model = self.own.built(settings.seed)
        parameters = named_parameters(model)
        if not any(parameter.requires_grad for parameter in parameters.values()):
            raise UserError(f"model = {self.own.name} has no parameter that requires a gradient: nothing would train")
        names = [name for name in scopes.trainable_names(model, settings.scope) if parameters[name].requires_grad]
        if not names:
            raise UserError(f"scope = {settings.scope!r} leaves only what {self.own.name} froze itself: set it to full")
        self._latest = replicas.made(settings, model, names, {own_settings.KEY: self.own.name})
        replicas.place_model(self._latest, settings)
        return self._latest

    def rebuilt(self, folder: RunFolder) -> Replica:
        """Made anew: the folder holds no code."""
        return self.replica()

    def trained(self) -> nn.Module:
        """The module of the run, once there is one."""
        assert self._first is not None, "a run has a replica"
        return self._first.model

    def backprop_data(self) -> Data:
        """None: `own_settings.of` lets nobody ask."""
        raise UserError("gradient-source = 'server' takes a task's bp-dataset: set it to clients")

    def _shard(self, data: OwnData) -> OwnShard:
        return OwnShard(data, self.own.loss, self.settings.forward_dtype)

    def parts(self, place: Place, node: Any) -> tuple[Data, Data | None]:
        """What their function gives for the node, of which the setting client-held-out-fraction splits off a share.

        Raises UserError for data and a loss that nothing can be trained by.
        """
        assert self._data is not None, "a client has some"
        whose = f"the data of client {place[0]}"
        data, share = own_data.read(self._data(node), whose), self.settings.client_held_out_fraction
        held_out = None
        if share:
            order = encoding.positions(data.count, self.settings.seed, place[0], 0, data.count, "client held out")
            cut = round(share * data.count)
            if not 0 < cut < data.count:
                raise UserError(f"{whose} is {data.count} examples: client-held-out-fraction = {share:g} leaves none")
            held_out, data = (_some(data, sorted(part)) for part in (order[:cut], order[cut:]))
        train = self._shard(data)
        self._check(train, place[0])
        return train, held_out and self._shard(held_out)

    def _check(self, shard: OwnShard, client: int) -> None:
        """Look at the loss of a batch as a run will measure it. Raises UserError for one that no run can follow."""
        replica, settings = self._latest or self.replica(), self.settings
        (batch,) = shard.batches(1, settings.batch_size, seed=settings.seed, client=client, step=1)
        of = f"the first batch of client {client}"
        with torch.no_grad():
            value = float(self.own.checked(shard.loss(replica.model, batch), of))
        if not abs(value) <= LARGEST_LOSS:
            raise UserError(
                f"loss gives {value:g} of {of}, before anything was trained: it must be a number of at most "
                f"{LARGEST_LOSS:,.0f} (take the mean over the batch, mend the data)"
            )
        replica.measure.check(shard.measured(replica.model, batch))

    def counts(self, place: Place, node: Any) -> dict[str, int]:
        """None by group: what groups there are, nobody says."""
        return {}

    def evaluate(self, model: nn.Module) -> Scores:
        """Of the same examples each time."""
        chosen = self._chosen(self._scored_data())
        score = self.own.scored(model, self._scored_data(), chosen)
        return Scores(score, {}, Coverage(len(chosen), self._scored_data().count))

    def evaluate_part(self, model: nn.Module, held_out: Data) -> tuple[Score, int]:
        """Of the same examples each time."""
        assert isinstance(held_out, OwnShard), "`parts` gave it"
        chosen = self._chosen(held_out.data)
        return self.own.scored(model, held_out.data, chosen), len(chosen)

    def _chosen(self, data: OwnData) -> list[int]:
        return encoding.sample(data.count, self.settings.eval_examples, self.settings.seed).tolist()

    def pins(self) -> dict[str, Any]:
        """Settings, and a digest of the examples that the server scores."""
        return config.pinned(self.settings) | self._digests()

    def _digests(self) -> dict[str, str]:
        data = self._scored_data()
        digest = hashlib.sha256()
        for leaf in pytree.tree_leaves(each_tensor(data.at(self._chosen(data)), Tensor.detach)):
            digest.update(raw_bytes(leaf) if isinstance(leaf, Tensor) else repr(leaf).encode())
        return {"held_out": digest.hexdigest()}

    def keep_baselines(self, model: nn.Module, folder: RunFolder) -> None:
        """None: what knowing nothing scores, nobody says."""

    def baselines(self, folder: RunFolder) -> dict[str, float]:
        """None."""
        return {}

    def facts(self, replica: Replica) -> dict[str, Any]:
        """The untrained module, and what was scored."""
        base = {"model": self.own.name, "revision": "", "weights": replica.genesis["weights"]}
        return {"base": base, "data": self._digests()}

    def save(self, replica: Replica, path: Path) -> None:
        """`model.safetensors`, for `safetensors.torch.load_model`."""
        save_model(replica.model, str(path / "model.safetensors"))


def _some(data: OwnData, chosen: Sequence[int]) -> OwnData:
    return OwnData(len(chosen), lambda positions: data.at([chosen[position] for position in positions]))
