"""One description of a run's model, from which building, outlining, describing and rebuilding follow."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from zofed.base.errors import UserError
from zofed.base.files import write_whole
from zofed.base.texts import printable
from zofed.config import Settings
from zofed.data import prompts
from zofed.models import classifier, initial, limits, sources
from zofed.models.classifier import PooledClassifier, Pooling
from zofed.models.precision import Model, ready
from zofed.models.sources import Fresh, Source, Stored, source_of


@dataclass(frozen=True)
class ModelSpec:
    """All that decides which module a run starts from.

    name, revision: what the settings model and revision say. seed: of every tensor that is drawn. dtype: of the
    weights. classes: of a classifier; 0: a language model. pooling: how a classifier's encoder is pooled; auto: as its
    folder says, else by the library's own classifier, else (is_frozen: the head alone trains) by the mean. block_size:
    tokens of an example, which the model must be able to read. prompts: whether a language model chooses among
    candidates behind a prompt (causal), or where a mask stands (masked).
    """

    name: str
    revision: str = ""
    seed: int = 0
    dtype: str = "float32"
    classes: int = 0
    pooling: Literal["auto", "mean", "pooler", "last-token"] = "auto"
    is_frozen: bool = False
    block_size: int = 2
    prompts: Literal["", "causal", "masked"] = ""

    @classmethod
    def of(cls, settings: Settings, classes: int = 0) -> "ModelSpec":
        """The model of a run."""
        return cls(
            name=settings.model,
            revision=settings.revision,
            seed=settings.seed,
            dtype=settings.dtype,
            classes=classes,
            pooling=settings.pooling,
            is_frozen=settings.freeze_encoder,
            block_size=settings.block_size,
            prompts=_prompts(settings),
        )

    @cached_property
    def source(self) -> Source:
        """Where it comes from. Raises UserError for an unknown model."""
        return source_of(self.name, self.revision, is_masked=self.prompts == "masked")

    def build(self, tokenizer: PreTrainedTokenizerBase) -> Model:
        """The module on the CPU, in evaluation mode (no dropout), in its dtype.

        `initial.drawn` lists what was drawn. Raises UserError for an unknown model, a pickle, missing weights, a block
        the model cannot hold or documents it cannot read, a language model that sees the token it should predict.
        """
        pooling = self._pooling
        config = self.source.config(tokenizer, self.classes, pooling)
        model = self.source.create(config, self.classes, pooling, seed=self.seed, padding=tokenizer.pad_token_id)
        limits.check_positions(model, self.name, self.block_size)
        if pooling:
            model = self.with_head(model, pooling)
        model = ready(model, "float32")  # looked at before it is rounded
        if isinstance(self.source, Stored):
            limits.check_reads(model, tokenizer, self.name, self.block_size, self.classes)
            if not self.classes and self.prompts != "masked":
                limits.check_causal(model, self.name)
            if self.prompts:
                limits.check_prompts(model, self.name, self.block_size, is_masked=self.prompts == "masked")
        return ready(model, self.dtype)

    def outline(self, tokenizer: PreTrainedTokenizerBase) -> Model:
        """The module `build` would make, its shapes without its memory: on the meta device.

        Raises UserError for an unknown model or config, or a block the model cannot hold.
        """
        pooling = self._pooling
        config = self.source.config(tokenizer, self.classes, pooling)
        with torch.device("meta"):
            model = self.source.outline(config, self.classes, pooling)
        limits.check_positions(model, self.name, self.block_size)
        if pooling:
            with torch.device("meta"):
                model = PooledClassifier(model, pooling, self.classes, self.is_frozen)
            nn.Module.to(model, "meta")
        return ready(model, self.dtype)

    @property
    def _pooling(self) -> Pooling | None:
        """How a classifier's encoder is pooled; None: the library's own classifier for this kind of model decides."""
        return self._head_of_its_own if self.classes else None

    @property
    def _head_of_its_own(self) -> Pooling | None:
        if self.pooling != "auto":
            return self.pooling
        saved = classifier.saved_pooling(self.source.folder) if self.source.folder else None
        return saved or ("mean" if self.is_frozen else None)

    def with_head(self, encoder: PreTrainedModel, pooling: Pooling) -> PooledClassifier:
        """The encoder with the head its folder holds, else with one drawn from the seed."""
        folder = self.source.folder
        model = PooledClassifier(encoder, pooling, self.classes, self.is_frozen)
        if folder and classifier.saved_pooling(folder):
            classifier.load_head(model, folder)
        else:
            head = {f"classifier.{name}" for name, _ in model.classifier.named_parameters()}
            initial.draw(model, self.seed, head)
            if folder:
                initial.remember(model, {f"encoder.{name}" for name in initial.drawn(encoder)} | head)
        return model

    def class_names(self) -> tuple[str, ...]:
        """What a saved classifier calls its classes 0, 1, ...; numbers where it says nothing of them.

        Empty where the head is drawn anew: of a named size, of a folder without a head, or of one that the run pools
        itself. What is wrong with the folder, building it tells.
        """
        folder = self.source.folder
        if folder is None:
            return ()
        try:
            written = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            names = written.get("id2label") or {}
            names = tuple(printable(str(names[key])) for key in sorted(names, key=int))
            architectures = written.get("architectures") or ()
            is_classifier = any(name.endswith("ForSequenceClassification") for name in architectures)
        except (OSError, ValueError, AttributeError, TypeError):
            return ()
        count = classifier.saved_classes(folder)
        if not count and is_classifier and not self._head_of_its_own:
            count = len(names) or int(written.get("num_labels") or 2)  # the library writes down no default
        if count < 2:
            return ()
        are_names = len(names) == count == len(set(names)) and any(
            name not in (str(number), f"LABEL_{number}") for number, name in enumerate(names)
        )
        return names if are_names else tuple(map(str, range(count)))

    def saved_config(self) -> Any:
        """The config of a saved model; None for a named size, or where it cannot be used: building it tells why."""
        try:
            return self.source.saved.any_config({}) if isinstance(self.source, Stored) else None
        except UserError:
            return None


def create_model(settings: Settings, tokenizer: PreTrainedTokenizerBase, labels: int = 0) -> Model:
    """The module of a run. labels: classes of a classifier. Raises UserError as `ModelSpec.build` does."""
    return ModelSpec.of(settings, labels).build(tokenizer)


def rebuild(described: Mapping[str, Any], seed: int, dtype: str, name: str = "", revision: str = "") -> Model:
    """The module that `describe` described, before any training, from the seed or from where it was saved.

    name, revision: a saved model's folder, or its hub id and commit; of no use to a named size. Raises UserError as
    `ModelSpec.build` does, LookupError or TypeError for a description that lacks something.
    """
    pooling: Pooling | None = described.get("pooling")
    # Of the library's own classifier the config tells how many classes there are.
    classes = described["classes"] if pooling else int("SequenceClassification" in described["architecture"])
    is_fresh = described["name"] in sources.SIZES
    masked = not classes and described["architecture"] in MODEL_FOR_MASKED_LM_MAPPING_NAMES.values()
    spec = ModelSpec(
        described["name"] if is_fresh else name,
        "" if is_fresh else revision,
        seed,
        dtype,
        classes,
        prompts="masked" if masked and not is_fresh else "",
    )
    if not is_fresh and isinstance(spec.source, Fresh):
        raise UserError(f"the base of this journal is a saved model, not the size {name!r}: give its folder or hub id")
    config = spec.source.described_config(described["config"], classes, pooling)
    padding = described["config"].get("pad_token_id")
    model = spec.source.create(config, classes, pooling, seed=seed, padding=padding)
    return ready(spec.with_head(model, pooling) if pooling else model, dtype)


def _prompts(settings: Settings) -> Literal["", "causal", "masked"]:
    if settings.task != "prompt":
        return ""
    return "masked" if prompts.is_masked(settings.template) else "causal"


def tokenizer_name(settings: Settings) -> str:
    """Which tokenizer a run uses: the one named, else the one that fits the model. Raises UserError for no model."""
    return settings.tokenizer or source_of(settings.model, settings.revision).tokenizer


def describe(name: str, model: Model) -> dict[str, Any]:
    """What `rebuild` needs to make the same module again, for the journal's genesis; no path of any machine."""
    config = model.config.to_diff_dict()
    for changing in ("transformers_version", "_name_or_path", "dtype", "use_cache"):
        config.pop(changing, None)
    described = {
        "name": name if name in sources.SIZES else sources.SAVED,
        "architecture": type(model).__name__,
        "config": _finite(config),
    }
    if isinstance(model, PooledClassifier):
        described |= {"pooling": model.pooling, "classes": model.classifier.out_features}
    return described


def _finite(value: Any) -> Any:
    """A config's values with floats that JSON has no numbers for, such as Mamba-2's limits, by their names."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def save(model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path, class_names: Sequence[str] = ()) -> None:
    """A folder that `AutoModelForCausalLM` (or its kin for classifiers, masks) and `AutoTokenizer` load; safetensors.

    Of a pooled classifier `AutoModel` loads the encoder; its head lies beside it, where `ModelSpec.build` finds it.
    class_names: of a classifier's classes 0, 1, ..., for id2label and label2id of its config.
    """
    encoder = model.encoder if isinstance(model, PooledClassifier) else model
    assert isinstance(encoder, PreTrainedModel)
    encoder.save_pretrained(folder)
    if class_names:  # written into the file alone: the model in memory stays the one that the genesis describes
        written = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        written["id2label"] = {str(number): name for number, name in enumerate(class_names)}
        written["label2id"] = {name: number for number, name in enumerate(class_names)}
        write_whole(folder / "config.json", json.dumps(written, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
    if isinstance(model, PooledClassifier):
        classifier.save_head(model, folder)
    tokenizer.save_pretrained(folder)
