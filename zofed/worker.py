"""A model that can be asked and moved: weights change by `apply` alone."""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from math import ldexp, sqrt
from typing import Any

import torch
from torch import Tensor, nn

from zofed import directions, estimators, optimizers
from zofed.errors import UserError
from zofed.estimators import Estimate
from zofed.journal import Entry, Genesis, genesis_chain, link
from zofed.records import Dense, Seeded

PROBE_POSITIONS = 1024  # elements of each tensor that a probe reads

Update = dict[str, Tensor]  # a first-order step's gradient, by parameter name


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """All parameters by canonical name, a tied tensor once, under its first name.

    Raises UserError where two parameters cannot be told apart by their names.
    """
    named = [(directions.canonical_name(name), parameter) for name, parameter in model.named_parameters()]
    directions.check_distinct(name for name, _ in named)
    return dict(named)


def make_genesis(
    model: nn.Module,
    description: dict[str, Any],
    trainable: Iterable[str],
    *,
    seed: int,
    kind: directions.Kind,
    optimizer: optimizers.Optimizer,
) -> Genesis:
    """All that a replay depends on: the base weights, what trains, how seeds become directions, the optimizer."""
    parameters = named_parameters(model)
    return {
        "generator": directions.GENERATOR,
        "seed": seed,
        "directions": kind,
        "model": description,
        "weights": weights_digest(model),
        "trainable": [
            [name, str(parameters[name].dtype).removeprefix("torch."), list(parameters[name].shape)]
            for name in trainable
        ],
        "optimizer": {
            "name": optimizer.name,
            "momentum": optimizer.momentum,
            "weight-decay": optimizer.weight_decay,
        },
    }


class Worker:
    """A replica of the model at one point of a journal's history.

    model: at the base weights the genesis names, already on its device. `round` is the last round applied (0: base),
    `head` the chain after the last entry applied. Raises UserError when the model is not the genesis's base.
    """

    def __init__(self, model: nn.Module, genesis: Genesis) -> None:
        digest = weights_digest(model)
        if digest != genesis["weights"]:
            raise UserError(
                f"the base weights have SHA-256 {digest[:16]}..., the journal starts from "
                f"{genesis['weights'][:16]}...: give the model the run began with"
            )
        everything = named_parameters(model)
        self.model = model
        self.genesis = genesis
        self.parameters: dict[str, Tensor] = {name: everything[name] for name, _, _ in genesis["trainable"]}
        for name, parameter in everything.items():
            parameter.requires_grad_(name in self.parameters)
        rule = genesis["optimizer"]
        self.optimizer = optimizers.Optimizer(rule["name"], rule["momentum"], rule["weight-decay"])
        self.round = 0
        self.head = genesis_chain(genesis)

    def ask(self, loss: Callable[[], Tensor], seeds: list[int], epsilon: float, copies_per_pass: int) -> Estimate:
        """Slopes of `loss` along the seeds' directions; the weights are afterwards what they were, bit for bit."""
        return estimators.two_point(loss, self.parameters, self.genesis["directions"], seeds, epsilon, copies_per_pass)

    def gradient(self, loss: Callable[[], Tensor]) -> tuple[Update, float]:
        """Gradient of `loss` by backpropagation, and the loss."""
        value = loss()
        gradients = torch.autograd.grad(value, list(self.parameters.values()), allow_unused=True)
        update = {
            name: torch.zeros_like(parameter) if gradient is None else gradient
            for (name, parameter), gradient in zip(self.parameters.items(), gradients, strict=True)
        }
        return update, float(value.detach())

    @torch.no_grad()
    def apply(self, entry: Entry, update: Update | None = None) -> float:
        """Move the weights as the entry's record says; the only place where weights change.

        update: the gradient a dense record stands for; seeded records need none. Returns the Euclidean norm of the
        gradient estimate. Raises UserError for a dense record without its update.
        """
        record = entry.record
        if entry.chain != link(self.head, record).chain:
            raise UserError(f"the record of round {record.round} does not follow the history these weights come from")
        if isinstance(record, Dense) and update is None:
            raise UserError(
                f"round {record.round} is a first-order step, its gradient is not kept: it needs a checkpoint "
                "behind it to replay from, and there is none"
            )
        squares = 0.0
        if isinstance(record, Seeded | Dense):
            self.optimizer.begin_step()
            seeds = record.seeds(self.genesis["seed"]) if isinstance(record, Seeded) else []
            for name, parameter in self.parameters.items():
                if isinstance(record, Seeded):
                    gradient = self._estimate(record, seeds, name, parameter)
                else:
                    assert update is not None
                    gradient = update[name].to(torch.float32)
                squares += float(torch.linalg.vector_norm(gradient)) ** 2
                moved = self.optimizer.move(name, parameter.to(torch.float32), gradient, record.rate)
                parameter.copy_(self._rounded(moved, name, parameter.dtype, record.round))
        self.round, self.head = record.round, entry.chain
        return sqrt(squares)

    def _estimate(self, record: Seeded, seeds: list[int], name: str, parameter: Tensor) -> Tensor:
        """The record's gradient estimate of one tensor: an exact integer sum, one multiplication, one rounding."""
        total = directions.weighted_sum(
            self.genesis["directions"], seeds, record.coefficients, name, tuple(parameter.shape)
        )
        scale = ldexp(1.0 / record.divisor, record.exponent)
        return total.mul_(scale).to(torch.float32).to(parameter.device)

    def _rounded(self, moved: Tensor, name: str, dtype: torch.dtype, round_: int) -> Tensor:
        if dtype != torch.bfloat16:
            return moved
        seed = directions.derive_seed("zofed-rounding", self.genesis["seed"], round_)
        return optimizers.stochastic_round(moved, directions.random_bits(seed, name, moved.shape).to(moved.device))

    @torch.no_grad()
    def load(self, weights: dict[str, Tensor], optimizer: dict[str, Tensor], *, round_: int, head: bytes) -> None:
        """Take over a checkpoint: the state that applying all entries up to `head` gives."""
        for name, parameter in self.parameters.items():
            parameter.copy_(weights[name])
        device = next(iter(self.parameters.values())).device
        self.optimizer.load_state_dict(
            {key: value if key == "corrections" else value.to(device) for key, value in optimizer.items()}
        )
        self.round, self.head = round_, head

    def digest(self) -> str:
        """SHA-256 of all weights, hex."""
        return weights_digest(self.model)

    def probe(self) -> bytes:
        """8 bytes that tell two replicas apart: a hash of seeded positions of every trainable tensor.

        Cheap enough for every round. It sees what moves many weights; a single flipped bit only the digest sees.
        """
        seed = directions.derive_seed("zofed-probe", self.genesis["seed"], self.round)
        hashed = hashlib.blake2b(digest_size=8, person=b"zofed-probe")
        for name, parameter in self.parameters.items():
            chosen = directions.positions(seed, name, parameter.numel(), PROBE_POSITIONS)
            hashed.update(raw_bytes(parameter.detach().reshape(-1)[torch.from_numpy(chosen).to(parameter.device)]))
        return hashed.digest()


def weights_digest(model: nn.Module) -> str:
    """SHA-256 over all parameters by canonical name, hex; a tied tensor counts once."""
    return tensors_digest(named_parameters(model))


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over named tensors: names sorted, dtype, shape and raw bytes. Hex."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(raw_bytes(tensor))
    return digest.hexdigest()


def raw_bytes(tensor: Tensor) -> memoryview:
    """The tensor's elements as they lie in memory, whatever its dtype."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
