"""Virtual tokens before every text, which train while the model stands still.

- prompt: their embeddings (Lester et al., "The power of scale for parameter-efficient prompt tuning", 2021). They begin
  as those of tokens that the run's seed picks.
- prefix: their keys and values in every layer (Li and Liang, "Prefix-tuning: optimizing continuous prompts for
  generation", 2021), without a network that makes them, as MeZO trains them (Malladi et al., 2023). They begin as
  normal values of GPT-2's initial spread, near zero, where they draw little attention and add almost nothing; MeZO
  takes those that the model computes for random tokens, whose last bits no two machines share.

The model keeps its class and whoever calls it the shapes of a text without them: a hook on its base model sets them
before what it reads, counts positions on and takes their own outputs away again. Numbers and files are those of the
library peft, whose prompt and prefix tuning these are.
"""

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from zofed.base.errors import UserError
from zofed.base.texts import said_by
from zofed.core import directions
from zofed.core.devices import input_device
from zofed.models import adapter_files, initial

PROMPT, PREFIX = adapter_files.TYPES["prompt"], adapter_files.TYPES["prefix"]  # as peft calls them
TENSOR = "prompt_embeddings"  # the one that peft's files hold of either
NAME = "virtual_tokens"  # of the module in the base model
# By what share of the largest logit padding may change what is read: rounding gave 1e-4 in a model of 30 layers, an
# attention that counts padding 7e-2.
UNLIKE = 0.02


@dataclass(frozen=True, slots=True)
class Virtual:
    """What settings say of virtual tokens."""

    adapter: Literal["prefix", "prompt"]
    count: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Virtual":
        """Those of a folder's configuration."""
        return cls(adapter_files.setting_of(config), config["num_virtual_tokens"])  # type: ignore[arg-type]

    @property
    def type(self) -> str:
        """As peft calls it."""
        return adapter_files.TYPES[self.adapter]

    def values(self) -> dict[str, Any]:
        """By the settings' names."""
        return {"virtual-tokens": self.count}

    @staticmethod
    def saved(config: Mapping[str, Any]) -> dict[str, Any]:
        """The same of a folder's configuration."""
        return {"virtual-tokens": config["num_virtual_tokens"]}


class VirtualTokens(nn.Module):
    """weight: float32 (count, width): embeddings, or layer by layer keys and values, head by head.

    heads: of the keys of one layer; 0: embeddings.
    """

    def __init__(self, weight: Tensor, heads: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.heads = heads
        self.count = len(weight)
        self.places: list[torch.device] = []  # of each layer, where they differ
        self._shown = 0  # outputs of their own in the pass that runs

    def before(self, base: Any, given: dict[str, Any]) -> dict[str, Any]:
        """What the base model is called with, from what it was called with, by name."""
        ids, embeddings = given.pop("input_ids", None), given.get("inputs_embeds")
        if embeddings is None:
            embeddings = base.get_input_embeddings()(ids)
        named = _cache_name(base)
        cache = given.get(named)
        begins = cache is None or cache.get_seq_length() == 0  # else a text goes on, which has them already
        self._shown = 0
        if begins and self.heads:
            given[named] = self._cached(base, cache, embeddings)
        elif begins:
            own = self.weight.to(embeddings).expand(len(embeddings), *self.weight.shape)
            embeddings, self._shown = torch.cat([own, embeddings], 1), self.count
        for name in ("position_ids", "cache_position"):
            if given.get(name) is not None:
                given[name] = self._counted_on(given[name])
        if given.get("attention_mask") is not None:
            given["attention_mask"] = self._seen(given["attention_mask"])
        return given | {"inputs_embeds": embeddings}

    def after(self, found: Any) -> Any:
        """The base model's outputs without those of the tokens themselves."""
        if self._shown:
            found["last_hidden_state"] = found[0][:, self._shown :]
        return found

    def _cached(self, base: Any, cache: Any, like: Tensor) -> Any:
        cache = DynamicCache(config=base.config) if cache is None else cache
        layers = self.weight.to(like).view(self.count, -1, 2, self.heads, self._size(base))
        for number, (keys, values) in enumerate(layers.permute(1, 2, 3, 0, 4)):
            place = self.places[number] if self.places else like.device
            keys, values = (part.to(place).expand(len(like), *part.shape) for part in (keys, values))
            cache.update(keys, values, number)
        return cache

    def _size(self, base: Any) -> int:
        return self.weight.shape[1] // (2 * self.heads * base.config.get_text_config().num_hidden_layers)

    def _counted_on(self, positions: Tensor) -> Tensor:
        if not self._shown:
            return positions + self.count
        first = torch.arange(self.count, device=positions.device).expand(*positions.shape[:-1], self.count)
        return torch.cat([first, positions + self.count], -1)

    def _seen(self, mask: Tensor) -> Tensor:
        """An attention mask in which every token sees all virtual ones. mask: (n, length), or additive."""
        if mask.dim() == 2:
            return F.pad(mask, (self.count, 0), value=1)
        mask = F.pad(mask, (self.count, 0))
        if not self._shown:
            return mask
        sees = torch.ones(self.count, mask.shape[-1], dtype=torch.bool, device=mask.device).tril()
        own = torch.zeros(sees.shape, dtype=mask.dtype, device=mask.device)
        own = own.masked_fill(~sees, torch.finfo(mask.dtype).min)
        return torch.cat([own.expand(*mask.shape[:-2], *own.shape), mask], -2)


def tokens(model: nn.Module) -> int:
    """Virtual tokens before a model's texts."""
    own = _own(model)
    return own.count if own else 0


def place(model: nn.Module, devices: list[torch.device]) -> None:
    """Tell a model's virtual tokens, if it has any, on which device each of its layers lies.

    Raises UserError where the layers that keep keys and values are others than these.
    """
    own = _own(model)
    if own is None or not own.heads:
        return
    kept = own.weight.shape[1] // (2 * own.heads * own._size(_base(model, PREFIX)))
    if kept != len(devices):
        raise UserError(
            f"adapter = 'prefix': {kept} layers of the {type(model).__name__} keep keys and values, of which it is not "
            "known on which device each lies: set placement to none, or adapter to prompt or lora"
        )
    own.places = devices


def _own(model: nn.Module) -> VirtualTokens | None:
    return next((module for module in model.modules() if isinstance(module, VirtualTokens)), None)


def set_in(model: nn.Module, wanted: "Virtual | Mapping[str, Any]", seed: int) -> dict[str, Any]:
    """Set virtual tokens before a causal language model, in place; what describes them, in peft's words.

    wanted: settings, or such a description. On the meta device they have no values. Raises UserError for models that
    cannot have them.
    """
    if isinstance(wanted, Virtual):
        kind, count = wanted.type, wanted.count
    else:
        kind, count = wanted["peft_type"], wanted["num_virtual_tokens"]
    base = _base(model, kind)
    embedding = base.get_input_embeddings().weight
    shapes = _cached_shapes(model, base, kind)
    if kind == PREFIX:
        if len(set(shapes)) > 1:
            raise _unfit(model, kind, "its layers keep keys and values of different shapes", "prompt or lora")
        (heads, size), width = shapes[0], math.prod(shapes[0]) * len(shapes)
    else:
        heads, size = 0, embedding.shape[1]
        width = size
    own = VirtualTokens(torch.empty(count, width, dtype=torch.float32, device=embedding.device), heads)
    if kind == PREFIX:
        initial.fill(own.weight, directions.derive_seed("zofed-initial", seed), NAME, initial.INITIAL_STD)
    else:
        picked = [directions.derive_seed("zofed-virtual", seed, number) % len(embedding) for number in range(count)]
        own.weight.copy_(base.get_input_embeddings()(torch.tensor(picked, device=embedding.device)))
    setattr(base, NAME, own)
    base.register_forward_pre_hook(_before, with_kwargs=True)
    base.register_forward_hook(_after)
    if not own.weight.is_meta:
        _check_read(model, own)
    return {
        "peft_type": kind,
        "num_virtual_tokens": count,
        "token_dim": heads * size or size,
        "num_layers": len(shapes) // 2,
        "num_attention_heads": heads or 1,
        "num_transformer_submodules": 1,
    }


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """What trains, by the name that peft's files give it."""
    own = _own(model)
    return {TENSOR: own.weight} if own else {}


def described(model: nn.Module, config: Mapping[str, Any]) -> str:
    """A line for people."""
    what = "keys and values of every layer" if config["peft_type"] == PREFIX else "embeddings"
    return f"{config['num_virtual_tokens']} virtual tokens before every text, {what}"


def _before(base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
    own: Any = getattr(base, NAME)
    return (), own.before(base, dict(zip(inspect.signature(base.forward).parameters, args, strict=False)) | kwargs)


def _after(base: nn.Module, _: Any, found: Any) -> Any:
    own: Any = getattr(base, NAME)
    return own.after(found)


def _base(model: nn.Module, kind: str) -> Any:
    """The module that reads texts and makes hidden states of them."""
    base = model.get_decoder() if isinstance(model, PreTrainedModel) else model
    taken = inspect.signature(base.forward).parameters if base is not model else {}
    if "inputs_embeds" not in taken or model.config.is_encoder_decoder:  # type: ignore[union-attr]
        raise _unfit(model, kind, "it takes no embeddings in the place of tokens")
    if not _cache_name(base):
        raise _unfit(model, kind, "it takes no keys and values of earlier tokens")
    return base


def _cache_name(base: nn.Module) -> str:
    """What a model calls the keys and values of earlier tokens; empty where it takes none."""
    taken = inspect.signature(base.forward).parameters
    return next((name for name in ("cache", "past_key_values") if name in taken), "")


def _cached_shapes(model: nn.Module, base: Any, kind: str) -> list[tuple[int, int]]:
    """Heads, and entries of one head, of the keys and of the values that each layer keeps of earlier tokens."""
    cache: Any = DynamicCache(config=base.config)
    first = torch.zeros(1, 1, dtype=torch.int64, device=input_device(base))
    try:
        base(**{"input_ids": first, _cache_name(base): cache}, use_cache=True)
        kept = [part for layer in cache.layers for part in (layer.keys, layer.values)]
        return [(part.shape[1], part.shape[3]) for part in kept]
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever its layers raise
        raise _unfit(
            model, kind, f"its layers do not keep keys and values of earlier tokens ({said_by(error)})"
        ) from error


def _check_read(model: nn.Module, own: VirtualTokens) -> None:
    """Refuse a model whose outputs do not depend on them, or depend on the padding between them and a text."""
    ids = torch.tensor([[1, 0]], device=own.weight.device)
    padded = {"input_ids": F.pad(ids, (2, 0)), "attention_mask": F.pad(torch.ones_like(ids), (2, 0))}
    padded["position_ids"] = F.pad(torch.arange(2, device=ids.device)[None], (2, 0))
    kind, kept = PREFIX if own.heads else PROMPT, own.weight.clone()
    try:
        found = model(input_ids=ids, use_cache=False).logits
        own.weight.mul_(-2 if kind == PROMPT else -1 / initial.INITIAL_STD)  # to where they matter
        moved = model(input_ids=ids, use_cache=False).logits
        if "position_ids" not in inspect.signature(model.forward).parameters:
            del padded["position_ids"]
        behind = model(**padded, use_cache=False).logits[:, 2:]
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever its layers raise
        raise _unfit(model, kind, f"it does not run with them ({said_by(error)})") from error
    finally:
        own.weight.copy_(kept)
    if found.shape != (*ids.shape, found.shape[-1]) or torch.equal(found, moved):
        raise _unfit(model, kind, "it does not read them")
    if not bool((behind - moved).abs().max() <= UNLIKE * moved.abs().max()):
        raise _unfit(model, kind, "how it reads them depends on the padding of a text")


def _unfit(model: nn.Module, kind: str, why: str, others: str = "lora") -> UserError:
    name = adapter_files.setting_of({"peft_type": kind})
    return UserError(
        f"adapter = {name!r} does not fit a {type(model).__name__}: {why}; set adapter to {others}, or give a model "
        "such as GPT-2 or Llama"
    )
