"""Losses of many perturbed models in one pass, weights untouched.

For a linear map, (W + s a b^T) x = W x + s (b . x) a: a direction of low rank needs no second copy of the weights. All
copies, both signs of many directions, run as one batch through the same weights; `torch.vmap` sees to it that whatever
lies below the first perturbed parameter runs once for all of them. Nothing is written into the model, so nothing has to
be restored and nothing drifts.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from zofed.base.errors import UserError
from zofed.core import directions
from zofed.core.copies import Copies, CustomFunctions, Differ, NeedsOwn, has_rule, run_forward
from zofed.core.deferred_logits import DEFER_FROM, Logits, checked, copies_first
from zofed.core.directions import Factors

QUERIES_AT_ONCE = 32  # directions whose factors are drawn together: bytes ~ queries * sum(rows + columns)

_METADATA = {Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.element_size}

Loss = Callable[..., Tensor]  # of no arguments, or of the examples of one query


class CannotBatch(RuntimeError):  # noqa: N818, a property of the loss
    """The loss is built of something that cannot run for many perturbed copies at once; the text says what."""


class Unseen(UserError):  # noqa: N818
    """The loss never showed its use of some parameters, named in `names`."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(
            f"the loss never used the trainable parameters {', '.join(names[:3])}: set scope to leave them out"
        )
        self.names = tuple(names)


class Uncompiled(TorchFunctionMode):
    """While active, functions made by `torch.compile` run as they were written.

    Dynamo would trace what the mode does into its graph, and the mode would then do it a second time.
    """

    _stance: AbstractContextManager[Any]

    def __enter__(self) -> Any:
        # Importing dynamo takes seconds; where nobody has, nothing is compiled.
        is_loaded = "torch._dynamo" in sys.modules
        self._stance = torch.compiler.set_stance("force_eager") if is_loaded else nullcontext()
        self._stance.__enter__()
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self._stance.__exit__(*raised)


class Perturbation(Uncompiled):
    """While active, every use of a listed parameter sees parameter + sum over r of scale_r * direction_r.

    factors: by id of the parameter. scale: (r,), shared by all parameters, or (r, r) for all pairs of left and right
    factors; with one that requires a gradient, the loss can be differentiated by it. The products a linear map or an
    embedding needs are added to its output; in any other call the perturbed tensor stands in for the parameter, which
    is cheap for vectors and correct for all. `seen` collects the ids met. Where no gradient is wanted, large output
    layers become `Logits`. copies: answers what vmap refuses; None where there are not many copies.
    """

    def __init__(
        self, factors: Mapping[int, Factors], scale: Tensor, seen: set[int], copies: Copies | None = None
    ) -> None:
        super().__init__()
        self.factors, self.scale, self.seen, self.copies = factors, scale, seen, copies
        self._custom = CustomFunctions(self._apply)

    def __enter__(self) -> "Perturbation":
        self._custom.__enter__()
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self._custom.__exit__()

    def _apply(self, apply: Any, function: type[torch.autograd.Function], args: Any, kwargs: Any) -> Any:
        """What a custom autograd function gives: it sees the perturbed tensors, as any call does."""
        with torch._C.DisableTorchFunction():  # or this mode would see the sums and perturb once more
            args, kwargs = self._replaced(args), {key: self._replaced(value) for key, value in kwargs.items()}
        if self.copies and not has_rule(function):
            return run_forward(function, args, kwargs)
        return apply(*args, **kwargs)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _is_look(func):
            value = func(*args, **kwargs)
            if not isinstance(value, Tensor) or id(args[0]) not in self.factors:
                return value  # a shape, a device: no use of the weights
        if func is F.linear:
            x, weight, bias = _linear_arguments(*args, **kwargs)
            if id(x) not in self.factors and (self._is_matrix(weight) or _is_large(weight)):
                return self._linear(x, weight, bias)
        if func is torch.addmm:  # GPT-2's Conv1D: weight (in, out)
            bias, x, weight, plain = _addmm_arguments(*args, **kwargs)
            if plain and self._is_matrix(weight) and id(x) not in self.factors and bias.dim() == 1:
                return self._linear(x, weight, bias, is_transposed=True)
        if func is F.embedding and self._is_matrix(args[1]):
            a, b = self._factors(args[1])
            left = self._scaled(a[:, args[0]].movedim(0, -1), like=a)
            return add_product(F.embedding(*args, **kwargs), left, b)
        if func is F.cross_entropy:
            logits, target, reduction, ignored = _checked_arguments(*args, **kwargs)
            is_flat = logits.dim() == 2 and target.dim() == 1 and reduction in ("mean", "sum")
            if is_flat and isinstance(logits, Logits) and not logits.is_whole:
                return logits.cross_entropy(target, ignored, reduction)
        args = tuple(self._replaced(value) for value in args)
        kwargs = {key: self._replaced(value) for key, value in kwargs.items()}
        if func is F.scaled_dot_product_attention:
            return attention(*args, **kwargs)
        return self.copies.call(func, args, kwargs) if self.copies else func(*args, **kwargs)

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, is_transposed: bool = False) -> Any:
        """x W^T + bias with all that is perturbed in one product: scale * (into . x) out, and the bias as one row."""
        x, left, right = self._replaced(x), [], []
        if self._is_matrix(weight):
            out, into = self._factors(weight)
            if is_transposed:
                into, out = out, into
            left, right = [self._scaled(x @ into.T, like=into, from_right=not is_transposed)], [out]
        plain = weight.T if is_transposed else weight
        if bias is not None:
            left.append(x.new_ones(*x.shape[:-1], 1))
            right.append(self._replaced(bias).unsqueeze(0))
        if not left:
            left, right = [x.new_empty(*x.shape[:-1], 0)], [x.new_empty(0, plain.shape[0])]
        columns, rows = (
            parts[0] if len(parts) == 1 else torch.cat(parts, dim) for parts, dim in ((left, -1), (right, 0))
        )
        if _is_large(plain):
            return Logits(x, plain.detach(), columns, rows, x.dtype)  # an object of its own: not a listed parameter
        return add_product(F.linear(x, plain), columns, rows)

    def _scaled(self, along: Tensor, like: Tensor, from_right: bool = False) -> Tensor:
        """What lies along the factors `like` of one side (..., r), as it lies along those of the other."""
        scale = self.scale.to(like.dtype)
        if scale.dim() < 2:
            return along * scale
        return along @ (scale.T if from_right else scale)

    def _is_matrix(self, value: Any) -> bool:
        return len(self.factors.get(id(value), ())) == 2 and value.dim() > 1

    def _factors(self, parameter: Tensor) -> Factors:
        self.seen.add(id(parameter))
        return self.factors[id(parameter)]

    def _replaced(self, value: Any) -> Any:
        """The perturbed tensor in place of a listed parameter, and a tensor in place of `Logits`; all else as it is."""
        if isinstance(value, list | tuple):
            is_used = any(id(item) in self.factors or isinstance(item, Logits) for item in value)
            return type(value)(self._replaced(item) for item in value) if is_used else value
        if isinstance(value, Logits):
            return value.tensor()
        if id(value) not in self.factors:
            return value
        first, *second = self._factors(value)
        if not second:
            shift = self.scale.to(first.dtype) @ first
        elif value.dim() > 1:
            shift = self._scaled(first.T, like=first) @ second[0]
        else:
            shift = (self._scaled(first.T, like=first) * second[0].T).sum(-1)
        return value + shift.reshape(value.shape)


class Watch(Perturbation):
    """Perturbs nothing, and collects the ids of all that calls of torch are given; a look at a shape is no use."""

    def __init__(self) -> None:
        super().__init__({}, torch.ones(1), set())

    def _apply(self, apply: Any, function: type[torch.autograd.Function], args: Any, kwargs: Any) -> Any:
        self.seen.update(map(id, pytree.tree_leaves((args, kwargs))))
        return super()._apply(apply, function, args, kwargs)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        value = super().__torch_function__(func, types, args, kwargs)
        if not _is_look(func) or isinstance(value, Tensor):
            self.seen.update(map(id, pytree.tree_leaves((args, kwargs))))
        return value


def _is_look(func: Any) -> bool:
    """Whether a call only asks for a shape, a type, a device; an attribute that is a tensor is more than that."""
    return func in _METADATA or getattr(func, "__name__", "") == "__get__"


def in_pieces() -> Perturbation:
    """A mode that perturbs nothing: the loss of a large output layer is summed up in pieces, for less memory."""
    return Perturbation({}, torch.ones(1), set())


def _is_large(weight: Tensor) -> bool:
    """An output layer over a vocabulary, by its shape; the layers inside a model widen four times at most."""
    if weight.dim() != 2 or torch.is_grad_enabled():
        return False
    return weight.shape[0] >= max(DEFER_FROM, 5 * weight.shape[1])


def _linear_arguments(
    input: Tensor, weight: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    return input, weight, bias


def _addmm_arguments(
    input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1
) -> tuple[Tensor, Tensor, Tensor, bool]:
    return input, mat1, mat2, beta == 1 and alpha == 1


def _checked_arguments(
    input: Logits | Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> tuple[Logits | Tensor, Tensor, str, int]:
    """Logits, targets, reduction (`other`: none that `Logits` knows) and the ignored target of a cross-entropy.

    Raises UserError for a target that is no class.
    """
    is_plain = weight is None and size_average is None and reduce is None and label_smoothing == 0.0
    target = checked(target, input.shape[1 if input.dim() > 1 else 0], ignore_index)
    return input, target, reduction if is_plain else "other", ignore_index


def add_product(base: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """base (..., out) + left (..., k) @ right (k, out); under vmap one batched product straight into `base`.

    The caller gives `base` away: it is overwritten when it holds one matrix for each copy.
    """
    return _AddProduct.apply(base, left.to(base.dtype), right.to(base.dtype))  # type: ignore[return-value]


def attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any, **kwargs: Any
) -> Tensor:
    """scaled_dot_product_attention that knows how to run under vmap: torch's own falls back to a loop there."""
    if torch.is_grad_enabled() or query.dim() < 3:
        return F.scaled_dot_product_attention(query, key, value, attn_mask, *args, **kwargs)
    if attn_mask is not None:  # as many dimensions as the query, so that the copies can be folded into the first
        attn_mask = attn_mask[(None,) * (query.dim() - attn_mask.dim())]
    return _Attention.apply(query, key, value, attn_mask, args, kwargs)  # type: ignore[return-value]


class _AddProduct(torch.autograd.Function):
    """A sum with a rule for vmap of its own."""

    @staticmethod
    def forward(base: Tensor, left: Tensor, right: Tensor) -> Tensor:
        return base + left @ right

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        left, right = ctx.saved_tensors
        (given,) = gradients
        by_right = left.flatten(0, -2).T @ given.flatten(0, -2) if ctx.needs_input_grad[2] else None
        return given, given @ right.T, by_right

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Tensor) -> tuple[Tensor, int]:
        copies, (base, left, right) = info.batch_size, args
        left, right = copies_first(left, in_dims[1], copies), copies_first(right, in_dims[2], copies)
        flat_left = left.reshape(copies, -1, left.shape[-1])
        if in_dims[0] is None:
            flat = base.reshape(1, -1, base.shape[-1]).expand(copies, -1, -1)
            return torch.baddbmm(flat, flat_left, right).view(copies, *base.shape), 0
        base = base.movedim(in_dims[0], 0)
        flat = base.reshape(copies, -1, base.shape[-1])
        return flat.baddbmm_(flat_left, right).view(base.shape), 0


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, args: Any, kwargs: Any) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, mask, *args, **kwargs)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass  # used without gradients only

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Tensor, int]:
        """Fold the copies into the batch dimension, attend once, unfold."""
        copies, (query, key, value, mask, rest, options) = info.batch_size, args
        q, k, v = (
            copies_first(tensor, dim, copies).flatten(0, 1)
            for tensor, dim in zip((query, key, value), in_dims[:3], strict=True)
        )
        if mask is not None:
            mask = copies_first(mask, in_dims[3], copies)
            mask = mask.expand(copies, q.shape[0] // copies, *mask.shape[2:]).flatten(0, 1)
        output = F.scaled_dot_product_attention(q, k, v, mask, *rest, **options)
        return output.unflatten(0, (copies, -1)), 0


@torch.no_grad()
def losses(
    loss: Loss,
    parameters: Mapping[str, Tensor],
    kind: directions.Kind,
    seeds: Sequence[int],
    steps: Sequence[float],
    perturbations_per_pass: int,
    sizes: Mapping[str, float] | None = None,
    examples: Any = None,
) -> Tensor:
    """loss(w + step * z) for the direction z of each seed and each step: float32 or float64 (seeds, steps), on the CPU.

    loss: scalar of one batch, built of torch calls on the given parameters. kind: rankR. sizes: what multiplies the
    direction of each parameter, 1 where absent. perturbations_per_pass: perturbed copies that share one pass; more are
    faster until the activations of all leave the cache or the memory. examples: one batch for every seed, tensors with
    the seeds along their first dimension, each handed to `loss`; None for a loss of no arguments. Raises CannotBatch
    when the loss cannot run so, Unseen when it never used one of the parameters.
    """
    pairs = [(query, step) for query in range(len(seeds)) for step in steps]
    found, seen = [], set[int]()
    drawn: list[Factors] = []
    first = last = 0
    for start in range(0, len(pairs), perturbations_per_pass):
        some = pairs[start : start + perturbations_per_pass]
        if some[-1][0] >= last:  # draw on from the first query of this pass
            first, last = some[0][0], max(some[0][0] + QUERIES_AT_ONCE, some[-1][0] + 1)
            drawn = list(_factors(kind, seeds[first:last], parameters, sizes))
        queries = torch.tensor([query for query, _ in some])
        scale = torch.tensor(
            [[step * directions.unit(kind)] * directions.terms(kind) for _, step in some], dtype=torch.float64
        )
        batch = each_tensor(examples, lambda tensor, at=queries: tensor[at.to(tensor.device)])
        found.append(_one_pass(loss, parameters, drawn, queries - first, scale, seen, batch))
    unseen = [name for name, parameter in parameters.items() if id(parameter) not in seen]
    if unseen:
        raise Unseen(unseen)
    return torch.cat(found).view(len(seeds), len(steps)).cpu()


@torch.no_grad()
def losses_along(
    loss: Loss, parameters: Mapping[str, Tensor], factors: Mapping[str, Factors], steps: Sequence[float], batch: Any
) -> Tensor:
    """loss(w + step * z) at each step along one direction, all in one pass: (steps,) on the CPU.

    factors: of z by name, a (1, r, rows) and b (1, r, columns) of a matrix, z (1, r, entries) of a vector. batch: what
    `loss` is handed, None for a loss of no arguments. Raises CannotBatch when the loss cannot run so, or hides its use
    of a parameter.
    """
    seen = set[int]()
    drawn = [factors[name] for name in parameters]
    scale = torch.tensor(steps, dtype=torch.float64)[:, None]
    queries = torch.zeros(len(steps), dtype=torch.int64)
    batch = each_tensor(batch, lambda tensor: tensor.expand(len(steps), *tensor.shape))
    found = _one_pass(loss, parameters, drawn, queries, scale, seen, batch)
    for name, parameter in parameters.items():
        if id(parameter) not in seen:
            raise CannotBatch(hidden(name))
    return found.cpu()


def hidden(name: str) -> str:
    """Why a loss that depends on a parameter cannot run batched all the same."""
    return f"it uses {name} where no call of torch shows it"


def _one_pass(
    loss: Loss,
    parameters: Mapping[str, Tensor],
    drawn: list[Factors],
    queries: Tensor,
    scale: Tensor,
    seen: set[int],
    batch: Any,
    owns: bool = False,
) -> Tensor:
    """One loss for each of `queries` and rows of `scale`, all in one pass, or in one for each group that agrees."""
    ids = [id(parameter) for parameter in parameters.values()]
    like = next(iter(parameters.values()))
    # Each in its parameter's own type: a model in bfloat16 may keep some in float32.
    chosen = [
        tuple(factor[queries].to(parameter) for factor in pair)
        for parameter, pair in zip(parameters.values(), drawn, strict=True)
    ]

    def one(scale: Tensor, factors: list[Factors], batch: Any) -> Tensor:
        with Perturbation(dict(zip(ids, factors, strict=True)), scale, seen, Copies(scale, owns)):
            value = loss() if batch is None else loss(batch)
        if not isinstance(value, Tensor):
            raise CannotBatch(f"it gives a {type(value).__name__}, not a tensor")
        return value.to(torch.promote_types(value.dtype, torch.float32)).reshape(())

    try:
        by_copy = pytree.tree_map(lambda leaf: 0 if isinstance(leaf, Tensor) else None, batch)
        return torch.vmap(one, in_dims=(0, 0, by_copy))(scale.to(like), chosen, batch)
    except Differ as differ:
        found = torch.empty(len(queries))
        for group in differ.groups:
            at = torch.tensor(group)
            own = each_tensor(batch, lambda tensor, at=at: tensor[at.to(tensor.device)])
            some = _one_pass(loss, parameters, drawn, queries[at], scale[at], seen, own, owns)
            found = found.to(some)
            found[at.to(some.device)] = some
        return found
    except NeedsOwn:
        return _one_pass(loss, parameters, drawn, queries, scale, seen, batch, owns=True)
    except (torch.OutOfMemoryError, UserError, CannotBatch):
        raise
    except (RuntimeError, TypeError, ValueError) as error:  # vmap's limits; a fault of the loss shows again without it
        cause: BaseException | None = error
        while cause := cause.__context__:
            if isinstance(cause, KeyboardInterrupt):  # vmap, cut in its middle, fails again on its way out
                raise cause from None
        raise CannotBatch((str(error).strip().splitlines() or [type(error).__name__])[0]) from error


def along(
    loss: Loss,
    parameters: Mapping[str, Tensor],
    kind: directions.Kind,
    seeds: Sequence[int],
    coefficients: Tensor,
    sizes: Mapping[str, float] | None = None,
) -> Tensor:
    """loss(w + sum over k of coefficient_k * z_k), which can be differentiated by the coefficients (K,).

    Neither weights nor gradients of their size are written; the derivative at zero coefficients is the exact slope
    along each direction. kind: rankR, or core with one coefficient for each pair of seeds, row by row.
    """
    like = next(iter(parameters.values()))
    if kind == "core":
        scale = coefficients.view(len(seeds), len(seeds))
    else:
        scale = coefficients.repeat_interleave(directions.terms(kind)) * directions.unit(kind)
    factors = {
        id(parameter): tuple(part.flatten(0, 1).to(parameter) for part in parts)
        for parameter, parts in zip(parameters.values(), _factors(kind, seeds, parameters, sizes), strict=True)
    }
    with Perturbation(factors, scale.to(like), set()):
        return loss()


def _factors(
    kind: directions.Kind, seeds: Sequence[int], parameters: Mapping[str, Tensor], sizes: Mapping[str, float] | None
) -> Iterator[Factors]:
    """Factors of each seed's direction of each parameter, the last one times the parameter's size."""
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    for name, (*rest, last) in directions.draw(kind, seeds, shapes):
        size = (sizes or {}).get(name, 1.0)
        yield (*rest, last if size == 1.0 else last * size)


def each_tensor(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Nested examples with every tensor changed; any mapping becomes a dict, which vmap can look into."""
    if isinstance(value, Mapping):
        return {key: each_tensor(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(each_tensor(item, change) for item in value)
    return change(value) if isinstance(value, Tensor) else value
