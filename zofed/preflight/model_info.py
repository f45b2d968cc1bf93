"""Models by name: what there is, how large, what a step of each mode takes; and the model itself, for a script."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from zofed import config
from zofed.base.errors import UserError
from zofed.config import Settings
from zofed.core import perturbed
from zofed.core.digests import named_parameters
from zofed.data import encoding, hub
from zofed.models import limits, quantised, sample_model, scopes, sources, spec
from zofed.models.classifier import PooledClassifier
from zofed.models.spec import ModelSpec
from zofed.preflight import footprint
from zofed.preflight.footprint import Footprint
from zofed.training.modes import MODES
from zofed.training.paths import with_absolute_paths
from zofed.training.tasks import TASKS

SCOPES = ("full", "reduced", "last-1", "norms", "biases", "head")
CLASSES = 2  # of a classifier whose data nobody has looked at


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What is known of a model without its weights.

    revision: the commit of a hub model, else empty. parameters: all of them, a tied tensor once. by_scope: those that
    train in each scope; a scope that leaves nothing to train is left out. tokenizer: its name or folder. entries: of
    the tokenizer. vocabulary: rows of the model's embedding. positions: tokens of the longest block, None where the
    model sets no limit. memory: bytes by mode, for the settings asked about; empty where `unpredictable` tells why its
    passes cannot be watched without numbers. read: bytes that a base to be quantised takes in RAM while it is whole: as
    it is read, and as it is replayed and saved at the end; 0 of any other.
    """

    name: str
    revision: str
    architecture: str
    parameters: int
    by_scope: dict[str, int]
    tokenizer: str
    entries: int
    vocabulary: int | None
    positions: int | None
    memory: dict[str, Footprint]
    read: int = 0
    unpredictable: str = ""


def list_available_models() -> list[str]:
    """Names that need no download: the fresh sizes, the shipped model, then the hub models in the local cache."""
    return [*sources.SIZES, sample_model.NAME, *hub.cached()]


def get_model_info(name: str, *, modes: tuple[str, ...] = tuple(MODES), **settings: Any) -> ModelInfo:
    """What a model holds and takes; no weights are read.

    name: a size, a folder or a hub id. modes: those whose memory is wanted, which takes seconds for a large model.
    settings: of the run, as of `zofed train` with underscores (`batch_size=8`). Raises UserError for a model or
    settings that cannot be used.
    """
    return info(_settings(name, settings), modes)


def create_model(name: str, *, labels: int = 0, **settings: Any) -> PreTrainedModel | PooledClassifier:
    """The torch module a run with these settings starts from, on the CPU, in evaluation mode.

    name: a size (fresh, a function of `seed`), a folder or a hub id. labels: classes of a classifier, 0 for a language
    model. settings: `seed`, `dtype`, `tokenizer`, `revision`, ... as of `zofed train` with underscores. Raises
    UserError for a model or settings that cannot be used.
    """
    chosen = _settings(name, {"task": "classification" if labels else "language-model"} | settings)
    tokenizer = encoding.load_tokenizer(spec.tokenizer_name(chosen))
    return spec.create_model(chosen, tokenizer, labels)


def info(settings: Settings, modes: tuple[str, ...], labels: int = CLASSES) -> ModelInfo:
    """`get_model_info` of a run's settings; labels: classes, where the task is classification."""
    tokenizer_name = spec.tokenizer_name(settings)
    tokenizer = encoding.load_tokenizer(tokenizer_name)
    outline = ModelSpec.of(settings, labels if TASKS[settings.task].has_head else 0).outline(tokenizer)
    parameters = named_parameters(outline)
    by_scope = {}
    for scope in SCOPES:
        try:
            names = scopes.trainable_names(outline, scope)
        except UserError:  # this model has nothing of the kind
            continue
        by_scope[scope] = sum(parameters[name].numel() for name in names)
    trainable = scopes.trainable_names(outline, settings.scope)
    matrices = scopes.inner_matrices(outline, trainable) if settings.optimizer == "mudamw" else []
    described = (scopes.true_count(outline), getattr(outline.config, "vocab_size", None), limits.positions(outline))
    read = sum(parameter.numel() for parameter in parameters.values()) * 4  # in float32, whatever it is then held in
    if settings.quantisation != "none":
        names = quantised.names(outline, settings.quantisation, trainable, settings.scope)
        quantised.quantise(outline, settings.quantisation, frozenset(names), torch.device("meta"))
    memory, unpredictable = {}, ""
    try:
        memory = footprint.footprints(outline, settings, trainable, matrices, modes) if modes else {}
    except perturbed.Unseen as error:
        unpredictable = str(error)
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:  # a pass that asks for a number
        unpredictable = f"its passes depend on the numbers in them, {type(error).__name__}"
    return ModelInfo(
        name=settings.model,
        revision=settings.revision,
        architecture=type(outline).__name__,
        parameters=described[0],
        by_scope=by_scope,
        tokenizer=tokenizer_name,
        entries=len(tokenizer),
        vocabulary=described[1],
        positions=described[2],
        memory=memory,
        read=read if settings.quantisation != "none" else 0,
        unpredictable=unpredictable,
    )


def _settings(name: str, settings: dict[str, Any]) -> Settings:
    values = {key.replace("_", "-"): value for key, value in settings.items()}
    return with_absolute_paths(config.resolve(values | {"model": name}))
