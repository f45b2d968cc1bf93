"""Hidden states of the layers below all that trains, kept by example: none of them is computed twice.

Frozen weights never change, so what the last frozen layer gives for an example is the same in every epoch. The model
itself still makes embeddings, positions and masks; its frozen layers are stepped over, and the last hands the kept
states on. This is freezing as in Brock et al., "FreezeOut: accelerate training by progressively freezing layers", 2017,
with the frozen part's activations cached, as for a head on fixed features.
"""

import hashlib
import itertools
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from zofed.core.devices import input_device
from zofed.core.state_file import Full, StateFile

Examples = dict[str, Tensor]
Run = Callable[[Examples], Any]  # from a batch to the model's output, with `loss` and `logits`

KEY = "hidden states"  # of a batch: what the last frozen layer gives, (n, ...) of its type, on the model's device
LARGEST = 2**31  # bytes of one batch's states, which are held in memory while it is measured


class _Stop(BaseException):
    """Ends a pass that is run for the hidden states alone; no model's `except Exception` holds it up."""


class _Unfit(Exception):  # noqa: N818
    """Why a model's hidden states cannot be kept; the text says it."""


class _Cut(NamedTuple):
    """layers: the frozen ones, in the order of their calls. is_tuple, others: how the last gives its hidden states.

    others: what it gives beside them, such as the weights of its attention; None stands for each.
    """

    layers: Sequence[nn.Module]
    is_tuple: bool
    others: int


class Trunk:
    """The hidden states of one model's frozen layers.

    trained: the parameters that train. layers: the model's stack, first to last; none where it has no such stack.
    folder, limit: where the states are kept, and how many bytes of them. name: says all that they depend on beside the
    examples, so that another process finds them.

    Nothing tells the states that a weight has changed: those below the cut never do, not by records, snapshots or
    checkpoints, which hold the trained parameters alone.
    """

    def __init__(
        self,
        trained: Mapping[str, Tensor],
        layers: Sequence[nn.Module],
        folder: Path,
        name: str,
        limit: int,
    ) -> None:
        self.cut: _Cut | None = None
        self._trained = list(trained.values())
        ids = set(map(id, self._trained))
        holding = (at for at, layer in enumerate(layers) if any(id(tensor) in ids for tensor in layer.parameters()))
        self._frozen = layers[: next(holding, len(layers))]
        self._states = StateFile(folder, name, limit)
        self._sizes: dict[Any, int] = {}  # by what a batch is like: bytes of an example's states, 0: none are kept
        self._alone = True  # a row's bits are the same whatever rows run beside it, and however many
        self._is_uncut = self._told = False

    def filled(self, model: nn.Module, batch: Examples, run: Run, variant: str, at_once: int, of: int) -> Examples:
        """The batch with its examples' hidden states, or as it is where there are none to keep; see `filled` below."""
        if self._is_uncut or any(module.training for module in model.modules()):  # dropout draws anew in each pass
            return batch
        kind = variant, *((name, str(tensor.dtype), tuple(tensor.shape[1:])) for name, tensor in batch.items())
        with torch.no_grad(), torch._C.DisableTorchFunction():  # no mode that is active has a part in frozen layers
            rows = len(batch["labels"])
            tried = min(rows, at_once), kind  # kernels may depend on the number of rows: each is tried
            if tried not in self._sizes:
                self._sizes[tried] = self._size(_part(batch, slice(0, at_once)), run)
            if not 0 < rows * self._sizes[tried] <= LARGEST:
                return batch
            parts = [
                self._found(_part(batch, slice(start, start + at_once)), run, kind, of)
                for start in range(0, rows, at_once)
            ]
            device = input_device(model)  # kept ones come from the processor, new ones from the last frozen layer
            states = [part.to(device) for part in parts]
            return batch | {KEY: states[0] if len(states) == 1 else torch.cat(states)}

    def _found(self, batch: Examples, run: Run, kind: Any, of: int) -> Tensor:
        """The states of a batch: kept ones, and of the examples that have none computed ones, from now on kept."""
        assert self.cut is not None
        rows = len(batch["labels"])
        keys = _keys(batch, kind if self._alone else (rows, kind))
        missing = [row for row, key in enumerate(keys) if key not in self._states]
        if len(missing) == rows or (missing and not self._alone):
            made = _captured(self.cut, batch, run)
            self._keep(keys, made, of)
            return made
        kept = sorted(set(range(rows)).difference(missing))
        found = self._states.like(keys[kept[0]], rows)
        self._states.read([keys[row] for row in kept], found, kept)
        if missing:
            made = _captured(self.cut, _part(batch, torch.tensor(missing)), run)
            self._keep([keys[row] for row in missing], made, of)
            found[missing] = made.cpu()
        return found

    def _keep(self, keys: Sequence[bytes], states: Tensor, of: int) -> None:
        try:
            for key, one in zip(keys, states.cpu(), strict=True):
                self._states.add(key, one)
        except Full as full:
            if not self._told:
                self._told = True
                needed = of * states[0].numel() * states.element_size() / 1e9
                warnings.warn(
                    f"hidden states of the frozen layers are kept of {full.count:,} examples and computed in every "
                    f"epoch of the others ({full}): those of all {of:,} take {needed:.2g} GB",
                    stacklevel=2,
                )

    def _size(self, batch: Examples, run: Run) -> int:
        """Find out where the model is cut, if anywhere, and try it on the first batch of its kind and size."""
        try:
            if self.cut is None:
                self.cut = self._probed(self._frozen, batch, run) if self._frozen else None
                self._is_uncut = self.cut is None
            return self._tried(self.cut, batch, run) if self.cut else 0
        except _Unfit as reason:
            self._is_uncut = True
            warnings.warn(
                f"hidden states of the frozen layers are not kept, so that every pass computes them: {reason}",
                stacklevel=2,
            )
            return 0

    def _probed(self, layers: Sequence[nn.Module], batch: Examples, run: Run) -> _Cut | None:
        """The cut behind these layers; None where their output depends on what trains, such as an embedding.

        Raises _Unfit where they are not called one after the other, or give no hidden states.
        """
        called: list[int] = []
        given: list[Any] = []

        def watched(at: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            called.append(at)
            value = forward(*args, **kwargs)
            if at + 1 == len(layers):
                given.append(value)
                raise _Stop
            return value

        wanted = [parameter.requires_grad for parameter in self._trained]
        try:
            for parameter in self._trained:
                parameter.requires_grad_()
            with torch.enable_grad(), suppress(_Stop), _replaced(layers, watched):
                run(_part(batch, slice(0, 1)))
        finally:
            for parameter, was in zip(self._trained, wanted, strict=True):
                parameter.requires_grad_(was)
        if not called:  # a head on features: no layer runs
            return None
        if called != list(range(len(layers))):
            raise _Unfit("the model does not call its layers one after the other")
        hidden, *others = given[0] if isinstance(given[0], tuple) else given
        if not isinstance(hidden, Tensor) or len(hidden) != 1:
            raise _Unfit(f"its {type(layers[-1]).__name__} does not give the hidden states of each example")
        return None if hidden.requires_grad else _Cut(layers, isinstance(given[0], tuple), len(others))

    def _tried(self, cut: _Cut, batch: Examples, run: Run) -> int:
        """Bytes of an example's states, after bits were compared.

        Those of the first example's outputs with and without kept states, and those of the batch's states in smaller
        parts and in another order. Raises _Unfit where the outputs differ, or the states in another order.
        """
        one = _part(batch, slice(0, 1))
        plain, states = run(one), _captured(cut, one, run)
        try:
            with _handing_on(cut, states):
                again = run(one)
        except (RuntimeError, TypeError, ValueError, AttributeError, LookupError) as error:
            why = " ".join(str(error).split())[:200]
            raise _Unfit(f"the layers above them need more of those below ({why})") from error
        if not (_same(plain.logits, again.logits) and _same(plain.loss, again.loss)):
            raise _Unfit("with them the model gives other outputs: the layers above need more of those below")
        rows = len(batch["labels"])
        together = _captured(cut, batch, run)
        bounds = sorted({0, 1, (rows + 1) // 2, rows})
        parts = [_captured(cut, _part(batch, slice(start, stop)), run) for start, stop in itertools.pairwise(bounds)]
        if not torch.equal(torch.cat(parts), together):
            self._alone = False  # kernels depend on the number of rows: whole batches are kept, by their size
            backwards = _part(batch, torch.arange(rows - 1, -1, -1))
            if not torch.equal(_captured(cut, backwards, run).flip(0), together):
                raise _Unfit("an example's depend on its place in the batch, on this device with these versions")
        return states.numel() * states.element_size()


_TRUNKS: "weakref.WeakKeyDictionary[nn.Module, Trunk]" = weakref.WeakKeyDictionary()


def keep(model: nn.Module, trunk: Trunk) -> None:
    """Have a model's batches filled from a trunk, as long as the model lives."""
    _TRUNKS[model] = trunk


def filled(
    model: nn.Module, batch: Examples, run: Run, *, variant: str = "", at_once: int = 0, of: int = 0
) -> Examples:
    """The batch with its examples' hidden states under KEY, (n, ...); as it is where the model keeps none.

    run: gives the model's output for a batch on any device. variant: names what else the states depend on. at_once:
    examples of a pass; 0: all. of: how many examples there are, for a message; 0: those of the batch.
    """
    trunk = _TRUNKS.get(model)
    rows = len(batch["labels"])
    return trunk.filled(model, batch, run, variant, at_once or rows, of or rows) if trunk else batch


@contextmanager
def reused(model: nn.Module, batch: Examples) -> Iterator[Examples]:
    """While active, the model steps over its frozen layers where the batch has hidden states; gives the rest of it."""
    if KEY not in batch:
        yield batch
        return
    cut = _TRUNKS[model].cut
    assert cut is not None, "a batch was filled for another model"
    with _handing_on(cut, batch[KEY]):
        yield {name: tensor for name, tensor in batch.items() if name != KEY}


@contextmanager
def _handing_on(cut: _Cut, states: Tensor) -> Iterator[None]:
    """While active, the frozen layers compute nothing: the last gives the states, those below what they are given."""

    def forward(at: int, _: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        hidden = states if at + 1 == len(cut.layers) else args[0] if args else kwargs["hidden_states"]
        return (hidden, *(None for _ in range(cut.others))) if cut.is_tuple else hidden

    with _replaced(cut.layers, forward):
        yield


def _captured(cut: _Cut, batch: Examples, run: Run) -> Tensor:
    """The hidden states of a batch, from a pass that ends behind the last frozen layer."""
    found: list[Tensor] = []

    def forward(_: int, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        value = own(*args, **kwargs)
        found.append(value[0] if cut.is_tuple else value)
        raise _Stop

    with suppress(_Stop), _replaced(cut.layers[-1:], forward):
        run(batch)
    return found[0]


@contextmanager
def _replaced(layers: Sequence[nn.Module], forward: Callable[..., Any]) -> Iterator[None]:
    """While active, calls of each layer give forward(place, its own forward, *arguments)."""
    before = [layer.__dict__.get("forward") for layer in layers]
    try:
        for at, layer in enumerate(layers):
            layer.forward = partial(forward, at, layer.forward)
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            layer.__dict__.pop("forward", None)
            if own is not None:
                layer.forward = own


def _keys(batch: Examples, kind: Any) -> list[bytes]:
    """A digest of each example: of all its tensors, as what is not read by the frozen layers is as fixed."""
    start = hashlib.blake2b(repr(kind).encode(), digest_size=16)
    columns = [tensor.cpu().contiguous().numpy() for _, tensor in sorted(batch.items())]
    keys = []
    for row in range(len(batch["labels"])):
        digest = start.copy()
        for column in columns:
            digest.update(column[row].tobytes())
        keys.append(digest.digest())
    return keys


def _part(batch: Examples, rows: slice | Tensor) -> Examples:
    return {name: tensor[rows] for name, tensor in batch.items()}


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether two tensors are equal; a number that is none equals another."""
    if one is None or other is None:
        return one is other
    return one.shape == other.shape and bool(((one == other) | (one.isnan() & other.isnan())).all())
