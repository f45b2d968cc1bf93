"""Zeroth-order training of any torch module, a few lines in a script of your own.

zo = ZerothOrder(model, seed=1, queries=16, journal="run.zofed")
for x, y in batches:
    record = zo.measure(lambda: loss_function(model(x), y), rate=0.01)   # forward passes only; the weights stay
    zo.apply(record)                                                 # the weights move
replay(same_model_before_training, "run.zofed")                      # the same weights, bit for bit, anywhere
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from torch import nn

from zofed.base.errors import UserError
from zofed.core import aggregation
from zofed.core.aggregation import Measured, seeded
from zofed.core.digests import named_parameters
from zofed.core.directions import direction_seeds
from zofed.core.estimators import Estimate, Points, size_exponents
from zofed.core.genesis import make_genesis
from zofed.core.journal import Journal, differences, link, read
from zofed.core.kinds import KIND_PATTERN
from zofed.core.optimizers import Optimizer
from zofed.core.perturbed import Loss
from zofed.core.records import Seeded
from zofed.core.replica import Replica
from zofed.models import scopes


class ZerothOrder:
    """A module that is asked for slopes and moved by records.

    model: any module with float32 or bfloat16 parameters, on any device. seed: names every direction of the run.
    trainable: names of the parameters that train, or a scope as the setting of that name takes it (`norms`, `last-2`, a
    regular expression searched in the names); all by default. directions: `rank1` or `rankR` (batched, fast),
    `rademacher` or `gaussian` (written into the weights). queries: directions a step. epsilon: step per coordinate.
    finite_difference: `two-point` or `one-sided`. normalize_slopes: divide steps by the running spread of the slopes.
    direction_scale: `equal`, or `rms`: directions and steps of each tensor in proportion to its weights. optimizer: the
    rule for the steps. perturbations_per_pass: perturbed copies in one forward pass. journal: a file to write every
    record to before it is applied; where it exists already, its records are replayed first and the run continues from
    there. description: anything JSON can hold, kept in the journal.

    Raises UserError for settings out of their limits, or a journal of another run.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        seed: int,
        trainable: str | Iterable[str] | None = None,
        directions: str = "rank1",
        queries: int = 16,
        epsilon: float = 3e-4,
        finite_difference: Points = "one-sided",
        normalize_slopes: bool = True,
        direction_scale: Literal["equal", "rms"] = "equal",
        optimizer: Optimizer | None = None,
        perturbations_per_pass: int = 8,
        journal: str | Path | None = None,
        description: Mapping[str, Any] | None = None,
    ) -> None:
        parameters = named_parameters(model)
        if isinstance(trainable, str):
            trainable = scopes.trainable_names(model, trainable)
        names = list(parameters if trainable is None else trainable)
        if not names:
            raise UserError("nothing would train: give a module with parameters, and in trainable at least one of them")
        if wrong := [name for name in names if name not in parameters]:
            known = ", ".join(list(parameters)[:5])
            raise UserError(f"the module has no parameter {wrong[0]!r}: known are {known}, ...")
        if not re.fullmatch(KIND_PATTERN, directions):
            raise UserError(f"directions = {directions!r}: use rank1, rank2, ... rank99, rademacher or gaussian")
        if queries < 1 or not epsilon > 0 or perturbations_per_pass < 1:
            raise UserError(
                f"queries = {queries}, epsilon = {epsilon:g}, perturbations_per_pass = {perturbations_per_pass}: all "
                "must be above 0"
            )
        for key, value, choices in (
            ("finite_difference", finite_difference, get_args(Points)),
            ("direction_scale", direction_scale, ("equal", "rms")),
        ):
            if value not in choices:
                raise UserError(f"{key} = {value!r}: use {' or '.join(choices)}")
        in_proportion = direction_scale == "rms"
        exponents = size_exponents({name: parameters[name] for name in names}) if in_proportion else None
        genesis = make_genesis(
            model,
            dict(description or {}),
            names,
            seed=seed,
            kind=directions,
            optimizer=optimizer or Optimizer("sgd"),
            size_exponents=exponents,
        )
        self.replica = Replica(model, genesis)
        self.queries, self.epsilon, self.normalize_slopes = queries, epsilon, normalize_slopes
        self.finite_difference: Points = finite_difference
        self.perturbations_per_pass = perturbations_per_pass
        self.journal = self._opened(Path(journal)) if journal is not None else None
        self.estimate: Estimate | None = None

    def _opened(self, path: Path) -> Journal:
        """The journal to write to, a new one or one whose records the weights were just moved through."""
        if not path.exists():
            return Journal.create(path, self.replica.genesis)
        journal = Journal.open(path)
        if different := differences(self.replica.genesis, journal.genesis):
            journal.close()
            raise UserError(f"{path} began with another {', '.join(different)}: choose another file for this run")
        self.replica.replay(journal.entries)
        return journal

    def measure(self, loss: Loss, rate: float, examples: Any = None) -> Seeded:
        """The record of a step: slopes of `loss` along the next directions, and the rate to move by. Nothing moves.

        loss: a scalar of the model's forward pass, differentiable or not. examples: a batch for each query (tensors
        with the queries along their first dimension), handed to `loss`; by default all share the batch that `loss`
        holds. `estimate` then tells the mean loss, the slopes and the passes. Before the first slopes of a loss a few
        passes more tell whether slopes of it mean anything (`Measure.check`): raises UserError for a loss that draws
        random numbers, changes weights or buffers or never uses a trainable parameter. Raises ValueError for a loss
        that is not finite.
        """
        replica = self.replica
        seeds = direction_seeds(replica.genesis["seed"], replica.round + 1, 0, self.queries)
        self.estimate = replica.measure.slopes(
            loss, seeds, self.epsilon, self.perturbations_per_pass, self.finite_difference, examples
        )
        spread = replica.spread if self.normalize_slopes else None
        found = aggregation.merged({0: Measured.of(self.estimate)}, shared=False)
        return seeded(replica.round + 1, rate, found, self.queries, self.finite_difference, spread)

    def apply(self, record: Seeded) -> float:
        """Write the record to the journal, then move the weights by it. Returns the norm of the gradient estimate.

        Raises UserError, before anything is written, for a record of more directions than sum up exactly.
        """
        self.replica.check_exact(record)
        entry = self.journal.append(record) if self.journal else link(self.replica.head, record)
        return self.replica.apply(entry)

    def digest(self) -> str:
        """SHA-256 of all weights, hex: what two replicas compare."""
        return self.replica.digest()


def replay(model: nn.Module, journal: str | Path) -> str:
    """Move a module at the journal's initial weights through all its records; returns the SHA-256 of the weights.

    Raises UserError when the weights are not those the journal starts from, or the file is damaged.
    """
    contents = read(Path(journal))
    replica = Replica(model, contents.genesis)
    replica.replay(contents.entries)
    return replica.digest()
