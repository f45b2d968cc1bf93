"""Which parameters train: scopes, from the names that models give them."""

import re
from collections.abc import Collection, Mapping

from torch import Tensor, nn

from zofed.classifier import PooledClassifier
from zofed.errors import UserError
from zofed.worker import named_parameters

# Right behind the block's number: the MLP of GPT-2, Llama and their kin, OPT, BERT, DistilBERT, and the norm before it.
_MLP = re.compile(
    r"\.\d+\.(mlp|ln_2|post_att\w*|pre_feedforward_layernorm|fc1|fc2|final_layer_norm"
    r"|attention\.output\.LayerNorm|intermediate|output\.dense|sa_layer_norm|ffn)\."
)

_HEAD = re.compile(r"(^|\.)(lm_head|score|classifier)\.")


def trainable_names(model: nn.Module, scope: str) -> list[str]:
    """Canonical names of the parameters that train, in the model's order.

    scope: full; reduced (the last block's MLP and the layer norm before it, plus an untied head); norms; biases; head;
    last-K (the last K blocks and what follows them); or a regular expression searched in the names. A tied tensor goes
    by its first name. Raises UserError when nothing is left to train.
    """
    everything = model.may_train(scope) if isinstance(model, PooledClassifier) else named_parameters(model)
    blocks = _block_numbers(everything)
    last = max((number for number in blocks.values() if number is not None), default=None)
    top = _after_blocks(everything, blocks)
    head = [name for name in top if _HEAD.search(name)]
    if scope == "full":
        chosen = list(everything)
    elif scope == "reduced":
        mlp = [name for name, number in blocks.items() if number == last is not None and _MLP.search(name)]
        chosen = mlp + head if mlp else []
    elif scope == "norms":
        chosen = [name for name in everything if re.search(r"(ln_|norm)", name, re.IGNORECASE)]
    elif scope == "biases":
        chosen = [name for name in everything if name.endswith("bias")]
    elif scope == "head":
        chosen = head
    elif match := re.fullmatch(r"last-(\d+)", scope):
        count = 0 if last is None else last + 1
        if int(match[1]) > count:
            raise UserError(f"scope = {scope!r}: the model has {count} blocks; use last-{count} at most, or full")
        first = count - int(match[1])
        chosen = [name for name, number in blocks.items() if number is not None and number >= first] + top
    else:
        chosen = _matching(everything, scope)
    if not chosen:
        raise UserError(
            f"scope = {scope!r} leaves nothing to train: use full, last-1 or a regular expression that is found in "
            f"parameter names such as {', '.join(list(everything)[-4:])}"
        )
    keep = set(chosen)
    return [name for name in everything if name in keep]


def inner_matrices(model: nn.Module, names: Collection[str]) -> list[str]:
    """Those of the named parameters that are matrices inside the model: neither embeddings nor an output layer."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    return [
        name
        for name, parameter in named_parameters(model).items()
        if name in names and parameter.dim() == 2 and id(parameter) not in embeddings and not _HEAD.search(name)
    ]


def _matching(names: Mapping[str, Tensor], pattern: str) -> list[str]:
    if not pattern:
        return []  # a pattern that is found everywhere; whoever means that says full
    try:
        return [name for name in names if re.search(pattern, name)]
    except re.error as error:
        raise UserError(
            f"scope = {pattern!r} is neither a known scope nor a regular expression ({error}): "
            "use full, reduced, norms, biases, head, last-K, or mend the expression"
        ) from error


def _block_numbers(names: Mapping[str, Tensor]) -> dict[str, int | None]:
    """Number of the transformer block each parameter belongs to: the first number in its name, None outside."""
    found = {name: re.search(r"\.(\d+)\.", name) for name in names}
    return {name: int(match[1]) if match else None for name, match in found.items()}


def _after_blocks(names: Mapping[str, Tensor], blocks: Mapping[str, int | None]) -> list[str]:
    """Parameters that stand behind the last block in the model's order: final norm and head."""
    order = list(names)
    end = max((index for index, name in enumerate(order) if blocks[name] is not None), default=-1)
    return order[end + 1 :]
