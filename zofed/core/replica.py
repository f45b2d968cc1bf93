"""A module whose weights change by applying records, and by nothing else."""

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from math import ldexp, prod, sqrt

import torch
from torch import Tensor, nn

from zofed.base.errors import UserError
from zofed.core import directions, kinds, optimizers
from zofed.core.digests import named_parameters, raw_bytes, tensors_digest, weights_digest, weights_digest_over
from zofed.core.genesis import optimizer_of
from zofed.core.journal import Entry, Genesis, following, genesis_chain
from zofed.core.measure import Measure, Update
from zofed.core.records import Dense, Guided, Record, Seeded, Skipped, Spread

PROBE_POSITIONS = 1024  # elements of each tensor that a probe reads
BLOCK = 2**18  # entries of a tensor that move together: all their intermediate results stay in the cache
DIRECTIONS_AT_ONCE = 1024  # of consecutive records that move a block one after the other while it is in the cache

BACKPROP = "backprop/"  # before the names of a second optimizer's state


class NotKept(UserError):  # noqa: N818
    """A record's gradient or guide was not saved, or is corrupt; only a later checkpoint can replace it."""


class Replica:
    """The model at one point of a journal's history.

    model: at the base weights the genesis names. `measure` reads the weights and leaves them; `apply` moves them.
    Frozen matrices that the genesis names as quantised may be rounded once the replica is made: no record moves them.
    `round` is the last round applied (0: base), `head` the chain after the last entry applied, `origin` that before
    the first, which names the genesis. Raises UserError when the model is not the genesis's base.
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
        self.kind: kinds.Kind = genesis["directions"]
        self.parameters: dict[str, Tensor] = {name: everything[name] for name, _, _ in genesis["trainable"]}
        for name, parameter in everything.items():
            parameter.requires_grad_(name in self.parameters)
        self.optimizer = optimizer_of(genesis["optimizer"])
        own = genesis.get("backprop-optimizer")
        self.backprop_optimizer = optimizer_of(own) if own else self.optimizer
        self.sizes = {name: 2.0**exponent for name, exponent in genesis["size-exponents"].items()}
        self.spread = Spread()
        self.round = 0
        self.head = self.origin = genesis_chain(genesis)
        self._positions: tuple[int, list[Tensor]] = (-1, [])  # that `probe` reads in a round
        self.measure = Measure(model, self.parameters, self.kind, self.sizes)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every trainable tensor, by name."""
        return {name: tuple(parameter.shape) for name, parameter in self.parameters.items()}

    def apply(self, entry: Entry, update: Update | None = None) -> float:
        """Move the weights as the entry's record says.

        update: the gradient a dense record stands for, or the guide of a guided one; seeded records need none. Returns
        the Euclidean norm of the gradient estimate. Raises NotKept for a record without its update, UserError for one
        with another than its own, or one of another history.
        """
        return self._apply_entries([entry], update)[0]

    def replay(self, entries: Iterable[Entry], kept: Callable[[bytes], Update | None] = lambda _: None) -> None:
        """Apply entries one after the other, to the same bits as `apply` does, streaming many through each block.

        kept: the update or guide of a digest, where it was kept. Raises NotKept for a record without it, the weights
        being moved up to there.
        """
        group: list[Entry] = []
        count = 0
        for entry in entries:
            if (digest := update_digest(entry.record)) is not None:
                if group:
                    self._apply_entries(group)
                self._apply_entries([entry], kept(digest))
                group, count = [], 0
                continue
            size = len(entry.record.coefficients) if isinstance(entry.record, Seeded) else 1
            if group and count + size > DIRECTIONS_AT_ONCE:
                self._apply_entries(group)
                group, count = [], 0
            group.append(entry)
            count += size
        if group:
            self._apply_entries(group)

    @torch.no_grad()
    def _apply_entries(self, entries: Sequence[Entry], update: Update | None = None) -> list[float]:
        """Move the weights through consecutive entries; the only place where weights change. Returns their norms."""
        self._check_follow(entries, update)
        moving = [entry.record for entry in entries if not isinstance(entry.record, Skipped)]
        if not moving:  # rounds that were skipped move the head alone
            self.round, self.head = entries[-1].record.round, entries[-1].chain
            return [0.0] * len(entries)
        rules = [self.optimizer if isinstance(record, Seeded) else self.backprop_optimizer for record in moving]
        steps = [(record, rule, rule.begin_step()) for record, rule in zip(moving, rules, strict=True)]
        squares = [0.0] * len(steps)
        seeds = [self._seeds(record) for record in moving]
        for (name, parameter), drawn in zip(self.parameters.items(), self._drawn(seeds), strict=True):
            whole = parameter.detach() if parameter.dim() else parameter.detach().unsqueeze(0)
            estimates = [
                self._estimate(record, own, name, parameter, update, parts)
                for record, own, parts in zip(moving, seeds, drawn, strict=True)
            ]
            moments = {id(rule): rule.moments(name, whole) for rule in rules}
            columns = prod(whole.shape[1:])
            must_be_whole = any(rule.needs_whole(name) for rule in rules)
            at_once = len(whole) if must_be_whole else max(1, BLOCK // max(1, columns))
            size = self.sizes.get(name, 1.0)
            for start in range(0, len(whole), at_once):
                some = slice(start, min(start + at_once, len(whole)))
                now = whole[some]
                weight = now.to(torch.float32)  # float32 weights themselves, else a copy
                for index, ((record, rule, corrections), estimate) in enumerate(zip(steps, estimates, strict=True)):
                    state = {moment: tensor[some] for moment, tensor in moments[id(rule)].items()}
                    gradient = estimate(some.start, some.stop).view(weight.shape)
                    flat = gradient.flatten()
                    squares[index] += float(torch.dot(flat, flat))
                    own = size if isinstance(record, Seeded) else 1.0
                    rule.step(name, weight, gradient, state, record.rate, corrections, own)
                    if now.dtype != torch.float32:
                        weight = self._rounded(weight, name, record.round, some.start * columns)
                if now.dtype != torch.float32:
                    now.copy_(weight)
        for record in moving:
            if isinstance(record, Seeded):
                self.spread = self.spread.after(record.coefficients, record.exponent)
        self.round, self.head = entries[-1].record.round, entries[-1].chain
        norms = iter(squares)
        return [0.0 if isinstance(entry.record, Skipped) else sqrt(next(norms)) for entry in entries]

    def _seeds(self, record: Record) -> list[int]:
        """The seeds of the directions of a record's seeded part."""
        part = record.seeded if isinstance(record, Guided) else record
        if not isinstance(part, Seeded):
            return []
        return part.seeds(self.genesis["seed"])[: kinds.seeds_needed(self.kind, len(part.coefficients))]

    def _drawn(self, seeds: Sequence[Sequence[int]]) -> Iterator[list[directions.Factors]]:
        """For each parameter the factors of each record's directions, all drawn together; nothing for dense kinds."""
        kind = self.kind
        together = [seed for own in seeds for seed in own]
        if not kinds.terms(kind) or not together:
            yield from ([()] * len(seeds) for _ in self.parameters)
            return
        sizes = [len(own) for own in seeds]
        for _, parts in directions.draw(kind, together, self.shapes):
            split = [part.split(sizes) for part in parts]
            yield [tuple(part[index] for part in split) for index in range(len(seeds))]

    def check_exact(self, record: Record) -> None:
        """Raise UserError for a record whose sum could not be exact: no machine may write it down or move by it."""
        part = record.seeded if isinstance(record, Guided) else record
        if isinstance(part, Seeded):
            directions.check_exact(self.kind, part.coefficients, f"the record of round {record.round}")

    def _check_follow(self, entries: Sequence[Entry], update: Update | None) -> None:
        head = self.head
        for entry in entries:
            record = entry.record
            if not entry.follows(head):
                raise UserError(
                    f"the record of round {record.round} does not follow the history these weights come from"
                )
            self.check_exact(record)
            digest = update_digest(record)
            if digest is not None and update is None:
                raise NotKept(
                    f"round {record.round} is a step by backpropagation whose gradient is not kept: it needs a "
                    "checkpoint behind it to replay from, and there is none; keep-gradients = true keeps them"
                )
            if isinstance(record, Guided) and update and bytes.fromhex(tensors_digest(update)) != digest:
                raise UserError(
                    f"the guide at hand is not the one round {record.round} was taken with: go on with the machine, "
                    "the threads and the versions it began with"
                )
            head = entry.chain

    def _estimate(
        self,
        record: Record,
        seeds: list[int],
        name: str,
        parameter: Tensor,
        update: Update | None,
        drawn: directions.Factors,
    ) -> Callable[[int, int], Tensor]:
        """The record's gradient estimate of some rows of one tensor, a float32 tensor to keep.

        Of a seeded record: an exact sum, rounded once, times one float32.
        """
        if isinstance(record, Seeded):
            shape, device, coefficients = tuple(parameter.shape), parameter.device, record.coefficients
            if self.kind == "core":
                total = directions.CoreSum(coefficients, shape, device, drawn)
            else:
                total = directions.WeightedSum(self.kind, seeds, coefficients, name, shape, device, drawn)
            scale = ldexp(kinds.unit(self.kind) / record.divisor, record.exponent)
            return lambda start, stop: total.rows(start, stop).mul_(scale).to(device)
        assert update is not None
        gradient = update[name] if parameter.dim() else update[name].unsqueeze(0)
        if isinstance(record, Guided):
            noise = self._estimate(record.seeded, seeds, name, parameter, None, drawn) if seeds else None
            return lambda start, stop: guided_estimate(
                record,
                gradient[start:stop].to(parameter.device),
                noise and noise(start, stop).view(gradient[start:stop].shape),
            )
        device = parameter.device  # a kept gradient, or one that was sent, lies on the processor
        return lambda start, stop: gradient[start:stop].to(device, torch.float32, copy=True)

    def _rounded(self, moved: Tensor, name: str, round_: int, start: int) -> Tensor:
        """float32 values that bfloat16 holds; start: how many entries of the tensor come before these."""
        seed = directions.derive_seed("zofed-rounding", self.genesis["seed"], round_)
        bits = directions.random_bits(seed, name, moved.shape, start).to(moved.device)
        return optimizers.stochastic_round(moved, bits).to(torch.float32)

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint holds beside the weights: the optimizers' states, and the spread of the slopes."""
        spread = torch.tensor([self.spread.mean_square, self.spread.weight], dtype=torch.float64)
        state = self.optimizer.state_dict() | {"spread": spread}
        if self.backprop_optimizer is not self.optimizer:
            own = self.backprop_optimizer.state_dict()
            state |= {f"{BACKPROP}{key}": value for key, value in own.items()}
        return state

    def fits(self, state: Mapping[str, Tensor]) -> bool:
        """Whether `load` can take this state over: it has the keys, types and shapes that `state_dict` gives."""
        rest = dict(state)
        spread = rest.pop("spread", None)
        own = {key.removeprefix(BACKPROP): rest.pop(key) for key in list(rest) if key.startswith(BACKPROP)}
        shapes = {name: shape or (1,) for name, shape in self.shapes.items()}  # a scalar's moments are one row
        is_apart = self.backprop_optimizer is not self.optimizer
        return (
            spread is not None
            and (spread.dtype, tuple(spread.shape)) == (torch.float64, (2,))
            and self.optimizer.fits(rest, shapes)
            and (self.backprop_optimizer.fits(own, shapes) if is_apart else not own)
        )

    @torch.no_grad()
    def load(self, weights: dict[str, Tensor], state: dict[str, Tensor], *, round_: int, head: bytes) -> None:
        """Take over a checkpoint, weights and `state_dict`: what applying all entries up to `head` gives."""
        for name, parameter in self.parameters.items():
            parameter.copy_(weights[name])
        state = dict(state)
        self.spread = Spread(*state.pop("spread").tolist())
        devices = {name: parameter.device for name, parameter in self.parameters.items()}
        # Moments are named `<moment>/<tensor>`, of a second optimizer after BACKPROP; the powers are numbers.
        of = {key: key.removeprefix(BACKPROP).partition("/")[2] for key in state}
        state = {key: value.to(devices[of[key]]) if of[key] else value for key, value in state.items()}
        own = {key.removeprefix(BACKPROP): state.pop(key) for key in list(state) if key.startswith(BACKPROP)}
        self.optimizer.load_state_dict(state)
        if own:
            self.backprop_optimizer.load_state_dict(own)
        self.round, self.head = round_, head

    def digest(self) -> str:
        """SHA-256 of all weights and of the buffers saved with them, hex.

        Of a quantised base its unquantised digest counts in the place of what is rounded, so that a replay, which
        rounds nothing, ends with the same.
        """
        quantised = self.genesis.get("quantised")
        if quantised:
            return weights_digest_over(self.genesis["weights"], self.model, frozenset(quantised))
        return weights_digest(self.model)

    @torch.no_grad()
    def probe(self) -> bytes:
        """8 bytes that tell two replicas apart: a hash of seeded positions of every trainable tensor.

        Cheap enough for every round. It sees what moves many weights; a single flipped bit only the digest sees.
        """
        hashed = hashlib.blake2b(digest_size=8, person=b"zofed-probe")
        read = [torch.take(one, at).cpu() for one, at in zip(self.parameters.values(), self._probed(), strict=True)]
        for _, alike in itertools.groupby(read, lambda elements: elements.dtype):
            hashed.update(raw_bytes(torch.cat([*alike])))
        return hashed.digest()

    def _probed(self) -> list[Tensor]:
        """The positions that a probe reads of each tensor; drawn once a round, however many clients share a replica."""
        if self._positions[0] != self.round:
            seed = directions.derive_seed("zofed-probe", self.genesis["seed"], self.round)
            self._positions = (
                self.round,
                [
                    torch.from_numpy(directions.positions(seed, name, one.numel(), PROBE_POSITIONS)).to(one.device)
                    for name, one in self.parameters.items()
                ],
            )
        return self._positions[1]


def catch_up(replica: Replica, after: bytes, raw: bytes, updates: Mapping[bytes, Update] | None = None) -> bool:
    """Replay the records that follow chain `after`; False when the replica does not stand on their way.

    updates: what records that are no function of seeds need, by digest. Nothing is applied unless the way is whole.
    """
    try:
        entries = following(raw, after, replica.head)
    except ValueError:
        return False
    held = updates or {}
    if entries is None or any(
        (digest := update_digest(entry.record)) is not None and digest not in held for entry in entries
    ):
        return False
    replica.replay(entries, held.get)
    return True


def update_digest(record: Record) -> bytes | None:
    """SHA-256 of the tensors a record needs beside itself, empty where it does not say; None: it needs none."""
    if isinstance(record, Guided):
        return record.guide
    return (record.update if any(record.update) else b"") if isinstance(record, Dense) else None


def guided_estimate(record: Guided, guide: Tensor, noise: Tensor | None) -> Tensor:
    """A guided record's gradient estimate of some rows of a tensor: float32 of their shape.

    guide: those rows of the guide, float32. noise: the estimate of the record's seeded part, overwritten.
    """
    keeps = guide.abs() >= record.threshold
    estimate = (guide * keeps).mul_(record.kept)
    if record.whole:
        estimate.add_(guide * record.whole)
    if noise is None:
        return estimate
    return estimate.add_(noise.mul_(~keeps) if record.masked else noise)
