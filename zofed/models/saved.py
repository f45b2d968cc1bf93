"""A saved model: its folder looked through, what is wrong with it told, its tensors read and nothing else made up.

Only tensors that the saved model never had may be drawn: a new classification head. The library itself would give any
tensor random values that a file does not hold under the expected name.
"""

import copy
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from zofed.base.errors import UserError
from zofed.base.parsing import from_json
from zofed.base.texts import said_by
from zofed.models import initial
from zofed.models.classifier import HEAD_FILE

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SINGLE_LABEL = "single_label_classification"  # one label a document: what zofed's data have

_CHOICES = {
    AutoModelForCausalLM: (MODEL_FOR_CAUSAL_LM_MAPPING, "causal language model"),
    AutoModelForMaskedLM: (MODEL_FOR_MASKED_LM_MAPPING, "masked language model"),
    AutoModelForSequenceClassification: (MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, "classifier"),
    AutoModel: (MODEL_MAPPING, "encoder"),
}


@dataclass(frozen=True, slots=True)
class Saved:
    """A folder that holds a model.

    where: what to call it. again: how to get undamaged files. config_again: how to get a config.json that fits them.
    """

    folder: Path
    where: str
    again: str
    config_again: str

    def config(self, kind: Any, overrides: Mapping[str, Any]) -> Any:
        """Its config, with some values overridden, for a model of `kind`: one of transformers' AutoModel classes.

        Raises UserError for a folder without a config, one that cannot be used, or one of no such model.
        """
        config = self.any_config(overrides)
        mapping, what = _CHOICES[kind]
        if type(config) not in mapping:
            others = type(config) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING and kind is AutoModelForCausalLM
            remedy = (
                "set task to classification, or to prompt with [MASK] in the template where it is a masked language "
                "model, or give a causal model such as GPT-2 or Llama"
            )
            raise UserError(
                f"{self.where} is of the type {config.model_type!r}, of which transformers has no {what}: "
                f"{remedy if others else _example(kind)}"
            )
        if kind is AutoModelForSequenceClassification:
            self._check_single_label()
            config.problem_type = SINGLE_LABEL if config.problem_type else None
        return config

    def any_config(self, overrides: Mapping[str, Any]) -> Any:
        """Its config, whatever it can be used for. Raises UserError for none that this transformers can read."""
        self._written()
        try:
            return AutoConfig.from_pretrained(self.folder, local_files_only=True, trust_remote_code=False, **overrides)
        except Exception as error:  # the library raises many types; each means that this config cannot be used
            raise self._unusable(error) from error

    def _unusable(self, error: Exception) -> UserError:
        return UserError(f"{self.where}: its config.json cannot be used ({said_by(error)}): {self.config_again}")

    def _written(self) -> dict[str, Any]:
        """What config.json says. Raises UserError for what no override could mend."""
        if (self.folder / "adapter_config.json").is_file():
            raise UserError(
                f"{self.where} holds an adapter of peft: merge it into its base with merge_and_unload() and give the "
                "folder that save_pretrained writes of the merged model"
            )
        file = self.folder / "config.json"
        if not file.is_file():
            inner = self.folder / "model"
            is_run = (self.folder / "settings.toml").is_file() and inner.is_dir()
            meant = f"the model of this run, {str(inner)!r}" if is_run else "a folder written by save_pretrained"
            raise UserError(f"{self.where} has no config.json: give {meant}")
        try:
            written = from_json(file.read_text(encoding="utf-8"))
        except ValueError as error:  # no JSON, no UTF-8
            raise UserError(
                f"{self.where}: its config.json is no JSON ({said_by(error)}): {self.config_again}"
            ) from error
        if not isinstance(written, dict) or not isinstance(written.get("model_type"), str):
            raise UserError(f"{self.where}: its config.json names no model_type: {self.config_again}")
        if quantised := written.get("quantization_config"):
            method = quantised.get("quant_method") if isinstance(quantised, dict) else None
            raise UserError(
                f"{self.where} is quantised{f' by {method}' if method else ''}, and rounded weights cannot be "
                "trained: give the model in float32, float16 or bfloat16 that it was made of"
            )
        if written["model_type"] not in CONFIG_MAPPING:
            own = "it needs code of its own, which zofed does not run: " if written.get("auto_map") else ""
            raise UserError(
                f"{self.where} has the model_type {written['model_type']!r}, which transformers "
                f"{transformers.__version__} does not know: {own}choose a model of a type it knows"
                f"{'' if own else ', or install a transformers that knows this one'}"
            )
        return written

    def _check_single_label(self) -> None:
        """Refuse a head that was trained to give other answers than one label a document."""
        written = self._written()
        if not any(str(name).endswith("ForSequenceClassification") for name in written.get("architectures") or ()):
            return
        problem = written.get("problem_type") or SINGLE_LABEL
        names = written.get("id2label")
        outputs = len(names) if isinstance(names, dict) else written.get("num_labels")
        if problem != SINGLE_LABEL or outputs == 1:
            told = f"problem_type {problem!r}" if problem != SINGLE_LABEL else "a single output, which is a regression"
            raise UserError(
                f"{self.where} is a classifier of {told}, but zofed trains with one label a document: give a model "
                "without a head, or set pooling to mean or last-token for a new head on its encoder"
            )

    def outline(self, kind: Any, config: Any) -> PreTrainedModel:
        """The model without its weights, float32, on the device that is torch's default at the time."""
        try:
            return kind.from_config(config, dtype=torch.float32, trust_remote_code=False)
        except Exception as error:  # the library raises many types; each means that this config cannot be used
            raise UserError(
                f"{self.where}: its config.json cannot be used ({said_by(error)}): {self.config_again}"
            ) from error

    def load(self, kind: Any, config: Any, seed: int, optional: str = r"(?!)") -> PreTrainedModel:
        """The model in float32 on the CPU; what the saved model never had, a classification head, is drawn.

        optional: expression found in the names of tensors whose values do not matter. Raises UserError for files that
        cannot be read, weights that do not fit the config, and tensors that are missing or not finite.
        """
        self._check_files(config)
        model, report = self._read(kind, config)
        missing = set(report["missing_keys"])
        replaced = self._check_shapes(model, config, report["mismatched_keys"])
        needed = missing & _saved_names(model, config) if kind is AutoModelForSequenceClassification else missing
        lost = self._not_tied(model, config, needed)
        self._check_complete(model, config, [name for name in sorted(lost) if not re.search(optional, name)], report)
        fresh = replaced | (missing - needed) | lost
        initial.draw(model, seed, fresh)
        initial.remember(model, (name for name in fresh if not re.search(optional, name)))
        if broken := [name for name, tensor in model.named_parameters() if not bool(torch.isfinite(tensor).all())]:
            raise UserError(f"{self.where} holds {broken[0]} with values that are not finite: give an undamaged copy")
        return model

    def _check_files(self, config: Any) -> None:
        """Refuse a folder whose weights are missing, in part missing, pickled or cut short."""
        single, index = self.folder / WEIGHTS, self.folder / INDEX
        if single.is_file() or getattr(config, "transformers_weights", None):
            files = [single] if single.is_file() else []
        elif index.is_file():
            try:
                files = [
                    self.folder / name for name in sorted(set(from_json(index.read_bytes())["weight_map"].values()))
                ]
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(f"{self.where}: its {INDEX} cannot be read ({said_by(error)}): {self.again}") from error
            if lacking := [file.name for file in files if not file.is_file()]:
                raise UserError(
                    f"{self.where} lacks {len(lacking)} of the {len(files)} files of its weights, such as "
                    f"{lacking[0]}: {self.again}"
                )
        else:
            raise UserError(f"{self.where} holds {self._instead()}")
        for file in files:
            try:
                with safe_open(file, framework="pt"):
                    pass
            except (SafetensorError, OSError) as error:
                if _starts(file, b"version https://git-lfs"):
                    raise UserError(
                        f"{self.where}: {file.name} is a pointer of Git LFS and not the weights: run git lfs pull there"
                    ) from error
                raise UserError(f"{self.where}: {file.name} is damaged ({said_by(error)}): {self.again}") from error

    def _instead(self) -> str:
        """What lies where the weights should, and the remedy."""
        pickles = sorted(path.name for end in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in self.folder.glob(end))
        others = sorted(path.name for path in self.folder.glob("*.safetensors") if path.name != HEAD_FILE)
        if others:
            return f"{others[0]}, but neither {WEIGHTS} nor {INDEX}, which name its weights: {self.again}"
        if pickles:
            told = f"only the pickle {pickles[0]!r}, which can run code when read"
            return f"{told}: save it as safetensors, with from_pretrained and save_pretrained, where you trust it"
        return f"no weights: {self.again}"

    def _read(self, kind: Any, config: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
        """The library's model, and its report of what was missing, left over or of another shape."""
        try:
            with torch.random.fork_rng(devices=[]):
                return kind.from_pretrained(
                    self.folder,
                    config=copy.deepcopy(config),
                    local_files_only=True,
                    trust_remote_code=False,
                    use_safetensors=True,
                    dtype=torch.float32,
                    output_loading_info=True,
                    ignore_mismatched_sizes=True,  # told by name: the library only points to a table it printed
                )
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # the library raises many types; its files were found whole
            raise UserError(
                f"{self.where}: its weights do not fit its config.json ({said_by(error)}): {self.config_again}"
            ) from error

    def _check_shapes(self, model: PreTrainedModel, config: Any, misshapen: Any) -> set[str]:
        """Names of a head's tensors that another task left behind. Raises UserError for all others misshapen."""
        prefix = _prefix(model)
        is_foreign = type(model).__name__ not in (config.architectures or ())
        replaced = {name for name, _, _ in misshapen if is_foreign and prefix and not name.startswith(prefix)}
        for tensor, found, wanted in sorted(misshapen):
            if tensor in replaced:
                continue
            what = f"{self.where} holds {tensor} of shape {tuple(found)}, but {tuple(wanted)} is needed: "
            if prefix and not tensor.startswith(prefix):
                raise UserError(
                    f"{what}give data of {found[0]} classes, or set pooling to mean or last-token for a new head"
                )
            raise UserError(f"{what}{self.config_again}")
        return replaced

    @torch.no_grad()
    def _not_tied(self, model: PreTrainedModel, config: Any, names: set[str]) -> set[str]:
        """Those of the names whose tensors are nowhere; one that is stored under the name of a tied one is set.

        A language model's embedding may lie in the file as its output layer, of which a classifier knows nothing.
        """
        lost, own = set(names), model.state_dict()
        for kind in _kinds_before(config):
            if not lost or not _on_meta(kind, config).all_tied_weights_keys:
                continue
            other, report = self._read(kind, config)
            prefix = _prefix(other)
            absent = set(report["missing_keys"]) | {name for name, _, _ in report["mismatched_keys"]}
            there = {
                name.removeprefix(prefix): tensor for name, tensor in other.state_dict().items() if name not in absent
            }
            for name in sorted(lost):
                tensor = there.get(name.removeprefix(_prefix(model)))
                if tensor is not None and tensor.shape == own[name].shape:
                    own[name].copy_(tensor)
                    lost.remove(name)
        return lost

    def _check_complete(self, model: PreTrainedModel, config: Any, lost: list[str], report: Mapping[str, Any]) -> None:
        """Refuse a model that would begin with untrained parts."""
        if not lost:
            return
        kind, before = type(model).__name__, (config.architectures or [""])[0]
        what = f"{self.where} lacks {len(lost)} of its model's tensors, such as {', '.join(lost[:3])}"
        wrapped = [key for key in report["unexpected_keys"] if key.endswith("." + lost[0])]
        if wrapped:
            remedy = f"it holds {wrapped[0]} instead; save the model inside the wrapper with save_pretrained"
        elif lost[0].startswith("pooler."):
            remedy = "save the whole model with save_pretrained, or set pooling to mean or last-token"
        elif before not in ("", kind) and not any(name.startswith(_prefix(model)) for name in lost):
            remedy = f"it was saved as {before}; give one saved as {kind}, or set task to classification"
        else:
            remedy = "save the whole model with save_pretrained, or correct its config.json"
        raise UserError(f"{what}: {remedy}")


def _kinds_before(config: Any) -> Iterator[type[PreTrainedModel]]:
    """Classes of which a folder's weights may be: those its config names, then those its type has for text."""
    named = [getattr(transformers, str(name), None) for name in config.architectures or ()]
    mappings = (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING)
    known = [mapping[type(config)] for mapping in (*mappings, MODEL_MAPPING) if type(config) in mapping]
    for kind in (*named, *(kind[0] if isinstance(kind, tuple | list) else kind for kind in known)):
        if isinstance(kind, type) and issubclass(kind, PreTrainedModel) and isinstance(config, kind.config_class or ()):
            yield kind


def _on_meta(kind: type[PreTrainedModel], config: Any) -> PreTrainedModel:
    """A model of shapes alone. An encoder comes without the pooler, which it may be saved without."""
    options = {"add_pooling_layer": False} if "add_pooling_layer" in signature(kind).parameters else {}
    with torch.device("meta"):
        return kind(copy.deepcopy(config), **options)


def _saved_names(model: PreTrainedModel, config: Any) -> set[str]:
    """Names, in `model`, of the tensors that the saved model had, by the first of the classes that its config tells."""
    original = _on_meta(next(_kinds_before(config)), config)
    had = {name.removeprefix(_prefix(original)) for name in original.state_dict()}
    return {name for name in model.state_dict() if name.removeprefix(_prefix(model)) in had}


def _prefix(model: PreTrainedModel) -> str:
    """What the names of the base model's tensors begin with; empty for a base model itself."""
    prefix = model.base_model_prefix
    return f"{prefix}." if prefix and hasattr(model, prefix) else ""


def _example(kind: Any) -> str:
    if kind is AutoModelForMaskedLM:
        return "take [MASK] out of the template, so that the word follows it, or give a model such as BERT or RoBERTa"
    return f"give a model such as {'GPT-2 or Llama' if kind is AutoModelForCausalLM else 'BERT, GPT-2 or Llama'}"


def _starts(file: Path, beginning: bytes) -> bool:
    with file.open("rb") as opened:
        return opened.read(len(beginning)) == beginning
