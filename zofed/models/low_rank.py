"""What training changed of a model's linear layers as a LoRA: factors of low rank, by singular values."""

import math
import re
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from zofed.core.digests import named_parameters
from zofed.models.initial import drawn
from zofed.models.scopes import is_norm

# A matrix whose smaller side is longer is decomposed for its first singular values alone: all of one of 2048 x 2048
# take 20 seconds of a core, the first 40 a tenth of one.
LARGEST_WHOLE = 1024
OVERSAMPLING, ITERATIONS = 32, 8  # of the randomised method (Halko, Martinsson and Tropp, 2011)
SHARES = (0.9, 0.99, 0.999)

_SECONDS_BETWEEN_WORDS = 5.0

EMBEDDINGS, NORMS, BIASES, OTHERS = "embeddings", "norms", "biases", "other tensors"


@dataclass(frozen=True)
class Matrix:
    """A linear layer's weight that trains. path: of the module; name: of the parameter. is_transposed: it lies as
    (inputs, outputs), as GPT-2 has it, and not as (outputs, inputs)."""

    path: str
    name: str
    is_transposed: bool

    @property
    def kind(self) -> str:
        """The path within its block: equal for the matrices of all blocks that do the same."""
        return re.sub(r"^.*\.\d+\.", "", self.path)


@dataclass(frozen=True)
class Change:
    """What one matrix changed by: nearly second @ first, (outputs, inputs), the best approximation of their rank.

    first: LoRA's A, float32 (rank, inputs); second: its B, float32 (outputs, rank), rank being less than asked for
    where the matrix has no more. squares: of the singular values, falling; of a large matrix the first ones. whole:
    the squared Frobenius norm of all of the change.
    """

    matrix: Matrix
    first: Tensor
    second: Tensor
    squares: tuple[float, ...]
    whole: float

    @property
    def is_cut(self) -> bool:
        """Whether singular values are missing."""
        return len(self.squares) < min(self.first.shape[1], self.second.shape[0])

    @property
    def held(self) -> float:
        """The squared norm of what the factors hold."""
        return min(self.whole, math.fsum(self.squares[: len(self.first)]))

    @property
    def missing(self) -> float:
        """The squared norm of what they do not hold."""
        unknown = self.whole - math.fsum(self.squares) if self.is_cut else 0.0
        return max(0.0, unknown + math.fsum(self.squares[len(self.first) :]))


@dataclass(frozen=True)
class Rest:
    """What trained and no LoRA holds. what: EMBEDDINGS, NORMS, BIASES or OTHERS; numbers: of entries; square: the
    squared norm of their change."""

    what: str
    tensors: int
    numbers: int
    square: float


@dataclass(frozen=True)
class Delta:
    """The change of a whole model.

    rank: of all factors, those of a smaller matrix filled up with zeros. heads: modules that go whole, as the base's
    folder does not hold them or another task's stand there: the paths with their tensors. is_exact: whether what the
    factors miss is no more than the rounding of the steps.
    """

    changes: tuple[Change, ...]
    rank: int
    heads: Mapping[str, Mapping[str, Tensor]]
    rest: tuple[Rest, ...]
    is_exact: bool

    @property
    def share(self) -> float:
        """Of the squared norm of the matrices' change, what the factors hold."""
        return _share(self.changes)

    def by_kind(self) -> dict[str, tuple[int, float, float]]:
        """By kind of matrix: how many changed, the norm of their change, and the share of its square that is held."""
        ordered = sorted(self.changes, key=lambda change: change.matrix.kind)
        grouped = {kind: list(own) for kind, own in groupby(ordered, key=lambda change: change.matrix.kind)}
        return {
            kind: (len(own), math.sqrt(math.fsum(change.whole for change in own)), _share(own))
            for kind, own in grouped.items()
        }

    @property
    def share_of_all(self) -> float:
        """Of the squared norm of all that changed, but for the heads, what the factors hold."""
        whole = math.fsum([*(change.whole for change in self.changes), *(rest.square for rest in self.rest)])
        return math.fsum(change.held for change in self.changes) / whole

    def smallest_rank(self, share: float) -> int | None:
        """The smallest rank that holds this share of the matrices' change; None: one above all that were found."""
        longest = max(len(change.squares) for change in self.changes)
        wanted = share * math.fsum(change.whole for change in self.changes)
        columns = (
            math.fsum(change.squares[at] for change in self.changes if at < len(change.squares))
            for at in range(longest)
        )
        found = next((at + 1 for at, held in enumerate(accumulate(columns)) if held >= wanted), None)
        shortest = min((len(change.squares) for change in self.changes if change.is_cut), default=longest)
        return found if found is not None and found <= shortest else None


def _share(changes: Collection[Change]) -> float:
    return math.fsum(change.held for change in changes) / math.fsum(change.whole for change in changes)


def matrices(model: nn.Module, names: Collection[str]) -> list[Matrix]:
    """Those of the named parameters that are weights of one linear layer each, and of nothing else, in model order.

    An output layer tied to the embedding is none: a LoRA of it would leave the embedding as it was.
    """
    users = _users(model)
    found = []
    for name, parameter in named_parameters(model).items():
        used = users[id(parameter)]
        if name in names and len(used) == 1 and isinstance(used[0][1], nn.Linear | Conv1D) and parameter.dim() == 2:
            path, module = used[0]
            found.append(Matrix(path, name, isinstance(module, Conv1D)))
    return found


def largest_rank(model: nn.Module, chosen: Sequence[Matrix]) -> int:
    """The largest rank that one of the matrices can have."""
    parameters = named_parameters(model)
    return max(min(parameters[matrix.name].shape) for matrix in chosen)


def heads(model: nn.Module) -> list[str]:
    """Paths of the modules that a file must hold whole: a classifier's head, and what its folder lacked.

    model: the base, which tells what was drawn.
    """
    base = getattr(model, "base_model_prefix", "")
    is_classifier = type(model).__name__.endswith("ForSequenceClassification")
    found = [
        name
        for name, child in model.named_children()
        if is_classifier and name != base and any(True for _ in child.parameters())
    ]
    lacked = dict.fromkeys(name.rpartition(".")[0] for name in drawn(model))
    return found + [path for path in lacked if not any(f"{path}.".startswith(f"{head}.") for head in found)]


def without_heads(base: nn.Module, names: Collection[str]) -> set[str]:
    """Those of the named parameters that no module of `heads` has."""
    inside = tuple(f"{path}." for path in heads(base))
    return {name for name in names if not name.startswith(inside)}


@torch.no_grad()
def delta(base: nn.Module, end: nn.Module, names: Collection[str], rank: int, steps: int) -> Delta:
    """What training made of `base`, as a LoRA of this rank.

    base, end: the same kind of model, on the CPU. names: of the parameters that trained. steps: how many moved them,
    each of which rounded them once. Matrices that did not change are left out. Raises ValueError where none did.
    """
    names, whole = without_heads(base, names), heads(base)
    before, after = named_parameters(base), named_parameters(end)
    changes, missing, rounding = [], list[float](), list[float]()
    chosen = matrices(end, names)
    for matrix in _with_words(chosen):
        old, new = before[matrix.name], after[matrix.name]
        difference = new.double() - old.double()
        if not bool(difference.any()):
            continue
        change = factored(matrix, difference.T if matrix.is_transposed else difference, rank)
        changes.append(change)
        missing.append(change.missing)
        # Half a unit in the last place at most, at each step, in each direction: a random walk.
        unit = torch.finfo(new.dtype).eps / 2 * math.sqrt(steps)
        rounding.append(max(_square(new), _square(old)) * unit**2)
    if not changes:
        raise ValueError("no matrix changed")
    modules = dict(end.named_modules())
    return Delta(
        tuple(changes),
        rank,
        {
            path: {name: tensor.detach().clone() for name, tensor in modules[path].state_dict().items()}
            for path in whole
        },
        tuple(_rest(before, end, names - {matrix.name for matrix in chosen})),
        all(left <= allowed for left, allowed in zip(missing, rounding, strict=True)),
    )


def _with_words(chosen: Sequence[Matrix]) -> Iterator[Matrix]:
    """The same; long work tells how far it is."""
    told = time.monotonic()
    for done, matrix in enumerate(chosen):
        if time.monotonic() - told > _SECONDS_BETWEEN_WORDS:
            told = time.monotonic()
            print(f"singular values of {done:,} of {len(chosen):,} matrices", flush=True)
        yield matrix


def factored(matrix: Matrix, change: Tensor, rank: int) -> Change:
    """The best approximation of this rank, the roots of the singular values in either factor.

    change: float64 (outputs, inputs), not all zero. Of a matrix above `LARGEST_WHOLE` only the first singular values
    are found, nearly (torch.svd_lowrank), unless they would be a quarter of all.
    """
    few, side = rank + OVERSAMPLING, min(change.shape)
    if side <= LARGEST_WHOLE or 4 * few > side:
        left, values, right = torch.linalg.svd(change, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # the same factors each time
            left, values, right = torch.svd_lowrank(change, few, ITERATIONS)
        right = right.T
    roots = values[:rank].sqrt()
    return Change(
        matrix,
        (roots[:, None] * right[:rank]).float().contiguous(),
        (left[:, :rank] * roots).float().contiguous(),
        tuple(values.square().tolist()),
        _square(change),
    )


def _rest(before: Mapping[str, Tensor], end: nn.Module, names: Collection[str]) -> Iterator[Rest]:
    """What trained beside the matrices, by what it is."""
    users, after = _users(end), named_parameters(end)
    found: dict[str, list[str]] = {}
    for name in after:
        if name in names:
            found.setdefault(_what(name, after[name], [module for _, module in users[id(after[name])]]), []).append(
                name
            )
    for what in (EMBEDDINGS, NORMS, BIASES, OTHERS):
        if own := found.get(what):
            square = math.fsum(_square(after[name].double() - before[name].double()) for name in own)
            yield Rest(what, len(own), sum(after[name].numel() for name in own), square)


def _what(name: str, parameter: Tensor, used: Sequence[nn.Module]) -> str:
    if any(isinstance(module, nn.Embedding) for module in used):
        return EMBEDDINGS
    if any(is_norm(module) for module in used):
        return NORMS
    return BIASES if parameter.dim() == 1 and name.endswith("bias") else OTHERS


def _users(model: nn.Module) -> dict[int, list[tuple[str, nn.Module]]]:
    """By the id of each parameter the modules that have it as their own, with their paths, each path once."""
    found: dict[int, list[tuple[str, nn.Module]]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for parameter in module.parameters(recurse=False):
            found.setdefault(id(parameter), []).append((path, module))
    return found


def _square(tensor: Tensor) -> float:
    """The squared Frobenius norm."""
    return float(tensor.double().square().sum())
