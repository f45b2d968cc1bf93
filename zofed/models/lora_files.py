"""What training changed, as a folder that the peft library reads as a LoRA."""

from pathlib import Path

from torch import nn

from zofed.models import adapter_files
from zofed.models.low_rank import Delta, Matrix


def save(delta: Delta, model: nn.Module, base: str, revision: str, folder: Path) -> None:
    """Write a LoRA's two files into a folder.

    model: what the LoRA is of. base, revision: where peft finds the model that it is added to. lora_alpha is the rank,
    so that the factors count as they are. All have that rank, zeros filling up where a matrix has less: programs that
    do not know peft's rank_pattern read them right.
    """
    tensors = {}
    for change in delta.changes:
        path, missing = change.matrix.path, delta.rank - len(change.first)
        tensors[f"{path}.lora_A.weight"] = nn.functional.pad(change.first, (0, 0, 0, missing))
        tensors[f"{path}.lora_B.weight"] = nn.functional.pad(change.second, (0, missing))
    heads = {f"{path}.{name}": tensor for path, own in delta.heads.items() for name, tensor in own.items()}
    chosen = [change.matrix for change in delta.changes]
    config = {
        "r": delta.rank,
        "lora_alpha": delta.rank,
        "target_modules": targets(model, chosen),
        "fan_in_fan_out": any(matrix.is_transposed for matrix in chosen),
    }
    adapter_files.write(folder, model, tensors, config, (base, revision), heads=heads)


def targets(model: nn.Module, chosen: list[Matrix]) -> list[str]:
    """Names by which peft finds the modules of these matrices and no others: their last parts, else whole paths."""
    paths = {matrix.path for matrix in chosen}
    last = sorted({path.rpartition(".")[2] for path in paths})
    met = {path for path, _ in model.named_modules() if path.rpartition(".")[2] in last}
    return last if met == paths else sorted(paths)
