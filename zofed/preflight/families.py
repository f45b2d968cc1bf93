"""The largest model of a family whose step fits a GPU, by mode: predicted from public shapes, without any weights."""

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from zofed.base.errors import UserError
from zofed.config import Settings, unknown
from zofed.data import encoding
from zofed.preflight import model_info

RESERVE = 2**30  # bytes: what CUDA itself takes, and what its allocator cannot use


def _llama(width: int, inner: int, layers: int, heads: int, key_heads: int, **other: Any) -> dict[str, Any]:
    return {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": width, "intermediate_size": inner,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": key_heads,
        "vocab_size": 128256, "max_position_embeddings": 131072, "tie_word_embeddings": False, **other,
    }  # fmt: skip


def _smol(width: int, inner: int, layers: int, heads: int, key_heads: int) -> dict[str, Any]:
    return _llama(
        width, inner, layers, heads, key_heads, vocab_size=49152, max_position_embeddings=8192, tie_word_embeddings=True
    )


def _qwen(width: int, inner: int, layers: int, heads: int, key_heads: int, *, is_tied: bool) -> dict[str, Any]:
    shape = _llama(width, inner, layers, heads, key_heads, vocab_size=151936 if is_tied else 152064)
    kind = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "max_position_embeddings": 32768}
    return shape | kind | {"tie_word_embeddings": is_tied}


def _gpt2(width: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": width, "n_layer": layers,
        "n_head": heads, "n_positions": 1024, "vocab_size": 50257,
    }  # fmt: skip


def _opt(width: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "opt", "architectures": ["OPTForCausalLM"], "hidden_size": width, "word_embed_proj_dim": width,
        "ffn_dim": 4 * width, "num_hidden_layers": layers, "num_attention_heads": heads, "vocab_size": 50272,
        "max_position_embeddings": 2048,
    }  # fmt: skip


# Configs by the models' names, from small to large, as their makers publish them.
FAMILIES: dict[str, dict[str, dict[str, Any]]] = {
    "llama": {
        "SmolLM2-135M": _smol(576, 1536, 30, 9, 3),
        "SmolLM2-360M": _smol(960, 2560, 32, 15, 5),
        "Llama-3.2-1B": _llama(2048, 8192, 16, 32, 8, tie_word_embeddings=True),
        "Llama-3.2-3B": _llama(3072, 8192, 28, 24, 8, tie_word_embeddings=True),
        "Llama-3.1-8B": _llama(4096, 14336, 32, 32, 8),
        "Llama-3.1-70B": _llama(8192, 28672, 80, 64, 8),
    },
    "qwen2.5": {
        "Qwen2.5-0.5B": _qwen(896, 4864, 24, 14, 2, is_tied=True),
        "Qwen2.5-1.5B": _qwen(1536, 8960, 28, 12, 2, is_tied=True),
        "Qwen2.5-3B": _qwen(2048, 11008, 36, 16, 2, is_tied=True),
        "Qwen2.5-7B": _qwen(3584, 18944, 28, 28, 4, is_tied=False),
        "Qwen2.5-14B": _qwen(5120, 13824, 48, 40, 8, is_tied=False),
        "Qwen2.5-32B": _qwen(5120, 27648, 64, 40, 8, is_tied=False),
        "Qwen2.5-72B": _qwen(8192, 29568, 80, 64, 8, is_tied=False),
    },
    "opt": {
        "opt-125m": _opt(768, 12, 12),
        "opt-1.3b": _opt(2048, 24, 32),
        "opt-2.7b": _opt(2560, 32, 32),
        "opt-6.7b": _opt(4096, 32, 32),
        "opt-13b": _opt(5120, 40, 40),
        "opt-30b": _opt(7168, 48, 56),
        "opt-66b": _opt(9216, 64, 72),
    },
    "gpt2": {
        "gpt2": _gpt2(768, 12, 12),
        "gpt2-medium": _gpt2(1024, 24, 16),
        "gpt2-large": _gpt2(1280, 36, 20),
        "gpt2-xl": _gpt2(1600, 48, 25),
    },
}


@dataclass(frozen=True, slots=True)
class Fit:
    """Of one mode: the largest model that fits, with the bytes that its step takes, and the next one, which does not.

    Empty names: none is that small, or none that large.
    """

    name: str
    peak: int
    larger: str
    larger_peak: int


def largest(
    settings: Settings, family: str, room: int, modes: Sequence[str], show: Callable[[str], None] = lambda _: None
) -> dict[str, Fit]:
    """What of a family fits a GPU of so many bytes, by mode, with all that settings say of a step.

    show: called with what is looked at next. Raises UserError for an unknown family, and settings that do not fit it.
    """
    if family not in FAMILIES:
        raise UserError(unknown(family, list(FAMILIES), "family"))
    shapes = FAMILIES[family]
    names = list(shapes)

    @cache
    def peak(name: str, mode: str) -> int:
        show(f"{name}, {mode}")
        return _peak(settings, name, shapes[name], mode)

    def fit(mode: str) -> Fit:
        low, high = 0, len(names)  # how many fit: at least, at most
        while low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if peak(names[middle], mode) + RESERVE <= room else (low, middle)
        own, next_one = names[low - 1] if low else "", names[low] if low < len(names) else ""
        return Fit(own, peak(own, mode) if own else 0, next_one, peak(next_one, mode) if next_one else 0)

    return {mode: fit(mode) for mode in modes}


def _peak(settings: Settings, name: str, shape: Mapping[str, Any], mode: str) -> int:
    """Bytes of a step of a model of this config."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(shape), encoding="utf-8")
        encoding.load_tokenizer("shipped").save_pretrained(folder)  # which of its entries are used is no matter here
        try:
            found = model_info.info(settings.model_copy(update={"model": folder, "revision": ""}), (mode,))
        except UserError as error:
            raise UserError(str(error).replace(folder, name)) from error
    if not found.memory:
        raise UserError(f"memory of {name} cannot be predicted: {found.unpredictable}")
    return found.memory[mode].peak
