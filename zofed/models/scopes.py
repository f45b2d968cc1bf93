"""Which parameters train: scopes, from how a model is built and in what order it uses its parameters."""

import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zofed.base import patterns
from zofed.base.errors import UserError
from zofed.base.texts import one_line
from zofed.core.devices import input_device
from zofed.core.digests import named_parameters
from zofed.core.kinds import NAMED_SCOPES
from zofed.core.perturbation_mode import Watch
from zofed.models import adapters, quantised
from zofed.models.classifier import PooledClassifier
from zofed.models.initial import drawn

LENGTHS = (
    2,
    16,
)  # tokens of a pass that shows the order of use; few, or as many as models take that shorten their input
# How parts of a block are named, within it, that mix positions; a block may have one instead of an attention.
MIXING = re.compile(r"att|^(mamba|temporal_block|conv|mixer)\.")


def kind(scope: str) -> str:
    """What sort of scope it is: one of its names, last-K, or pattern for a regular expression."""
    if scope in NAMED_SCOPES:
        return scope
    return "last-K" if re.fullmatch(r"last-\d+", scope) else "pattern"


def true_count(model: nn.Module) -> int:
    """Parameters of the model, a tied tensor counted once; of a quantised matrix those it stands for."""
    return sum(parameter.numel() for parameter in model.parameters()) + quantised.rounded_parameters(model)


def trainable_names(model: nn.Module, scope: str) -> list[str]:
    """Canonical names of the parameters that train, in the model's order.

    scope: full; reduced (the last block's MLP and the norm before it, and the head); norms; biases; head (all outside
    the base model); last-K (the last K blocks, what the forward pass uses after them, and the head); or a regular
    expression searched in the names. A tied tensor goes by its first name. With reduced, head and last-K whatever was
    drawn because the model's folder lacks it trains too. Of a model with an adapter nothing else may train than this
    and what was drawn. Raises UserError when nothing is left to train.
    """
    everything = model.may_train(scope) if isinstance(model, PooledClassifier) else named_parameters(model)
    if adapted := adapters.names(model):
        everything = {name: tensor for name, tensor in everything.items() if name in adapted | set(drawn(model))}
    if scope == "full":
        chosen = set(everything)
    elif scope == "norms":
        norms = {id(tensor) for module in model.modules() if is_norm(module) for tensor in module.parameters()}
        chosen = {name for name, tensor in everything.items() if id(tensor) in norms}
    elif scope == "biases":
        chosen = {name for name in everything if name.endswith("bias")}
    elif scope in ("head", "reduced") or re.fullmatch(r"last-\d+", scope):
        chosen = _top(model, everything, scope)
        chosen |= set(drawn(model)) if chosen else set()
    else:
        chosen = set(_matching(everything, scope))
    names = [name for name in everything if name in chosen]
    if not names:
        raise UserError(
            f"scope = {scope!r} leaves nothing to train: use full, last-1 or a regular expression that is found in "
            f"parameter names such as {', '.join(list(everything)[-4:])}"
            + (", of the adapter, which alone trains" if adapted else "")
        )
    return names


def frozen_though_drawn(model: nn.Module, names: Collection[str]) -> list[str]:
    """Parameters that begin untrained, because the model's folder lacks them, and that stay so: not among `names`."""
    return [name for name in drawn(model) if name not in names]


def inner_matrices(model: nn.Module, names: Collection[str]) -> list[str]:
    """Those of the named parameters that are matrices inside the model: neither embeddings nor of the head."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    everything = named_parameters(model)
    head = _head(model, everything)
    return [
        name
        for name, parameter in everything.items()
        if name in names and parameter.dim() == 2 and id(parameter) not in embeddings and name not in head
    ]


def layers(model: nn.Module) -> list[nn.Module]:
    """The blocks of a model, first to last, as modules that it calls; none where blocks are made of several lists."""
    stack = _stack(_base(model), set(_used(model)))
    return [block[0] for block in stack] if all(len(block) == 1 for block in stack) else []


def runs(model: nn.Module) -> bool:
    """Whether a pass over a few tokens runs to its end."""
    return bool(_used(model))


def _top(model: nn.Module, everything: Mapping[str, Tensor], scope: str) -> set[str]:
    """Names of what head, reduced or last-K chooses."""
    head = _head(model, everything)
    if scope == "head":
        return head
    layout = _Layout.of(model, everything)
    if scope == "reduced":
        mlp = layout.mlp()
        return mlp | head if mlp else set()
    count = int(scope.removeprefix("last-"))
    if not layout.blocks:
        raise UserError(f"scope = {scope!r}: the model has no list of blocks; use head, full or a pattern of names")
    if count > len(layout.blocks):
        raise UserError(
            f"scope = {scope!r}: the model has {len(layout.blocks)} blocks of its own; use last-{len(layout.blocks)} "
            "at most, or full"
        )
    last = layout.blocks[len(layout.blocks) - count :]
    return set[str]().union(*last) | layout.after() | head


def _head(model: nn.Module, everything: Mapping[str, Tensor]) -> set[str]:
    """Names of what lies outside the base model, such as an output layer that is not tied to the embedding."""
    inside = {id(tensor) for tensor in _base(model).parameters()}
    output = getattr(model, "get_output_embeddings", lambda: None)()
    if _base(model) is model and isinstance(output, nn.Module):
        embedding = model.get_input_embeddings()  # type: ignore[operator]
        tied = {id(tensor) for tensor in embedding.parameters()} if isinstance(embedding, nn.Module) else set()
        inside -= {id(tensor) for tensor in output.parameters()} - tied
    return {name for name, tensor in everything.items() if id(tensor) not in inside}


def _base(model: nn.Module) -> nn.Module:
    """The model without its head; the model itself where it has no such part."""
    if isinstance(model, PooledClassifier):
        return model.encoder
    inner = getattr(model, getattr(model, "base_model_prefix", "") or " ", None)
    return inner if isinstance(inner, nn.Module) else model


def is_norm(module: nn.Module) -> bool:
    """Whether a module's own parameters scale and shift what it normalises."""
    return "norm" in type(module).__name__.lower() and all(tensor.dim() < 2 for tensor in module.parameters())


@dataclass(frozen=True, slots=True)
class _Layout:
    """blocks: names of each block's parameters, in the stack's order. order: place of each parameter's first use."""

    everything: Mapping[str, Tensor]
    blocks: list[set[str]]
    order: Mapping[str, int]

    @classmethod
    def of(cls, model: nn.Module, everything: Mapping[str, Tensor]) -> "_Layout":
        names = {id(tensor): name for name, tensor in everything.items()}
        seen = _used(model)
        stack = _stack(_base(model), set(seen))
        blocks = [{names[id(t)] for t in block.parameters() if id(t) in names} for block in stack]
        used = [names[one] for one in seen if one in names]
        order = {name: place for place, name in enumerate(dict.fromkeys(used) if used else everything)}
        return cls(everything, [block for block in blocks if block], order)

    def after(self) -> set[str]:
        """What is first used once the last block has begun, and lies in no block."""
        inside = set[str]().union(*self.blocks)
        begins = self._begins(self.blocks[-1]) if self.blocks else len(self.order)
        return {name for name, place in self.order.items() if place > begins and name not in inside}

    def mlp(self) -> set[str]:
        """What the last block uses between what mixes positions and its last matrix, that one and its bias included."""
        last = self.blocks[-1] if self.blocks else set()
        used = sorted((name for name in last if name in self.order), key=lambda name: self.order[name])
        matrices = [name for name in used if self.everything[name].dim() > 1]
        steps = {name: name.lower().split(".") for name in last}
        shared = next((at for at, parts in enumerate(zip(*steps.values(), strict=False)) if len({*parts}) > 1), 0)
        inner = {name: ".".join(parts[shared:]) for name, parts in steps.items()}  # within the block
        mixing = [name for name in matrices if MIXING.search(inner[name])]
        if not mixing or matrices[-1] in mixing:
            return set()
        begin, end = mixing[-1], matrices[-1]
        chosen = [name for name in used if self.order[begin] < self.order[name] <= self.order[end]]
        chosen += [name for name in used if _module(name) == _module(end)]
        chosen = [name for name in chosen if _module(name) != _module(begin)]
        parts = {inner[name].split(".")[0] for name in chosen if not MIXING.search(inner[name])}
        missed = {name for name in last if name not in self.order and inner[name].split(".")[0] in parts}
        return set(chosen) | missed  # experts that no token met belong to it too

    def _begins(self, block: Collection[str]) -> int:
        return min((self.order[name] for name in block if name in self.order), default=len(self.order))


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _stack(base: nn.Module, used: set[int]) -> list[nn.ModuleList]:
    """The blocks of a model, first to last: of an encoder-decoder its decoder's, of a model that sees its text's.

    used: ids of the parameters that a pass over tokens uses; none where that is not known.
    """
    decoder = getattr(base, "get_decoder", lambda: None)()
    return (_longest(decoder, used) if isinstance(decoder, nn.Module) else []) or _longest(base, used)


def _longest(root: nn.Module, used: set[int]) -> list[nn.ModuleList]:
    """The longest list of modules with parts of their own that are used and that lies in no other such list.

    With it the lists beside it of the same length and another kind: some models keep a list of attentions, one of norms
    and so on. A list of lists, such as Funnel's, is the list of all that they hold.
    """
    lists: list[tuple[nn.Module, list[nn.Module]]] = []
    inside = set[int]()
    for parent in root.modules():
        for child in parent.children():
            if isinstance(child, nn.ModuleList) and id(child) not in inside and any(True for _ in child.parameters()):
                lists.append((parent, list(_flat(child))))
                inside |= {id(module) for module in child.modules()}
    blocks = [
        (at, found)
        for at, found in lists
        if _is_composite(found[0]) and (not used or any(id(tensor) in used for tensor in found[0].parameters()))
    ]
    if not blocks:
        return []
    parent, longest = max(blocks, key=lambda one: (len(one[1]), sum(map(_size, one[1]))))
    kind = type(longest[0])
    beside = [
        other for at, other in lists if at is parent and len(other) == len(longest) and type(other[0]) is not kind
    ]
    return [nn.ModuleList(one) for one in zip(longest, *beside, strict=True)]


def _flat(modules: nn.ModuleList) -> Iterator[nn.Module]:
    for module in modules:
        if isinstance(module, nn.ModuleList):
            yield from _flat(module)
        else:
            yield module


def _is_composite(module: nn.Module) -> bool:
    """Whether a module has several parts with weights, as a block has and an embedding or a projection has not."""
    return sum(any(True for _ in part.parameters(recurse=False)) for part in module.modules()) > 1


def _size(module: nn.Module) -> int:
    return sum(tensor.numel() for tensor in module.parameters())


class _Order(Watch):
    """Keeps the ids of what calls of torch are given in the order of their first use."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Any = _Ordered()


class _Ordered(dict[int, None]):
    """A set that keeps its order."""

    def update(self, ids: Any) -> None:  # type: ignore[override]
        super().update(dict.fromkeys(one for one in ids if one not in self))


@torch.no_grad()
def _used(model: nn.Module) -> list[int]:
    """Ids of what a pass over a few tokens uses, in the order of their first use; none where no such pass can run."""
    inner = model.encoder if isinstance(model, PooledClassifier) else model
    config = getattr(inner, "config", None)
    end = getattr(config, "eos_token_id", None)  # which some encoder-decoders look for
    end = end[0] if isinstance(end, list) and end else end
    token = end if isinstance(end, int) and 0 <= end < (getattr(config, "vocab_size", None) or 0) else 0
    device = input_device(model)
    was_training = inner.training
    try:
        for length in LENGTHS:
            with suppress(Exception), _Order() as order:  # of all kinds, where more is read than tokens, or no storage
                inner.eval()(input_ids=torch.full((1, length), token, device=device))
                return list(order.seen)
    finally:
        inner.train(was_training)
    return []


def _matching(names: Mapping[str, Tensor], pattern: str) -> list[str]:
    if not pattern:
        return []  # a pattern that is found everywhere; whoever means that says full
    try:
        return patterns.searched(pattern, list(names))
    except patterns.TooMuch as error:
        raise UserError(
            f"scope = {one_line(pattern, 100)!r} {error}: write it with fewer repetitions (*, +, ?, {{}}) and groups"
        ) from error
    except re.error as error:
        raise UserError(
            f"scope = {pattern!r} is neither a known scope nor a regular expression ({error}): "
            "use full, reduced, norms, biases, head, last-K, or mend the expression"
        ) from error
