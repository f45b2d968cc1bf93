"""Folders of adapters, as peft writes and reads them: read, looked through, what is wrong with them told, written."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from zofed.base.errors import UserError
from zofed.base.files import write_whole
from zofed.base.parsing import from_json
from zofed.base.texts import said_by

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # names that peft gives them
_PREFIX = "base_model.model."  # before the names of tensors in peft's files
_TOKENS = (
    "peft_type", "num_virtual_tokens", "token_dim", "num_layers", "num_attention_heads", "num_transformer_submodules"
)  # fmt: skip
# What of peft's configuration decides which function an adapter is, by its type.
KEPT = {
    "LORA": (
        "r", "lora_alpha", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern",
        "alpha_pattern", "use_rslora", "fan_in_fan_out",
    ),
    "PREFIX_TUNING": _TOKENS,
    "PROMPT_TUNING": _TOKENS,
}  # fmt: skip
# What would make it another function than the one above, with the value that leaves it.
_UNKNOWN: dict[str, dict[str, Any]] = {
    "LORA": {"use_dora": False, "bias": "none", "lora_bias": False, "trainable_token_indices": None,
             "target_parameters": None, "layer_replication": None, "alora_invocation_tokens": None},
    "PREFIX_TUNING": {"prefix_projection": False},
    "PROMPT_TUNING": {},
}  # fmt: skip
_USUAL = {"LORA": {"lora_dropout": 0.0, "init_lora_weights": True}, "PREFIX_TUNING": {}, "PROMPT_TUNING": {}}
TYPES = {"lora": "LORA", "prefix": "PREFIX_TUNING", "prompt": "PROMPT_TUNING"}  # by the values of the setting `adapter`
LARGEST_RANK = LARGEST_COUNT = 4096
# Which values of a configuration can be meant, before anything is made of their size.
_RIGHT: dict[str, Callable[[Any], bool]] = {
    "r": lambda rank: type(rank) is int and 1 <= rank <= LARGEST_RANK,
    "lora_alpha": lambda alpha: type(alpha) in (int, float) and 0 < alpha < 1e9,
    "target_modules": lambda names: (
        isinstance(names, str | list) and bool(names) and all(isinstance(name, str) for name in names)
    ),
    "rank_pattern": lambda ranks: (
        ranks is None
        or (isinstance(ranks, dict) and all(type(rank) is int and 1 <= rank <= LARGEST_RANK for rank in ranks.values()))
    ),
    "num_virtual_tokens": lambda count: type(count) is int and 1 <= count <= LARGEST_COUNT,
    "num_transformer_submodules": lambda count: count in (None, 1),
}
# peft has no type of task for masked language models: such an adapter names the class of its base.
_TASKS = {"ForSequenceClassification": "SEQ_CLS", "ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM"}


def type_of(config: Mapping[str, Any]) -> str:
    """An adapter's type as peft calls it; a genesis without one is of LoRA."""
    return config.get("peft_type", "LORA")


def setting_of(config: Mapping[str, Any]) -> str:
    """The value of the setting `adapter` for it."""
    return next(setting for setting, type_ in TYPES.items() if type_ == type_of(config))


@dataclass(frozen=True, slots=True)
class Folder:
    """An adapter's folder, as peft writes it. Raises UserError for one that cannot be used.

    base, revision: the model that it belongs to. config: what of peft's configuration says how it computes.
    heads: modules beside it that it holds whole, such as a new classification head.
    """

    path: Path
    base: str
    revision: str
    config: Mapping[str, Any]
    heads: tuple[str, ...]

    @property
    def where(self) -> str:
        """What to call it."""
        return f"adapter folder {str(self.path)!r}"

    @property
    def type(self) -> str:
        """As peft calls it."""
        return type_of(self.config)

    def tensors(self) -> tuple[dict[str, Tensor], str]:
        """Its tensors by peft's names without the prefix, float32, and the base's digest where it tells."""
        file = self.path / WEIGHTS
        if not file.is_file():
            pickled = (self.path / "adapter_model.bin").is_file()
            remedy = "save it with safe_serialization=True" if pickled else "copy the folder again from where it came"
            raise UserError(f"{self.where} has no {WEIGHTS}: {remedy}")
        try:
            with safe_open(file, framework="pt") as opened:
                held = {name: opened.get_tensor(name).to(torch.float32) for name in opened.keys()}  # noqa: SIM118
                told = (opened.metadata() or {}).get("base", "")
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{self.where}: {WEIGHTS} is damaged ({said_by(error)}): copy it again from where it came"
            ) from error
        if broken := [name for name, tensor in held.items() if not bool(torch.isfinite(tensor).all())]:
            raise UserError(f"{self.where} holds {broken[0]} with values that are not finite: give an undamaged copy")
        return {name.removeprefix(_PREFIX): tensor for name, tensor in held.items()}, told


def folder_of(path: Path) -> Folder | None:
    """The adapter in a folder; None where it holds none. Raises UserError for unknown kinds, and extras."""
    file = path / CONFIG
    if not file.is_file():
        return None
    where = f"adapter folder {str(path)!r}"
    try:
        written = from_json(file.read_text(encoding="utf-8"))
        base, kind = written["base_model_name_or_path"], str(written["peft_type"])
        trained_whole = tuple(map(str, written.get("modules_to_save") or ()))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{where}: its {CONFIG} cannot be read ({said_by(error)}): copy the folder again") from error
    if kind not in KEPT:
        raise UserError(
            f"{where} is an adapter of the type {kind}, of which zofed reads {', '.join(KEPT)} alone: give one of "
            "those, or where it can be merged the folder of its base after merge_and_unload()"
        )
    for key, usual in _UNKNOWN[kind].items():
        if written.get(key, usual) not in (usual, None):
            remedy = "give one that was trained without"
            if kind == "LORA":
                remedy = (
                    "merge it into its base with merge_and_unload() and give the folder that save_pretrained writes of "
                    "the merged model"
                )
            raise UserError(f"{where} has {key} = {written[key]!r}, which zofed does not train: {remedy}")
    if not isinstance(base, str) or not base:
        raise UserError(f"{where} does not say of which base it is: write base_model_name_or_path into its {CONFIG}")
    config = {key: written[key] for key in KEPT[kind] if written.get(key) is not None}
    checks = {key: is_right for key, is_right in _RIGHT.items() if key in KEPT[kind]}
    if wrong := next((key for key, is_right in checks.items() if not is_right(config.get(key))), None):
        raise UserError(f"{where}: its {CONFIG} has {wrong} = {config.get(wrong)!r}: give the {CONFIG} that peft wrote")
    return Folder(path, base, str(written.get("revision") or ""), config, trained_whole)


def write(
    folder: Path,
    model: Any,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    base: tuple[str, str],
    digest: str = "",
    heads: Mapping[str, Tensor] | None = None,
) -> None:
    """An adapter in peft's own format, without that library: config and safetensors, nothing of its base.

    model: the library's module that it is of. tensors: its matrices, by peft's names without the prefix. config: what
    of peft's configuration says how it computes. base: name and revision of the whole model, as whoever loads the
    adapter will find it; digest: of its weights. heads: parameters beside the adapter that train, by their names in the
    model, such as a new classification head.
    """
    folder.mkdir(parents=True, exist_ok=True)
    type_ = type_of(config)
    before = _PREFIX if type_ == "LORA" else ""
    held = {before + name: tensor.detach().cpu().contiguous() for name, tensor in {**tensors, **(heads or {})}.items()}
    save_file(held, folder / WEIGHTS, {"format": "pt"} | ({"base": digest} if digest else {}))
    kind = type(model)
    task = next((task for end, task in _TASKS.items() if kind.__name__.endswith(end)), None)
    named = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
    usual = {
        "peft_type": type_,
        "task_type": task,
        "auto_mapping": None if task else named,
        "base_model_name_or_path": base[0],
        "revision": base[1] or None,
        "inference_mode": True,
        "modules_to_save": sorted({name.rpartition(".")[0] for name in heads or {}}) or None,
    }
    text = json.dumps(
        _UNKNOWN[type_] | _USUAL[type_] | usual | dict(config), indent=2, sort_keys=True, ensure_ascii=False
    )
    write_whole(folder / CONFIG, text + "\n")
