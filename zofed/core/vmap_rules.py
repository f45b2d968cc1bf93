"""Operations with rules for `torch.vmap` of their own: torch's take more memory, or a loop that it complains of."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zofed.core.deferred_logits import copies_first


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


def grouped_product(x: Tensor, stack: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """torch._grouped_mm, what F.grouped_mm calls: under vmap one product for all copies.

    x (rows, k), stack (n, k, out); of other shapes torch's own.
    """
    _, _, offs, is_plain = grouped_arguments(x, stack, *args, **kwargs)
    if torch.is_grad_enabled() or not is_plain:
        return torch._grouped_mm(x, stack, *args, **kwargs)
    return _GroupedProduct.apply(x, stack, offs)  # type: ignore[return-value]


def grouped_arguments(
    self: Tensor, mat2: Tensor, offs: Any = None, bias: Tensor | None = None, out_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Any, bool]:
    """The arguments of torch._grouped_mm, and whether they are rows of one matrix, by a stack, and nothing else."""
    is_plain = offs is not None and bias is None and out_dtype is None and (self.dim(), mat2.dim()) == (2, 3)
    return self, mat2, offs, is_plain


def histogram(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """torch.histc, of each copy its own."""
    return _Histogram.apply(tensor, args, kwargs)  # type: ignore[return-value]


def scatter_(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Tensor.scatter_: vmap knows `scatter` alone."""
    return tensor.copy_(torch.scatter(tensor, *args, **kwargs))


RULES: dict[Any, Any] = {
    torch._grouped_mm: grouped_product,
    torch.histc: histogram,
    Tensor.scatter_: scatter_,
}


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


class _GroupedProduct(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, stack: Tensor, offs: Tensor) -> Tensor:
        return torch._grouped_mm(x, stack, offs)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass  # used without gradients only

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Tensor) -> tuple[Tensor, int]:
        """Sort the rows of all copies by their matrix, multiply once, put them back; one by one if matrices differ."""
        x, stack, offs = args
        copies = info.batch_size
        x, offs = copies_first(x, in_dims[0], copies), copies_first(offs, in_dims[2], copies)
        if in_dims[1] is not None:
            stacks = stack.movedim(in_dims[1], 0)
            return torch.stack([torch._grouped_mm(*own) for own in zip(x, stacks, offs, strict=True)]), 0
        at = torch.arange(x.shape[1], device=x.device)
        matrix = (at[:, None] >= offs[:, None, :]).sum(-1).flatten()
        order = matrix.argsort(stable=True)
        product = torch._grouped_mm(x.flatten(0, 1)[order], stack, offs.sum(0, dtype=offs.dtype))
        return torch.empty_like(product).index_copy_(0, order, product).unflatten(0, (copies, -1)), 0


class _Histogram(torch.autograd.Function):
    @staticmethod
    def forward(tensor: Tensor, args: Any, kwargs: Any) -> Tensor:
        return torch.histc(tensor, *args, **kwargs)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass  # counts have no gradient

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Tensor, int]:
        tensor, rest, options = args
        return torch.stack([torch.histc(own, *rest, **options) for own in tensor.movedim(in_dims[0], 0)]), 0
