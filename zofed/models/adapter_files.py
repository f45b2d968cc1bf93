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
from zofed.base.texts import said_by

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # names that peft gives them
_PREFIX = "base_model.model."  # before the names of tensors in peft's files
# What of peft's configuration decides which function an adapter is.
KEPT = (
    "r", "lora_alpha", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern",
    "alpha_pattern", "use_rslora", "fan_in_fan_out",
)  # fmt: skip
# What would make it another function than the one above, with the value that leaves it.
_UNKNOWN = {"use_dora": False, "bias": "none", "lora_bias": False, "trainable_token_indices": None,
            "target_parameters": None, "layer_replication": None, "alora_invocation_tokens": None}  # fmt: skip
LARGEST_RANK = 4096
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
}
# peft has no type of task for masked language models: such an adapter names the class of its base.
_TASKS = {"ForSequenceClassification": "SEQ_CLS", "ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM"}


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
    """The adapter in a folder; None where it holds none. Raises UserError for one that is not LoRA, or has extras."""
    file = path / CONFIG
    if not file.is_file():
        return None
    where = f"adapter folder {str(path)!r}"
    try:
        written = json.loads(file.read_text(encoding="utf-8"))
        base, kind = written["base_model_name_or_path"], written["peft_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{where}: its {CONFIG} cannot be read ({said_by(error)}): copy the folder again") from error
    if kind != "LORA":
        raise UserError(
            f"{where} is an adapter of the type {kind}, of which zofed reads LORA alone: merge it into its base with "
            "merge_and_unload() and give the folder that save_pretrained writes of the merged model"
        )
    for key, usual in _UNKNOWN.items():
        if written.get(key, usual) not in (usual, None):
            raise UserError(
                f"{where} has {key} = {written[key]!r}, which zofed does not train: merge it into its base with "
                "merge_and_unload() and give the folder that save_pretrained writes of the merged model"
            )
    if not isinstance(base, str) or not base:
        raise UserError(f"{where} does not say of which base it is: write base_model_name_or_path into its {CONFIG}")
    config = {key: written[key] for key in KEPT if written.get(key) is not None}
    if wrong := next((key for key, is_right in _RIGHT.items() if not is_right(config.get(key))), None):
        raise UserError(f"{where}: its {CONFIG} has {wrong} = {config.get(wrong)!r}: give the {CONFIG} that peft wrote")
    return Folder(path, base, written.get("revision") or "", config, tuple(written.get("modules_to_save") or ()))


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
    held = {_PREFIX + name: tensor.detach().cpu().contiguous() for name, tensor in {**tensors, **(heads or {})}.items()}
    save_file(held, folder / WEIGHTS, {"format": "pt"} | ({"base": digest} if digest else {}))
    kind = type(model)
    task = next((task for end, task in _TASKS.items() if kind.__name__.endswith(end)), None)
    named = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
    usual = {
        "peft_type": "LORA",
        "task_type": task,
        "auto_mapping": None if task else named,
        "base_model_name_or_path": base[0],
        "revision": base[1] or None,
        "inference_mode": True,
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "modules_to_save": sorted({name.rpartition(".")[0] for name in heads or {}}) or None,
    }
    text = json.dumps(_UNKNOWN | usual | dict(config), indent=2, sort_keys=True, ensure_ascii=False)
    write_whole(folder / CONFIG, text + "\n")
