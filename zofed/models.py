"""Build or load a model, choose what trains."""

import json
import math
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
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

from zofed import classifier, directions, hub
from zofed.classifier import PooledClassifier, Pooling
from zofed.config import Settings, unknown
from zofed.errors import UserError
from zofed.files import write_whole

BLOCK = 2**20  # entries of a fresh tensor that are drawn together: all at once would take several times the tensor
INITIAL_STD = 0.02  # Radford et al., "Language models are unsupervised multitask learners", 2019


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
    Raises UserError for an unknown model, a pickle, missing weights, a vocabulary or block the model cannot hold, a
    language model whose predictions see the token they predict.
    """
    pooling = _pooling(settings) if labels else None
    kind, wanted = _kind_and_config(settings, tokenizer, labels, pooling)
    if settings.model in SIZES:
        model = _fresh(kind, wanted, settings.seed)
    else:
        model = _load(_Saved.at(settings.model, settings.revision), kind, wanted, settings.seed, pooling)
        if not labels:
            _check_causal(model, settings.model)
    _check_fits(model, tokenizer, settings)
    if pooling:
        folder = None if settings.model in SIZES else model_folder(settings.model, settings.revision)
        model = _with_head(model, pooling, labels, settings.seed, folder, settings.freeze_encoder)
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
        _draw(model, seed, {"classifier.weight", "classifier.bias"})
    return model


def outline(settings: Settings, tokenizer: PreTrainedTokenizerBase, labels: int = 0) -> Model:
    """The model `create_model` would make, its shapes without its memory: on the meta device.

    Raises UserError for an unknown model or config, a vocabulary or block the model cannot hold.
    """
    pooling = _pooling(settings) if labels else None
    kind, wanted = _kind_and_config(settings, tokenizer, labels, pooling)
    with torch.device("meta"):
        if settings.model in SIZES:
            model = kind(wanted)
        else:
            saved = _Saved.at(settings.model, settings.revision)
            shape = saved.config(wanted)
            try:
                model = kind.from_config(shape, dtype=torch.float32, trust_remote_code=False)
            except Exception as error:  # the library raises many types; each means that this folder cannot be used
                raise saved.spoilt(error) from error
    _check_fits(model, tokenizer, settings)
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
        if classes:
            classes["pad_token_id"] = tokenizer.pad_token_id
        kind = AutoModelForSequenceClassification if labels else AutoModelForCausalLM
        return AutoModel if pooling else kind, classes
    size = SIZES[settings.model]
    end = tokenizer.eos_token_id
    tokens: dict[str, Any] = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": tokenizer.pad_token_id}
    config = GPT2Config(
        vocab_size=_entries(tokenizer),
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
        names = tuple(str(names[key]) for key in sorted(names, key=int))
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
        saved = _Saved.at(source, revision)
        folder = saved.folder
        is_classifier = "SequenceClassification" in description["architecture"]
        kind = AutoModelForSequenceClassification if is_classifier else AutoModelForCausalLM
        keys = ("num_labels", "id2label", "label2id", "pad_token_id") if is_classifier else ()
        extra = {key: description["config"][key] for key in keys if key in description["config"]}
        model = _load(saved, AutoModel if pooling else kind, extra, seed, pooling)
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
    """The model as it is trained and scored: no dropout, no cache, fast activations, weights in `dtype`; in place."""
    model.config.use_cache = False  # keys and values of generation are of no use to a loss
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            # Looks at the ids only to warn of padding, by a branch that many queries' own examples cannot take.
            module.warn_if_padding_and_no_attention_mask = lambda *_: None  # type: ignore[method-assign]
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):  # the same function in one pass over memory instead of eight
                setattr(module, name, nn.GELU(approximate="tanh"))
    nn.Module.to(model, dtype=getattr(torch, dtype))
    return model.eval()


def _fresh(kind: type[PreTrainedModel], config: GPT2Config, seed: int) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):  # the library's own initialisation must not move the global state
        model = kind(config)
    _draw(model, seed, None)
    return model


def model_folder(name: str, revision: str = "") -> Path:
    """Where a saved model lies: its folder, or its snapshot in the hub's cache. Raises UserError for none."""
    folder = Path(os.path.expanduser(name))
    if name and folder.is_dir():
        return folder
    if hub.is_id(name):
        return hub.snapshot(name, revision)
    raise UserError(f"{unknown(name, list(SIZES), 'model')}; or give the folder of a saved model, or OWNER/NAME")


def commit(settings: Settings) -> str:
    """The commit a run's hub model is at in the local cache; empty for any other model.

    Raises UserError where it is not cached, and for the revision of a model that has none.
    """
    is_local = settings.model in SIZES or Path(os.path.expanduser(settings.model)).is_dir()
    if hub.is_id(settings.model) and not is_local:
        return hub.snapshot(settings.model, settings.revision).name
    if settings.revision:
        raise UserError(
            f"revision = {settings.revision!r}: model {settings.model!r} is not of the hub, so it has no revision; "
            "leave revision out"
        )
    return ""


@dataclass(frozen=True, slots=True)
class _Saved:
    """A saved model: its folder, what to call it, and the remedy for one that is spoilt."""

    folder: Path
    where: str
    remedy: str

    @classmethod
    def at(cls, name: str, revision: str) -> "_Saved":
        folder = model_folder(name, revision)
        if Path(os.path.expanduser(name)).is_dir():
            return cls(folder, f"model folder {str(folder)!r}", "save it again with save_pretrained")
        again = f"remove {str(folder)!r} and run zofed models download {name}, or choose another model"
        return cls(folder, f"hub model {name!r} at {folder.name}", again)

    def config(self, overrides: Mapping[str, Any]) -> Any:
        """Its config, with some values overridden. Raises UserError where it has none or one that cannot be used."""
        if not (self.folder / "config.json").is_file():
            raise UserError(f"{self.where} has no config.json: give a folder written by save_pretrained")
        try:
            return AutoConfig.from_pretrained(self.folder, local_files_only=True, trust_remote_code=False, **overrides)
        except Exception as error:  # the library raises many types; each means that this folder cannot be used
            raise self.spoilt(error) from error

    def spoilt(self, error: Exception) -> UserError:
        return UserError(f"{self.where} cannot be loaded ({_reason(error)}): {self.remedy}")


def _load(
    saved: _Saved, kind: Any, overrides: Mapping[str, Any], seed: int, pooling: Pooling | None = None
) -> PreTrainedModel:
    """The saved model; a classification head that its folder does not hold is drawn from the seed.

    pooling: what becomes of an encoder without a head; only where it is not `pooler` may the folder lack the pooler.
    """
    where, config = saved.where, saved.config(overrides)
    if not list(saved.folder.glob("*.safetensors")):
        pickles = [path.name for path in (*saved.folder.glob("*.bin"), *saved.folder.glob("*.pt"))]
        found = f"only the pickle {pickles[0]!r}, which can run code when read" if pickles else "no weights"
        raise UserError(f"{where} holds {found}: save it as safetensors with save_pretrained")
    try:
        with torch.random.fork_rng(devices=[]):
            model, report = kind.from_pretrained(
                saved.folder,
                config=config,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # told below, by name: the library only points to a table it printed
            )
    except Exception as error:  # the library raises many types; each means that this folder cannot be used
        raise saved.spoilt(error) from error
    missing, misshapen = set(report["missing_keys"]), sorted(report["mismatched_keys"])
    if misshapen:
        tensor, found, wanted = misshapen[0]
        raise UserError(
            f"{where} holds {tensor} of shape {tuple(found)}, but {tuple(wanted)} is needed: bring back the config "
            "it was saved with or, for a classifier, give data of as many classes as it has"
        )
    if kind is AutoModelForSequenceClassification:
        may_miss = r"^(?!.*\.\d+\.)"  # all outside the blocks: a new task's head begins anew
    else:
        may_miss = r"^pooler\." if pooling in ("mean", "last-token") else r"(?!)"  # what the pass does not use; nothing
    _check_complete(where, missing, may_miss)
    _draw(model, seed, missing)
    if broken := [name for name, tensor in model.named_parameters() if not bool(torch.isfinite(tensor).all())]:
        raise UserError(f"{where} holds {broken[0]} with values that are not finite: give an undamaged copy")
    return model


def _reason(error: Exception) -> str:
    """The first line of what the library says, without its advice to run code from the folder."""
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return "it needs code of its own, which zofed does not run" if "custom code" in first else first[:200].rstrip(".")


def _check_complete(where: str, missing: Collection[str], may_miss: str) -> None:
    """Refuse a model that would begin with untrained parts, other than those the expression `may_miss` finds."""
    lost = sorted(name for name in missing if not re.search(may_miss, name))
    if lost:
        other = "; or set pooling to mean or last-token" if lost[0].startswith("pooler.") else ""
        raise UserError(
            f"{where} lacks {len(lost)} of its model's tensors, such as {lost[0]}: save the whole model with "
            f"save_pretrained, or correct its config.json{other}"
        )


@torch.no_grad()
def _check_causal(model: PreTrainedModel, name: str) -> None:
    """Refuse a model that reads the future, such as BERT: it would copy each next token instead of predicting it."""
    model.eval()
    first, second = (model(input_ids=torch.tensor([[0, token]])).logits[0, 0] for token in (0, 1))
    if not torch.allclose(first, second, rtol=1e-4, atol=1e-6):
        raise UserError(
            f"model {name!r} ({type(model).__name__}) sees the tokens it should predict, so it is no language model: "
            "set task to classification, or give a causal model such as GPT-2 or Llama"
        )


def _entries(tokenizer: PreTrainedTokenizerBase) -> int:
    """Rows of an embedding that holds every id of the tokenizer; more than it counts where ids are left out."""
    return 1 + max(tokenizer.get_vocab().values())


def _check_fits(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: Settings) -> None:
    vocabulary = getattr(model.config, "vocab_size", None)
    if vocabulary is not None and _entries(tokenizer) > vocabulary:
        raise UserError(
            f"the tokenizer has {_entries(tokenizer)} entries but model {settings.model} only {vocabulary}: "
            "set tokenizer to the folder of the model's own"
        )
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and settings.block_size > positions:
        raise UserError(
            f"block-size = {settings.block_size} is longer than the {positions} positions of model "
            f"{settings.model}: set block-size to {positions} or less"
        )


def _draw(model: Model, seed: int, fresh: set[str] | None) -> None:
    """Draw the tensors in `fresh` (None: all) from (seed, name) in GPT-2's manner."""
    residual = INITIAL_STD / (2 * getattr(model.config, "num_hidden_layers", 1)) ** 0.5
    key = directions.derive_seed("zofed-initial", seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if fresh is not None and name not in fresh:
                continue
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                std = residual if name.endswith("c_proj.weight") else INITIAL_STD
                flat = parameter.view(-1)
                for start in range(0, len(flat), BLOCK):
                    some = flat[start : start + BLOCK]
                    some.copy_(directions.normal(key, name, some.shape, start) * std)


def true_count(model: nn.Module) -> int:
    """Parameters of the model, a tied tensor counted once."""
    return sum(parameter.numel() for parameter in model.parameters())
