"""One description of a run's model, from which building, outlining, describing and rebuilding follow."""

import copy
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from zofed.base.errors import UserError
from zofed.base.files import write_whole
from zofed.base.parsing import from_json
from zofed.base.texts import printable
from zofed.config import Settings
from zofed.core.digests import named_parameters
from zofed.data import prompts
from zofed.models import adapter_files, adapters, classifier, initial, limits, scopes, sources, virtual_tokens
from zofed.models.adapters import Lora, Virtual
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
    candidates behind a prompt (causal), or where a mask stands (masked). adapter: what is set into it and trains in its
    place; None: nothing, and an adapter that `name` holds is added to its base. scope: where a new one is set in.
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
    adapter: adapters.Wanted | Mapping[str, Any] | None = None
    scope: str = "full"

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
            adapter=_adapter(settings),
            scope=settings.scope,
        )

    @cached_property
    def saved_adapter(self) -> adapter_files.Folder | None:
        """The adapter that `name` holds; None: it is a whole model. Raises UserError for one that cannot be used."""
        is_size = self.name in sources.SIZES
        return None if is_size else adapter_files.folder_of(sources.model_folder(self.name, self.revision))

    @property
    def base(self) -> tuple[str, str]:
        """Name and revision of the whole model: `name` itself, or the one below the adapter that it holds."""
        own = self.saved_adapter
        return (own.base, own.revision) if own else (self.name, self.revision)

    @cached_property
    def source(self) -> Source:
        """Where its weights come from: of an adapter its base. Raises UserError for an unknown model."""
        own = self.saved_adapter
        try:
            return source_of(*self.base, is_masked=self.prompts == "masked")
        except UserError as error:
            if own is None:
                raise
            raise UserError(
                f"{own.where} is of the base {own.base!r}: {error}; or write where it lies into "
                f"base_model_name_or_path of its {adapter_files.CONFIG}"
            ) from error

    @property
    def tokenizer(self) -> str:
        """The name of the tokenizer that fits it: beside an adapter, where one is there."""
        own = self.saved_adapter
        has_own = own is not None and (own.path / "tokenizer_config.json").is_file()
        return str(own.path) if own and has_own else self.source.tokenizer

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
        return self._adapted(model)

    def _adapted(self, model: Model) -> Model:
        """The float32 model in its dtype, with its adapter, whether new, saved, or saved and to be added."""
        saved = self.saved_adapter
        if not (saved or self.adapter):
            return ready(model, self.dtype)
        self._check_virtual()
        base = adapters.base_digest(model)
        if saved and not self.adapter:
            adapters.inject(model, saved, self.seed, base)
            adapters.merge(model, saved)
        model = ready(model, self.dtype)
        if self.adapter:
            if saved and isinstance(self.adapter, adapters.Wanted):
                usual = _adapter(Settings().model_copy(update={"adapter": self.adapter.adapter}))
                assert usual is not None
                adapters.check_same(self.adapter, usual, saved)
            self._inject(model, base)
        return model

    def _inject(self, model: Model, base: str) -> None:
        """Set the adapter in; a new one where it trains alone."""
        assert self.adapter is not None
        adapters.inject(model, self.saved_adapter or self.adapter, self.seed, base)
        if not self.saved_adapter and isinstance(self.adapter, Lora):
            adapters.keep(model, scopes.trainable_names(model, self.scope))
        if virtual_tokens.tokens(model):
            limits.check_virtual(model, self.name, self.block_size, is_fixed=self.saved_adapter is not None)

    def _check_virtual(self) -> None:
        """Raise UserError where virtual tokens, of the folder or of the settings, have no place."""
        saved = self.saved_adapter
        held = Virtual.of(saved.config) if saved and saved.type != Lora.type else None
        wanted = held or self.adapter
        if not isinstance(wanted, Virtual):
            return
        if self.classes or self.prompts == "masked":
            where = f", {saved.where} holds some" if saved and held else ""
            raise UserError(
                f"virtual tokens (adapter = {wanted.adapter!r}{where}) are for causal language models: set task to "
                f"language-model, instruction, or prompt without [MASK]{'' if where else ', or adapter to lora'}"
            )
        if self.scope != "full":
            raise UserError(f"adapter = {wanted.adapter!r} trains as a whole: leave scope = {self.scope!r} out")
        if self.name in sources.SIZES:
            raise UserError(
                f"adapter = {wanted.adapter!r} steers a pretrained model, and model = {self.name!r} begins with random "
                "weights: give a pretrained model, or leave adapter out"
            )

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
        model = ready(model, self.dtype)
        if self.adapter:
            self._check_virtual()
            with torch.device("meta"):
                self._inject(model, "")
        return model

    @property
    def _pooling(self) -> Pooling | None:
        """How a classifier's encoder is pooled; None: the library's own classifier for this kind of model decides."""
        return self._head_of_its_own if self.classes else None

    @property
    def _head_of_its_own(self) -> Pooling | None:
        if self.pooling != "auto":
            return self.pooling
        saved = classifier.saved_pooling(self._head_folder) if self._head_folder else None
        return saved or ("mean" if self.is_frozen else None)

    @property
    def _head_folder(self) -> Path | None:
        """Where the head of a pooled classifier may lie."""
        own = self.saved_adapter
        return own.path if own and (own.path / classifier.HEAD_FILE).is_file() else self.source.folder

    def with_head(self, encoder: PreTrainedModel, pooling: Pooling) -> PooledClassifier:
        """The encoder with the head its folder holds, else with one drawn from the seed."""
        folder = self._head_folder
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
            written = from_json((folder / "config.json").read_text(encoding="utf-8"))
            names = written.get("id2label") or {}
            names = tuple(printable(str(names[key])) for key in sorted(names, key=int))
            architectures = written.get("architectures") or ()
            is_classifier = any(name.endswith("ForSequenceClassification") for name in architectures)
        except (OSError, ValueError, AttributeError, TypeError):
            return ()
        count = classifier.saved_classes(self._head_folder or folder)
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
        adapter=described.get("adapter"),
    )
    if not is_fresh and isinstance(spec.source, Fresh):
        raise UserError(f"the base of this journal is a saved model, not the size {name!r}: give its folder or hub id")
    config = spec.source.described_config(described["config"], classes, pooling)
    padding = described["config"].get("pad_token_id")
    model = spec.source.create(config, classes, pooling, seed=seed, padding=padding)
    return spec._adapted(ready(spec.with_head(model, pooling) if pooling else model, "float32"))


def as_saved(settings: Settings) -> Settings:
    """The settings under which a model is used and not trained: with the virtual tokens that its folder may hold."""
    saved = ModelSpec.of(settings).saved_adapter
    if saved is None or saved.type == Lora.type or settings.adapter != "none":
        return settings
    return settings.model_copy(update={"adapter": adapter_files.setting_of(saved.config)})


def _adapter(settings: Settings) -> adapters.Wanted | None:
    if settings.adapter == "none":
        return None
    if settings.adapter != "lora":
        return Virtual(settings.adapter, settings.virtual_tokens)
    targets = tuple(part.strip() for part in settings.lora_targets.split(",") if part.strip())
    return Lora(settings.lora_rank, settings.lora_alpha, targets)


def _prompts(settings: Settings) -> Literal["", "causal", "masked"]:
    if settings.task != "prompt":
        return ""
    return "masked" if prompts.is_masked(settings.template) else "causal"


def tokenizer_name(settings: Settings) -> str:
    """Which tokenizer a run uses: the one named, else the one that fits the model. Raises UserError for no model."""
    return settings.tokenizer or replace(ModelSpec.of(settings), prompts="").tokenizer


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
    if adapted := adapters.of(model):
        described["adapter"] = dict(adapted.config)
    return described


def _finite(value: Any) -> Any:
    """A config's values with floats that JSON has no numbers for, such as Mamba-2's limits, by their names."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def save(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    class_names: Sequence[str] = (),
    base: tuple[str, str] = ("", ""),
) -> None:
    """A folder that `AutoModelForCausalLM` (or its kin for classifiers, masks) and `AutoTokenizer` load; safetensors.

    Of a pooled classifier `AutoModel` loads the encoder; its head lies beside it, where `ModelSpec.build` finds it.
    class_names: of a classifier's classes 0, 1, ..., for id2label and label2id of its config. base: name and revision
    of a saved model below an adapter, which alone is then written, as peft reads it; without one, or where it is a
    named size, which only its seed could bring back, the sum of both is.
    """
    if saves_adapter(model, base):
        _save_adapter(model, folder, base)
        tokenizer.save_pretrained(folder)
        return
    if adapters.of(model):
        model = copy.deepcopy(model)
        adapters.merge(model)
    encoder = model.encoder if isinstance(model, PooledClassifier) else model
    assert isinstance(encoder, PreTrainedModel)
    encoder.save_pretrained(folder)
    if class_names:  # written into the file alone: the model in memory stays the one that the genesis describes
        written = from_json((folder / "config.json").read_text(encoding="utf-8"))
        written["id2label"] = {str(number): name for number, name in enumerate(class_names)}
        written["label2id"] = {name: number for number, name in enumerate(class_names)}
        write_whole(folder / "config.json", json.dumps(written, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
    if isinstance(model, PooledClassifier):
        classifier.save_head(model, folder)
    tokenizer.save_pretrained(folder)


def saves_adapter(model: nn.Module, base: tuple[str, str]) -> bool:
    """Whether `save` writes the adapter of a model alone, for a base of that name and revision."""
    return adapters.of(model) is not None and base[0] not in ("", *sources.SIZES)


def _save_adapter(model: nn.Module, folder: Path, base: tuple[str, str]) -> None:
    if isinstance(model, PooledClassifier):
        adapters.save(model, folder, base, {})
        classifier.save_head(model, folder)
    else:
        own = named_parameters(model)
        adapters.save(model, folder, base, {name: own[name] for name in initial.drawn(model)})
