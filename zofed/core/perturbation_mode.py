"""While a `Perturbation` is active, calls of torch see weights shifted along directions; the weights stay as they are.

For a linear map, (W + s a b^T) x = W x + s (b . x) a: a direction of low rank needs no second copy of the weights.
"""

import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from zofed.core.copies import Copies, CustomFunctions, has_rule, run_forward
from zofed.core.deferred_logits import DEFER_FROM, Logits, checked
from zofed.core.directions import Factors
from zofed.core.vmap_rules import RULES, add_product, attention, grouped_arguments, grouped_product

_METADATA = {Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.element_size}


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
        self._turned: dict[int, tuple[Tensor, Tensor]] = {}  # by id of the view: a transposed view, what it is one of
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
            if not isinstance(value, Tensor) or not self._is_listed(args[0]):
                return value  # a shape, a device: no use of the weights
        if func is F.linear:
            x, weight, bias = _linear_arguments(*args, **kwargs)
            if not self._is_listed(x) and (self._is_matrix(weight) or _is_large(weight)):
                return self._linear(x, weight, bias)
        if func is torch.addmm:  # GPT-2's Conv1D: weight (in, out)
            bias, x, weight, plain = _addmm_arguments(*args, **kwargs)
            if plain and self._is_matrix(weight) and not self._is_listed(x) and bias.dim() == 1:
                return self._linear(x, weight, bias, is_transposed=True)
        if func is F.embedding and self._is_matrix(args[1]):
            a, b = self._factors(args[1])
            left = self._scaled(a[:, args[0]].movedim(0, -1), like=a)
            return add_product(F.embedding(*args, **kwargs), left, b)
        if func is Tensor.transpose and self._is_stack(args[0]) and {dim % 3 for dim in args[1:]} == {1, 2}:
            view = func(*args)  # experts' weights, on their way into a grouped product
            self._turned[id(view)] = view, args[0]
            return view
        if func is torch._grouped_mm:
            x, stack, offs, is_plain = grouped_arguments(*args, **kwargs)
            if is_plain and self._is_small(stack) and not self._is_listed(x):
                return self._grouped(x, stack, offs)
        if func is F.cross_entropy:
            logits, target, reduction, ignored = _checked_arguments(*args, **kwargs)
            is_flat = logits.dim() == 2 and target.dim() == 1 and reduction in ("mean", "sum")
            if is_flat and isinstance(logits, Logits) and not logits.is_whole:
                return logits.cross_entropy(target, ignored, reduction)
        args = tuple(self._replaced(value) for value in args)
        kwargs = {key: self._replaced(value) for key, value in kwargs.items()}
        if func is F.scaled_dot_product_attention:
            return attention(*args, **kwargs)
        return self.copies.call(RULES.get(func, func), args, kwargs) if self.copies else func(*args, **kwargs)

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

    def _grouped(self, x: Tensor, stack: Tensor, offs: Tensor) -> Tensor:
        """Rows of x (rows, k) times the matrices of `stack` (n, k, out), the i-th to begin where the one before ends.

        offs (n,): where each ends. A direction of such a stack is one matrix for all, times a number for each.
        """
        view, listed = self._turned.get(id(stack), (stack, stack))
        each, shared = self._factors(listed)
        matrices = shared.unflatten(1, listed.shape[1:])
        if view is not listed:
            matrices = matrices.transpose(1, 2)
        at = torch.arange(len(x), device=x.device)[:, None] >= offs
        sizes = self._scaled(each.T, like=each)[at.sum(1).clamp(max=len(stack) - 1)]
        shift = torch.einsum("sk,rko->sro", x, matrices) * sizes.unsqueeze(-1)
        plain = stack.detach()  # an object of its own: neither listed nor seen
        return grouped_product(x, plain, offs) + shift.sum(1)

    def _scaled(self, along: Tensor, like: Tensor, from_right: bool = False) -> Tensor:
        """What lies along the factors `like` of one side (..., r), as it lies along those of the other."""
        scale = self.scale.to(like)
        if scale.dim() < 2:
            return along * scale
        return along @ (scale.T if from_right else scale)

    def _is_matrix(self, value: Any) -> bool:
        return len(self.factors.get(id(value), ())) == 2 and value.dim() > 1

    def _is_stack(self, value: Any) -> bool:
        return self._is_matrix(value) and value.dim() == 3

    def _is_small(self, stack: Any) -> bool:
        """Whether a direction of a listed stack of matrices, or of its view, has fewer terms than it has matrices."""
        _, listed = self._turned.get(id(stack), (stack, stack))
        return self._is_stack(listed) and len(self.factors[id(listed)][0]) < len(listed)

    def _is_listed(self, value: Any) -> bool:
        return id(value) in self.factors or id(value) in self._turned

    def _factors(self, parameter: Tensor) -> Factors:
        self.seen.add(id(parameter))
        return self.factors[id(parameter)]

    def _replaced(self, value: Any) -> Any:
        """The perturbed tensor in place of a listed parameter, and a tensor in place of `Logits`; all else as it is."""
        if isinstance(value, list | tuple):
            is_used = any(self._is_listed(item) or isinstance(item, Logits) for item in value)
            return type(value)(self._replaced(item) for item in value) if is_used else value
        if isinstance(value, Logits):
            return value.tensor()
        if id(value) in self._turned:
            return self._replaced(self._turned[id(value)][1]).transpose(1, 2)
        if id(value) not in self.factors:
            return value
        first, *second = self._factors(value)
        if not second:
            shift = self.scale.to(first) @ first
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


def is_shared() -> bool:
    """Whether the pass that runs is one of many perturbed copies together."""
    modes = torch.overrides._get_current_function_mode_stack()
    return any(isinstance(mode, Perturbation) and mode.copies is not None for mode in modes)


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
