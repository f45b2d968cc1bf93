"""Losses of many perturbed models in one pass, weights untouched.

For a linear map, (W + eps a b^T) x = W x + eps (b . x) a: a rank1 direction needs no second copy of the weights. All
copies, both signs of many directions, run as one batch through the same weights; `torch.vmap` sees to it that whatever
lies below the first perturbed parameter runs once for all of them. Nothing is written into the model, so nothing has to
be restored and nothing drifts.
"""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from zofed.directions import rank1_factors, signs, tensor_id
from zofed.errors import UserError

QUERIES_AT_ONCE = 256  # directions whose factors are alive together: bytes ~ queries * sum(rows + columns)

_METADATA = {Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.element_size}

Factors = tuple[Tensor, ...]  # of one parameter: (a, b) for a matrix, (z,) for a vector


class Perturbation(TorchFunctionMode):
    """While active, every use of a listed parameter sees parameter + scale * direction.

    factors: by id of the parameter. scale: scalar tensor, epsilon with its sign. The products a linear map or an
    embedding needs are added to its output; in any other call the perturbed tensor stands in for the parameter, which
    is cheap for vectors and correct for all. `seen` collects the ids met.
    """

    def __init__(self, factors: dict[int, Factors], scale: Tensor, seen: set[int]) -> None:
        super().__init__()
        self.factors, self.scale, self.seen = factors, scale, seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA or getattr(func, "__name__", "") == "__get__":
            value = func(*args, **kwargs)
            if not isinstance(value, Tensor) or id(args[0]) not in self.factors:
                return value  # a shape, a device: no use of the weights
        if func is F.linear:
            x, weight, bias = _linear_arguments(*args, **kwargs)
            if self._is_matrix(weight) and id(x) not in self.factors:
                a, b = self._factors(weight)
                return self._linear(x, weight, bias, into=b, out=a)
        if func is torch.addmm:  # GPT-2's Conv1D: weight (in, out)
            bias, x, weight, plain = _addmm_arguments(*args, **kwargs)
            if plain and self._is_matrix(weight) and id(x) not in self.factors and bias.dim() == 1:
                a, b = self._factors(weight)
                return self._linear(x, weight.T, bias, into=a, out=b)
        if func is F.embedding and self._is_matrix(args[1]):
            a, b = self._factors(args[1])
            return add_product(F.embedding(*args, **kwargs), (a[args[0]] * self.scale).unsqueeze(-1), b.unsqueeze(0))
        args = tuple(self._replaced(value) for value in args)
        kwargs = {key: self._replaced(value) for key, value in kwargs.items()}
        return attention(*args, **kwargs) if func is F.scaled_dot_product_attention else func(*args, **kwargs)

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, into: Tensor, out: Tensor) -> Tensor:
        """W x + bias, and scale * (into . x) out for the matrix, scale * z for a perturbed bias, in one product."""
        left, right = [(x @ into) * self.scale], [out]
        if id(bias) in self.factors and bias is not None:
            left.append(torch.ones_like(left[0]) * self.scale)
            right.append(self._factors(bias)[0])
        return add_product(F.linear(x, weight, bias), torch.stack(left, -1), torch.stack(right))

    def _is_matrix(self, value: Any) -> bool:
        return len(self.factors.get(id(value), ())) == 2

    def _factors(self, parameter: Tensor) -> Factors:
        self.seen.add(id(parameter))
        return self.factors[id(parameter)]

    def _replaced(self, value: Any) -> Any:
        """The perturbed tensor in place of a listed parameter; any other value as it is."""
        if isinstance(value, list | tuple):
            is_used = any(id(item) in self.factors for item in value)
            return type(value)(self._replaced(item) for item in value) if is_used else value
        if id(value) not in self.factors:
            return value
        factors = self._factors(value)
        direction = factors[0] if len(factors) == 1 else torch.outer(*factors)
        return value + (direction * self.scale).reshape(value.shape)


def _linear_arguments(
    input: Tensor, weight: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    return input, weight, bias


def _addmm_arguments(
    input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1
) -> tuple[Tensor, Tensor, Tensor, bool]:
    return input, mat1, mat2, beta == 1 and alpha == 1


def add_product(base: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """base (..., out) + left (..., k) @ right (k, out); under vmap one batched product straight into `base`.

    The caller gives `base` away: it is overwritten when it holds one matrix for each copy.
    """
    return _AddProduct.apply(base, left, right)  # type: ignore[return-value]


def attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any, **kwargs: Any
) -> Tensor:
    """scaled_dot_product_attention that knows how to run under vmap: torch's own falls back to a loop there."""
    return _Attention.apply(query, key, value, attn_mask, args, kwargs)  # type: ignore[return-value]


class _ForwardOnly(torch.autograd.Function):
    """A function with a rule for vmap of its own; losses of perturbed models are never differentiated."""

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass


class _AddProduct(_ForwardOnly):
    @staticmethod
    def forward(base: Tensor, left: Tensor, right: Tensor) -> Tensor:
        return base + left @ right

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Tensor) -> tuple[Tensor, int]:
        copies, (base, left, right) = info.batch_size, args
        left, right = _copies_first(left, in_dims[1], copies), _copies_first(right, in_dims[2], copies)
        flat_left = left.reshape(copies, -1, left.shape[-1])
        if in_dims[0] is None:
            flat = base.reshape(1, -1, base.shape[-1]).expand(copies, -1, -1)
            return torch.baddbmm(flat, flat_left, right).view(copies, *base.shape), 0
        base = base.movedim(in_dims[0], 0)
        flat = base.reshape(copies, -1, base.shape[-1])
        return flat.baddbmm_(flat_left, right).view(base.shape), 0


class _Attention(_ForwardOnly):
    @staticmethod
    def forward(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, args: Any, kwargs: Any) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, mask, *args, **kwargs)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Tensor, int]:
        """Fold the copies into the batch dimension, attend once, unfold."""
        copies, (query, key, value, mask, rest, options) = info.batch_size, args
        q, k, v = (
            _copies_first(tensor, dim, copies).flatten(0, 1)
            for tensor, dim in zip((query, key, value), in_dims[:3], strict=True)
        )
        if mask is not None:
            mask = _copies_first(mask, in_dims[3], copies)
            mask = mask.expand(copies, q.shape[0] // copies, *mask.shape[2:]).flatten(0, 1)
        output = F.scaled_dot_product_attention(q, k, v, mask, *rest, **options)
        return output.unflatten(0, (copies, -1)), 0


def _copies_first(tensor: Tensor, dim: int | None, copies: int) -> Tensor:
    return tensor.unsqueeze(0).expand(copies, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


@torch.no_grad()
def losses(
    loss: Callable[[], Tensor],
    parameters: dict[str, Tensor],
    seeds: Sequence[int],
    epsilon: float,
    copies_per_pass: int,
) -> list[tuple[float, float]]:
    """(loss at w + epsilon z, loss at w - epsilon z) for the rank1 direction z of each seed.

    loss: scalar loss of one batch, built of torch calls on the given parameters. copies_per_pass: perturbed copies
    that share one pass; more are faster until the activations of all leave the cache or the memory. Raises UserError
    when the loss never used one of the parameters.
    """
    found: list[tuple[float, float]] = []
    for start in range(0, len(seeds), QUERIES_AT_ONCE):
        found += _losses_of_group(loss, parameters, seeds[start : start + QUERIES_AT_ONCE], epsilon, copies_per_pass)
    return found


def _losses_of_group(
    loss: Callable[[], Tensor], parameters: dict[str, Tensor], seeds: Sequence[int], epsilon: float, copies: int
) -> list[tuple[float, float]]:
    factors = [_factors_of(name, parameter, seeds) for name, parameter in parameters.items()]
    ids = [id(parameter) for parameter in parameters.values()]
    some = next(iter(parameters.values()))
    scales = torch.tensor([epsilon, -epsilon], dtype=some.dtype, device=some.device)
    seen: set[int] = set()

    def one(scale: Tensor, drawn: list[Factors]) -> Tensor:
        with Perturbation(dict(zip(ids, drawn, strict=True)), scale, seen):
            return loss().float()

    values: list[Tensor] = []
    queries = max(1, copies // 2)
    for start in range(0, len(seeds), queries):
        drawn = [tuple(f[start : start + queries].repeat_interleave(2, 0) for f in pair) for pair in factors]
        count = len(drawn[0][0]) // 2
        values.append(torch.vmap(one)(scales.repeat(count), drawn))
    _check_seen(parameters, seen)
    pairs: list[list[float]] = torch.cat(values).view(-1, 2).tolist()
    return [(plus, minus) for plus, minus in pairs]


def _factors_of(name: str, parameter: Tensor, seeds: Sequence[int]) -> Factors:
    shape = tuple(parameter.shape)
    drawn = rank1_factors(seeds, name, shape) if len(shape) > 1 else (signs(seeds, tensor_id(name), 0, prod(shape)),)
    return tuple(torch.from_numpy(factor).to(parameter) for factor in drawn)


def _check_seen(parameters: dict[str, Tensor], seen: set[int]) -> None:
    unseen = [name for name, parameter in parameters.items() if id(parameter) not in seen]
    if unseen:
        raise UserError(
            f"the loss never used the trainable parameters {', '.join(unseen[:3])}: set scope to leave them out"
        )
