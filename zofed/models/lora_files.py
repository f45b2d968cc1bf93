"""A LoRA's folder as the peft library reads it, written without that library."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from zofed.base.files import write_whole
from zofed.models.low_rank import Delta, Matrix

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # of all names: of peft's two modules around the model

# peft has no type of task for masked language models: such an adapter names the class of its base.
_TASKS = {"ForSequenceClassification": "SEQ_CLS", "ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM"}


def save(delta: Delta, model: nn.Module, base: str, revision: str, folder: Path) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors` into a folder.

    model: what the LoRA is of. base, revision: where peft finds the model that it is added to. lora_alpha is the rank,
    so that the factors count as they are. All have that rank, zeros filling up where a matrix has less: programs that
    do not know peft's rank_pattern read them right.
    """
    tensors = {}
    for change in delta.changes:
        name, missing = f"{PREFIX}{change.matrix.path}", delta.rank - len(change.first)
        tensors[f"{name}.lora_A.weight"] = nn.functional.pad(change.first, (0, 0, 0, missing))
        tensors[f"{name}.lora_B.weight"] = nn.functional.pad(change.second, (0, missing))
    for path, own in delta.heads.items():
        tensors |= {f"{PREFIX}{path}.{name}": tensor.contiguous() for name, tensor in own.items()}
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    chosen = [change.matrix for change in delta.changes]
    text = json.dumps(_config(delta, model, chosen) | {"base_model_name_or_path": base, "revision": revision or None},
                      indent=2, sort_keys=True, ensure_ascii=False)  # fmt: skip
    write_whole(folder / CONFIG, text + "\n")


def _config(delta: Delta, model: nn.Module, chosen: list[Matrix]) -> dict[str, Any]:
    kind = type(model)
    task = next((task for end, task in _TASKS.items() if kind.__name__.endswith(end)), None)
    named = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
    return {
        "peft_type": "LORA",
        "task_type": task,
        "auto_mapping": None if task else named,
        "inference_mode": True,
        "r": delta.rank,
        "lora_alpha": delta.rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(matrix.is_transposed for matrix in chosen),
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "layers_to_transform": None,
        "layers_pattern": None,
        "target_modules": targets(model, chosen),
        "modules_to_save": list(delta.heads) or None,
    }


def targets(model: nn.Module, chosen: list[Matrix]) -> list[str]:
    """Names by which peft finds the modules of these matrices and no others: their last parts, else whole paths."""
    paths = {matrix.path for matrix in chosen}
    last = sorted({path.rpartition(".")[2] for path in paths})
    met = {path for path, _ in model.named_modules() if path.rpartition(".")[2] in last}
    return last if met == paths else sorted(paths)
