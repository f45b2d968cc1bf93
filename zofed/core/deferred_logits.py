"""An output layer's product that is summed up in pieces instead of being held.

A language model's logits are its largest activation by far: rows x vocabulary, for every perturbed copy. Their
cross-entropy needs only a running log-sum-exp and the target's own logit, so they are made a few thousand entries of
the vocabulary at a time and stay in the cache.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from zofed.base.errors import UserError

DEFER_FROM = 4096  # outputs from which a layer's product is worth not holding
ROWS, ENTRIES = 1024, 2048  # one piece: 8 MiB of float32


class Logits:
    """hidden @ weight.T + left @ right, not computed yet; `cross_entropy` never computes all of it.

    hidden (..., width), weight (vocabulary, width), left (..., k), right (k, vocabulary), all of one device. device: of
    what is made of them, theirs if not given. It follows a library's loss through views of its leading dimensions and
    changes of type or device; anything else gets the whole product, as a tensor.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        left: Tensor,
        right: Tensor,
        dtype: torch.dtype,
        device: torch.device | None = None,
    ) -> None:
        self.hidden, self.weight, self.left, self.right, self.dtype = hidden, weight, left, right, dtype
        self.device = device or hidden.device
        self._whole: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.hidden.shape[:-1], self.weight.shape[0]))

    @property
    def is_whole(self) -> bool:
        return self._whole is not None

    @property
    def ndim(self) -> int:
        return self.hidden.dim()

    def dim(self) -> int:
        return self.hidden.dim()

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def float(self) -> Any:
        if self._whole is not None:
            return self._whole.float()
        return Logits(self.hidden, self.weight, self.left, self.right, torch.float32, self.device)

    def contiguous(self) -> "Logits":
        return self

    def to(self, *args: Any, **kwargs: Any) -> Any:
        if not kwargs and len(args) == 1:
            if args[0] in (self.device, str(self.device), self.dtype):
                return self
            if args[0] == torch.float32:
                return self.float()
            if isinstance(args[0], torch.device) and self._whole is None:
                return Logits(self.hidden, self.weight, self.left, self.right, self.dtype, args[0])
        return self.tensor().to(*args, **kwargs)

    def view(self, *shape: Any) -> Any:
        return self.reshape(*shape)

    def reshape(self, *shape: Any) -> Any:
        sizes = tuple(shape[0]) if len(shape) == 1 and isinstance(shape[0], tuple | list) else shape
        if self._whole is not None or len(sizes) < 2 or sizes[-1] != self.shape[-1]:
            return self.tensor().reshape(*shape)
        hidden = self.hidden.reshape(*sizes[:-1], self.hidden.shape[-1])
        return self._with(hidden, self.left.reshape(*hidden.shape[:-1], self.left.shape[-1]))

    def flatten(self, start_dim: int = 0, end_dim: int = -1) -> Any:
        start_dim, end_dim = start_dim % self.dim(), end_dim % self.dim()
        if self._whole is not None or not start_dim <= end_dim < self.dim() - 1:
            return self.tensor().flatten(start_dim, end_dim)
        return self._with(self.hidden.flatten(start_dim, end_dim), self.left.flatten(start_dim, end_dim))

    def __getitem__(self, index: Any) -> Any:
        parts = index if isinstance(index, tuple) else (index,)
        is_plain = self._whole is None and all(isinstance(part, slice | int) or part is ... for part in parts)
        is_short = len(parts) < self.dim()  # an ellipsis may stand for no dimension: it counts as one here
        if is_plain and ((is_short and ... not in parts[:-1]) or parts[-1] == slice(None)):
            return self._with(self.hidden[index], self.left[index])
        return self.tensor()[index]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tensor(), name)

    def tensor(self) -> Tensor:
        """The whole product. From now on it alone counts: it may be changed in place."""
        if self._whole is None:
            plain = self.hidden @ self.weight.T
            self._whole = (plain + (self.left @ self.right).to(plain.dtype)).to(self.device, self.dtype)
        return self._whole

    def cross_entropy(self, target: Tensor, ignore_index: int, reduction: str) -> Tensor:
        """Mean (or sum) of -log softmax at `target` (rows,) for logits (rows, vocabulary); float scalar."""
        assert self.dim() == 2
        there = target.to(self.hidden.device)
        losses = _CrossEntropy.apply(self.hidden, self.weight, self.left, self.right, there, ignore_index)
        total = losses.sum().to(self.device, self.dtype)  # type: ignore[union-attr]
        return total / (target != ignore_index).sum() if reduction == "mean" else total

    def _with(self, hidden: Tensor, left: Tensor) -> "Logits":
        return Logits(hidden, self.weight, left, self.right, self.dtype, self.device)


def _forwarded(name: str) -> Any:
    return lambda self, *args: getattr(self.tensor(), name)(*args)


_REFLECTED = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow")
_OPERATORS = (*_REFLECTED, *(f"r{name}" for name in _REFLECTED), "matmul", "neg", "abs", "invert", "and", "or", "len")
_OPERATORS += ("eq", "ne", "lt", "le", "gt", "ge", "setitem")
for _name in _OPERATORS:
    setattr(Logits, f"__{_name}__", _forwarded(f"__{_name}__"))  # Python looks operators up in the class alone


class _CrossEntropy(torch.autograd.Function):
    """-log softmax at each row's target; its rule for vmap takes all copies at once."""

    @staticmethod
    def forward(hidden: Tensor, weight: Tensor, left: Tensor, right: Tensor, target: Tensor, ignored: int) -> Tensor:
        one = [tensor.unsqueeze(0) for tensor in (hidden, left, right, target)]
        return _in_pieces(weight, one, ignored)[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass  # used without gradients only

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Tensor, int]:
        hidden, weight, left, right, target, ignored = args
        dims = (in_dims[0], *in_dims[2:5])
        moved = [
            copies_first(tensor, dim, info.batch_size)
            for tensor, dim in zip((hidden, left, right, target), dims, strict=True)
        ]
        if in_dims[1] is None:
            return _in_pieces(weight, moved, ignored), 0
        own = weight.movedim(in_dims[1], 0)  # an output layer with weights of its own for every copy
        return torch.cat([_in_pieces(w, [t[i : i + 1] for t in moved], ignored) for i, w in enumerate(own)]), 0


def checked(target: Tensor, entries: int, ignored: int) -> Tensor:
    """The targets of a cross-entropy over so many entries, each of them found to be one, or the one that is ignored.

    Raises UserError for another, where torch has an IndexError or, summed up in pieces, an infinite loss.
    """
    if target.is_floating_point():
        return target  # probabilities
    return _Checked.apply(target, entries, ignored)  # type: ignore[return-value]


class _Checked(torch.autograd.Function):
    """Its rule for vmap reads the targets of all copies at once."""

    @staticmethod
    def forward(target: Tensor, entries: int, ignored: int) -> Tensor:
        has_numbers = type(target) is Tensor and not target.is_meta  # where memory is predicted there are shapes alone
        if has_numbers and target.numel():
            smallest, largest = map(int, target.masked_fill(target == ignored, 0).aminmax())
            if smallest < 0 or largest >= entries:
                raise UserError(
                    f"the targets reach the id {largest if largest >= entries else smallest}, but the model's output "
                    f"has {entries} entries, 0 to {entries - 1}: take the tokenizer or labels the model was made for"
                )
        return target.view_as(target)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass  # integers have no gradient

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Tensor, int]:
        return _Checked.forward(*args), in_dims[0]


def copies_first(tensor: Tensor, dim: int | None, copies: int) -> Tensor:
    """The tensor with its copies along the first dimension; one without copies is expanded, not written out."""
    return tensor.unsqueeze(0).expand(copies, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def _in_pieces(weight: Tensor, tensors: Sequence[Tensor], ignored: int) -> Tensor:
    """Losses (copies, rows).

    tensors: hidden (copies, rows, width), left (copies, rows, k), right (copies, k, entries), target (copies, rows).
    """
    hidden, left, right, target = tensors
    copies, rows = hidden.shape[:2]
    losses = torch.empty(copies, rows, dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
    at_once = max(1, ROWS // max(1, rows))
    copied = [slice(start, start + at_once) for start in range(0, copies, at_once)]
    pieces = list(itertools.product(copied, [slice(start, start + ROWS) for start in range(0, rows, ROWS)]))
    if isinstance(hidden, FakeTensor):  # where memory is predicted: the first piece is the largest
        pieces = pieces[:1]
    for some, part in pieces:
        piece = hidden[some, part], left[some, part], right[some], target[some, part]
        losses[some, part] = _piece(weight, *piece, losses.dtype)
    return losses.masked_fill_(target == ignored, 0.0)


def _piece(weight: Tensor, hidden: Tensor, left: Tensor, right: Tensor, target: Tensor, dtype: torch.dtype) -> Tensor:
    """Losses of one piece's rows, over the vocabulary ENTRIES at a time."""
    flat = hidden.reshape(-1, hidden.shape[-1])
    own = torch.full(hidden.shape[:2], -torch.inf, dtype=dtype, device=hidden.device)
    peak = torch.full_like(own, torch.finfo(dtype).min)  # largest logit so far; finite, so that differences are numbers
    total = torch.zeros_like(own)  # sum of exp(logit - peak)
    for start in range(0, len(weight), ENTRIES):
        logits = (flat @ weight[start : start + ENTRIES].T).view(*hidden.shape[:2], -1)
        if left.shape[-1]:
            logits.baddbmm_(left.to(logits.dtype), right[:, :, start : start + ENTRIES].to(logits.dtype))
        logits = logits.to(dtype)
        place = target - start
        is_here = (place >= 0) & (place < logits.shape[-1])
        found = logits.gather(-1, place.clamp(0, logits.shape[-1] - 1).unsqueeze(-1)).squeeze(-1)
        own = torch.where(is_here, found, own)
        before, peak = peak, torch.maximum(peak, logits.amax(-1))
        total = total * (before - peak).exp_() + logits.sub_(peak.unsqueeze(-1)).exp_().sum(-1)
    return peak + total.log() - own
