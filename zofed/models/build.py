"""Build or load a model, choose what trains."""

import copy
import json
import math
import os
import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    GPT2Model,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.activations import NewGELUActivation

from zofed.base.errors import UserError
from zofed.base.files import write_whole
from zofed.config import Settings, unknown
from zofed.data import hub
from zofed.data.readers import printable
from zofed.models import classifier, initial, limits
from zofed.models.classifier import PooledClassifier, Pooling
from zofed.models.saved import Saved


@dataclass(frozen=True, slots=True)
class Size:
    """A GPT-2 shape: layers, heads, width, positions, and the tokenizer it is meant for."""

    layers: int
    heads: int
    width: int
    positions: int
    tokenizer: str


# The names are those of the original project; `true_count` of a built model is what counts.
SIZES = {
    "tiny": Size(layers=2, heads=2, width=64, positions=128, tokenizer="shipped"),
    "20M": Size(layers=6, heads=4, width=256, positions=1024, tokenizer="gpt2"),
    "200M": Size(layers=12, heads=12, width=768, positions=1024, tokenizer="gpt2"),
    "500M": Size(layers=24, heads=16, width=1024, positions=1024, tokenizer="gpt2"),
    "1B": Size(layers=36, heads=20, width=1280, positions=1024, tokenizer="gpt2"),
}


Model = PreTrainedModel | PooledClassifier

SHOWN = 6  # names in a line
SAVED = "saved"  # what the genesis calls a model that came from a folder; its weights' digest tells which


def tokenizer_name(settings: Settings) -> str:
    """Which tokenizer a run uses: the one named, else the one that fits the model. Raises UserError for no model."""
    if settings.model in SIZES:
        return settings.tokenizer or SIZES[settings.model].tokenizer
    return settings.tokenizer or str(model_folder(settings.model, settings.revision))


def create_model(settings: Settings, tokenizer: PreTrainedTokenizerBase, labels: int = 0) -> Model:
    """The model of a run on the CPU, in evaluation mode (no dropout), in the run's dtype.

    A named size is built fresh: each tensor drawn from (run seed, its name), so that it is equal on all machines.
    Anything else is a Hugging Face model in safetensors, in a folder or in the hub's local cache. labels: number of
    classes of a classifier, which is the library's own, or pooled as the settings say.
    Raises UserError for an unknown model, a pickle, missing weights, a block the model cannot hold or documents it
    cannot read, a language model whose predictions see the token they predict. `initial.drawn` tells what was drawn.
    """
    pooling = _pooling(settings) if labels else None
    kind, wanted = _kind_and_config(settings, tokenizer, labels, pooling)
    if settings.model in SIZES:
        model = _fresh(kind, wanted, settings.seed)
    else:
        model = _load(saved_model(settings.model, settings.revision), kind, wanted, settings.seed, pooling)
        if wanted:
            _pad_with(model, tokenizer.pad_token_id)
    limits.check_positions(model, settings)
    if pooling:
        folder = None if settings.model in SIZES else model_folder(settings.model, settings.revision)
        model = _with_head(model, pooling, labels, settings.seed, folder, settings.freeze_encoder)
    model = ready(model, "float32")  # looked at before it is rounded
    if settings.model not in SIZES:
        limits.check_reads(model, tokenizer, settings, labels)
        if not labels:
            limits.check_causal(model, settings.model)
    return ready(model, settings.dtype)


def _pooling(settings: Settings) -> Pooling | None:
    """How a classifier's encoder is pooled; None: the library's own classifier for this kind of model decides."""
    if settings.pooling != "auto":
        return settings.pooling
    saved = None
    if settings.model not in SIZES:
        saved = classifier.saved_pooling(model_folder(settings.model, settings.revision))
    return saved or ("mean" if settings.freeze_encoder else None)


def _with_head(
    encoder: PreTrainedModel, pooling: Pooling, classes: int, seed: int, folder: Path | None, is_frozen: bool = False
) -> PooledClassifier:
    """The encoder with the head its folder holds, else with one drawn from the seed."""
    model = PooledClassifier(encoder, pooling, classes, is_frozen)
    if folder and classifier.saved_pooling(folder):
        classifier.load_head(model, folder)
    else:
        head = {f"classifier.{name}" for name, _ in model.classifier.named_parameters()}
        initial.draw(model, seed, head)
        if folder:
            initial.remember(model, {f"encoder.{name}" for name in initial.drawn(encoder)} | head)
    return model


def outline(settings: Settings, tokenizer: PreTrainedTokenizerBase, labels: int = 0) -> Model:
    """The model `create_model` would make, its shapes without its memory: on the meta device.

    Raises UserError for an unknown model or config, or a block the model cannot hold.
    """
    pooling = _pooling(settings) if labels else None
    kind, wanted = _kind_and_config(settings, tokenizer, labels, pooling)
    with torch.device("meta"):
        if settings.model in SIZES:
            model = kind(wanted)
        else:
            saved = saved_model(settings.model, settings.revision)
            model = saved.outline(kind, saved.config(kind, wanted))
    limits.check_positions(model, settings)
    if pooling:
        with torch.device("meta"):
            model = PooledClassifier(model, pooling, labels, settings.freeze_encoder)
        nn.Module.to(model, "meta")
    return ready(model, settings.dtype)


def _kind_and_config(
    settings: Settings, tokenizer: PreTrainedTokenizerBase, labels: int, pooling: Pooling | None
) -> tuple[Any, Any]:
    """The class of a run's model, of a pooled one its encoder's, and its config if it is a named size, else what
    overrides the saved config."""
    classes: dict[str, Any] = {"num_labels": labels} if labels and not pooling else {}
    if settings.model not in SIZES:
        kind = AutoModelForSequenceClassification if labels else AutoModelForCausalLM
        return AutoModel if pooling else kind, classes
    size = SIZES[settings.model]
    end = tokenizer.eos_token_id
    tokens: dict[str, Any] = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": tokenizer.pad_token_id}
    config = GPT2Config(
        vocab_size=limits.entries(tokenizer),
        n_layer=size.layers,
        n_head=size.heads,
        n_embd=size.width,
        n_positions=size.positions,
        **tokens,
        **classes,
    )
    kind = GPT2ForSequenceClassification if labels else GPT2LMHeadModel
    return GPT2Model if pooling else kind, config


def describe(name: str, model: Model) -> dict[str, Any]:
    """What `rebuild` needs to make the same model again, for the journal's genesis; no path of any machine."""
    config = model.config.to_diff_dict()
    for changing in ("transformers_version", "_name_or_path", "dtype", "use_cache"):
        config.pop(changing, None)
    described = {"name": name if name in SIZES else SAVED, "architecture": type(model).__name__}
    described["config"] = _finite(config)
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


def class_names(settings: Settings) -> tuple[str, ...]:
    """What a saved classifier calls its classes 0, 1, ...; numbers where it says nothing of them.

    Empty where the run's head is drawn anew: of a named size, of a folder without a head, or of one that the run pools
    itself. What is wrong with the folder, loading it tells.
    """
    if settings.task != "classification" or settings.model in SIZES:
        return ()
    folder = model_folder(settings.model, settings.revision)
    try:
        written = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        names = written.get("id2label") or {}
        names = tuple(printable(str(names[key])) for key in sorted(names, key=int))
        is_classifier = any(name.endswith("ForSequenceClassification") for name in written.get("architectures") or ())
    except (OSError, ValueError, AttributeError, TypeError):
        return ()
    count = classifier.saved_classes(folder)
    if not count and is_classifier and not _pooling(settings):
        count = len(names) or int(written.get("num_labels") or 2)  # the library writes down no default
    if count < 2:
        return ()
    is_told = len(names) == count == len(set(names)) and any(
        name not in (str(number), f"LABEL_{number}") for number, name in enumerate(names)
    )
    return names if is_told else tuple(map(str, range(count)))


def rebuild(description: Mapping[str, Any], seed: int, dtype: str, source: str = "", revision: str = "") -> Model:
    """The model that `describe` described, before any training, from the seed or from where it was saved.

    source, revision: a saved model's folder, or its hub id and commit; of no use to a named size. Raises UserError as
    `create_model` does.
    """
    pooling: Pooling | None = description.get("pooling")
    if description["name"] in SIZES:
        kinds = {kind.__name__: kind for kind in (GPT2LMHeadModel, GPT2ForSequenceClassification)}
        config = GPT2Config(**{key: value for key, value in description["config"].items() if key != "model_type"})
        folder = None
        model = _fresh(GPT2Model if pooling else kinds[description["architecture"]], config, seed)
    else:
        saved = saved_model(source, revision)
        folder = saved.folder
        is_classifier = "SequenceClassification" in description["architecture"]
        kind = AutoModelForSequenceClassification if is_classifier else AutoModelForCausalLM
        keys = ("num_labels", "id2label", "label2id") if is_classifier else ()
        extra = {key: description["config"][key] for key in keys if key in description["config"]}
        model = _load(saved, AutoModel if pooling else kind, extra, seed, pooling)
        if is_classifier:
            _pad_with(model, description["config"].get("pad_token_id"))
    if pooling:
        model = _with_head(model, pooling, description["classes"], seed, folder)
    return ready(model, dtype)


def save(model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path, class_names: Sequence[str] = ()) -> None:
    """A folder that `AutoModelForCausalLM` (or its kin for classifiers) and `AutoTokenizer` load; safetensors.

    Of a pooled classifier `AutoModel` loads the encoder; its head lies beside it, where `create_model` finds it.
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


def ready(model: Model, dtype: str) -> Model:
    """The model as it is trained and scored: no dropout, no cache, fast activations, weights in `dtype`; in place.

    What the model itself keeps in float32 (rotary frequencies, the gates of some mixtures of experts) stays so.
    """
    model.config.use_cache = False  # keys and values of generation are of no use to a loss
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            # Looks at the ids only to warn of padding, by a branch that many queries' own examples cannot take.
            module.warn_if_padding_and_no_attention_mask = lambda *_: None  # type: ignore[method-assign]
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):  # the same function in one pass over memory instead of eight
                setattr(module, name, nn.GELU(approximate="tanh"))
    _cast(model, getattr(torch, dtype))
    return model.eval()


@torch.no_grad()
def _cast(model: Model, dtype: torch.dtype) -> None:
    """Every tensor in the type that the library would load it in, where the weights are wanted in `dtype`."""
    if dtype == torch.float32:
        return  # what was built in it has it
    inner = model.encoder if isinstance(model, PooledClassifier) else model
    assert isinstance(inner, PreTrainedModel)
    types = _types(inner, dtype)
    for prefix, module in inner.named_modules():
        tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for name, tensor in tensors:
            if tensor.is_floating_point():  # in place: a tied tensor stays one
                tensor.data = tensor.data.to(types.get(f"{prefix}.{name}" if prefix else name, dtype))
    if isinstance(model, PooledClassifier):
        nn.Module.to(model.classifier, dtype)


def _types(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Type of each parameter and buffer, by all of its names, of a model that the library builds in `dtype`."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # as the library does: what a module makes in a type of its own keeps that type
    try:
        with torch.device("meta"):
            built = type(model)(copy.deepcopy(model.config))
    finally:
        torch.set_default_dtype(before)
    tensors = (*built.named_parameters(remove_duplicate=False), *built.named_buffers(remove_duplicate=False))
    types = {name: tensor.dtype for name, tensor in tensors}
    persistent = set(built.state_dict())
    for pattern, kept in model._get_dtype_plan(dtype).items():
        expression = re.compile(pattern.replace("*", ".*"))  # how the library reads its list
        types |= {name: kept for name in types if name in persistent and expression.search(name)}
    return types


def _fresh(kind: type[PreTrainedModel], config: GPT2Config, seed: int) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):  # the library's own initialisation must not move the global state
        model = kind(config)
    initial.draw(model, seed, None)
    return model


def model_folder(name: str, revision: str = "") -> Path:
    """Where a saved model lies: its folder, or its snapshot in the hub's cache. Raises UserError for none."""
    if folder := _local(name):
        return folder
    if hub.is_id(name):
        return hub.snapshot(name, revision)
    told = f"{unknown(name, list(SIZES), 'model')}; or give the folder of a saved model, or OWNER/NAME of the hub"
    meant = hub.meant(name)
    raise UserError(f"{told}, such as {meant} after zofed models download {meant}" if meant else told)


def _local(name: str) -> Path | None:
    """The folder of this name on this machine, if there is one."""
    folder = Path(os.path.expanduser(name))
    with suppress(OSError, ValueError):  # no name that a file can have
        return folder if name and folder.is_dir() else None
    return None


def commit(settings: Settings) -> str:
    """The commit a run's hub model is at in the local cache; empty for any other model.

    Raises UserError where it is not cached, and for the revision of a model that has none.
    """
    is_local = settings.model in SIZES or _local(settings.model)
    if hub.is_id(settings.model) and not is_local:
        return hub.snapshot(settings.model, settings.revision).name
    if settings.revision:
        raise UserError(
            f"revision = {settings.revision!r}: model {settings.model!r} is not of the hub, so it has no revision; "
            "leave revision out"
        )
    return ""


def told_drawn(names: Collection[str]) -> str:
    """A line on the parameters that a saved model lacks and a run draws, for `initial.drawn`'s names."""
    shown = ", ".join(list(names)[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
    return f"not in the saved model, drawn from the seed: {shown}"


def _pad_with(model: PreTrainedModel, token: Any) -> None:
    """Tell a classifier what pads its documents: it reads the last token before.

    Not before it is built: where RoBERTa and its kin begin to count positions hangs on the padding they were made with.
    """
    for config in (model.config, model.config.get_text_config()):
        config.pad_token_id = token


def saved_model(name: str, revision: str) -> Saved:
    """A saved model by its folder or hub id. Raises UserError for none."""
    folder = model_folder(name, revision)
    if _local(name):
        again, config = "copy the folder again from where it came", "bring back the config.json it was saved with"
        return Saved(folder, f"model folder {str(folder)!r}", again, config)
    # Not the snapshot alone: its files are links to others beside it, which would be taken for whole.
    again = f"remove {str(folder.parent.parent)!r} and run zofed models download {name}, or choose another model"
    return Saved(folder, f"hub model {name!r} at {folder.name}", again, again)


def saved_config(settings: Settings) -> Any:
    """The config of a run's saved model; None for a named size, or where it cannot be used: making it tells why."""
    if settings.model in SIZES:
        return None
    with suppress(UserError):
        return saved_model(settings.model, settings.revision).any_config({})
    return None


def _load(
    saved: Saved, kind: Any, overrides: Mapping[str, Any], seed: int, pooling: Pooling | None = None
) -> PreTrainedModel:
    """The saved model; a classification head that its folder does not hold is drawn from the seed.

    pooling: what becomes of an encoder without a head; only where it is not `pooler` may the folder lack the pooler.
    """
    unused = r"^pooler\." if pooling in ("mean", "last-token") else r"(?!)"
    return saved.load(kind, saved.config(kind, overrides), seed, unused)


def true_count(model: nn.Module) -> int:
    """Parameters of the model, a tied tensor counted once."""
    return sum(parameter.numel() for parameter in model.parameters())
