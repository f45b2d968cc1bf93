"""Where a model comes from: drawn afresh in a named size, or saved in a folder or in the hub's local cache."""

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    GPT2Model,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from zofed.base.errors import UserError
from zofed.config import unknown
from zofed.data import hub
from zofed.models import initial, limits, sample_model
from zofed.models.classifier import Pooling
from zofed.models.saved import Saved

SAVED = "saved"  # what the genesis calls a model that came from a folder; its weights' digest tells which


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


class Source(ABC):
    """What makes a Hugging Face module of one model, for a language model, a classifier or an encoder alone.

    name: what a journal's genesis calls it. Of the methods' arguments classes is 0 for a language model, and pooling
    None but for an encoder without a head.
    """

    name: str

    @property
    @abstractmethod
    def folder(self) -> Path | None:
        """Where its files lie."""

    @property
    @abstractmethod
    def tokenizer(self) -> str:
        """The name of the tokenizer that fits it."""

    @abstractmethod
    def kind(self, classes: int, pooling: Pooling | None) -> Any:
        """The class to make."""

    @abstractmethod
    def config(self, tokenizer: PreTrainedTokenizerBase, classes: int, pooling: Pooling | None) -> Any:
        """Its config. Raises UserError for one that cannot be used."""

    @abstractmethod
    def described_config(self, described: Mapping[str, Any], classes: int, pooling: Pooling | None) -> Any:
        """The config that a genesis describes."""

    @abstractmethod
    def create(self, config: Any, classes: int, pooling: Pooling | None, *, seed: int, padding: Any) -> PreTrainedModel:
        """The module with its weights, float32, on the CPU; what has none is drawn from (seed, its name).

        padding: id of the token that pads documents.
        """

    @abstractmethod
    def outline(self, config: Any, classes: int, pooling: Pooling | None) -> PreTrainedModel:
        """The module without its weights, on torch's default device of the moment."""


@dataclass(frozen=True, slots=True)
class Fresh(Source):
    """A named size: every tensor is drawn from (run seed, its name), so that it is equal on all machines."""

    name: str

    @property
    def folder(self) -> Path | None:
        """None: nothing is read."""
        return None

    @property
    def tokenizer(self) -> str:
        """The tokenizer the size is meant for."""
        return SIZES[self.name].tokenizer

    def kind(self, classes: int, pooling: Pooling | None) -> Any:
        """One of GPT-2's classes."""
        return GPT2Model if pooling else GPT2ForSequenceClassification if classes else GPT2LMHeadModel

    def config(self, tokenizer: PreTrainedTokenizerBase, classes: int, pooling: Pooling | None) -> GPT2Config:
        """GPT-2's, in this size, for the tokenizer's entries."""
        size, end = SIZES[self.name], tokenizer.eos_token_id
        tokens: dict[str, Any] = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": tokenizer.pad_token_id}
        head: dict[str, Any] = {"num_labels": classes} if classes and not pooling else {}
        return GPT2Config(
            vocab_size=limits.entries(tokenizer),
            n_layer=size.layers,
            n_head=size.heads,
            n_embd=size.width,
            n_positions=size.positions,
            **tokens,
            **head,
        )

    def described_config(self, described: Mapping[str, Any], classes: int, pooling: Pooling | None) -> GPT2Config:
        """All of it stands in the genesis."""
        return GPT2Config(**{key: value for key, value in described.items() if key != "model_type"})

    def create(self, config: Any, classes: int, pooling: Pooling | None, *, seed: int, padding: Any) -> PreTrainedModel:
        """Drawn as a whole."""
        with torch.random.fork_rng(devices=[]):  # the library's own initialisation must not move the global state
            model = self.kind(classes, pooling)(config)
        initial.draw(model, seed, None)
        return model

    def outline(self, config: Any, classes: int, pooling: Pooling | None) -> PreTrainedModel:
        """Of the config alone."""
        return self.kind(classes, pooling)(config)


@dataclass(frozen=True, slots=True)
class Stored(Source):
    """A saved model, in safetensors. Raises UserError for files that cannot be used, and for missing weights.

    is_masked: whether its language model fills masks, and does not go on with a text.
    """

    saved: Saved
    is_masked: bool = False

    @property
    def name(self) -> str:  # type: ignore[override]
        """The same for all: no path of any machine."""
        return SAVED

    @property
    def folder(self) -> Path:
        """Its folder, or its snapshot in the hub's cache."""
        return self.saved.folder

    @property
    def tokenizer(self) -> str:
        """The one beside the weights."""
        return str(self.folder)

    def kind(self, classes: int, pooling: Pooling | None) -> Any:
        """One of transformers' AutoModel classes."""
        if pooling or classes:
            return AutoModel if pooling else AutoModelForSequenceClassification
        return AutoModelForMaskedLM if self.is_masked else AutoModelForCausalLM

    def config(self, tokenizer: PreTrainedTokenizerBase, classes: int, pooling: Pooling | None) -> Any:
        """The saved one, with the run's number of classes."""
        return self.saved.config(
            self.kind(classes, pooling), {"num_labels": classes} if classes and not pooling else {}
        )

    def described_config(self, described: Mapping[str, Any], classes: int, pooling: Pooling | None) -> Any:
        """The saved one, with the classes and their names that the genesis has."""
        keys = ("num_labels", "id2label", "label2id") if classes and not pooling else ()
        return self.saved.config(self.kind(classes, pooling), {key: described[key] for key in keys if key in described})

    def create(self, config: Any, classes: int, pooling: Pooling | None, *, seed: int, padding: Any) -> PreTrainedModel:
        """Read from the folder; a head that it does not hold, and a pooler that nothing reads, are drawn."""
        unused = r"^pooler\." if pooling in ("mean", "last-token") else r"(?!)"
        model = self.saved.load(self.kind(classes, pooling), config, seed, unused)
        if classes and not pooling:
            # A classifier reads the last token before the padding. Not told before the model is built: where RoBERTa
            # and its kin begin to count positions hangs on the padding they were made with.
            for one in (model.config, model.config.get_text_config()):
                one.pad_token_id = padding
        return model

    def outline(self, config: Any, classes: int, pooling: Pooling | None) -> PreTrainedModel:
        """Of its config alone."""
        return self.saved.outline(self.kind(classes, pooling), config)


def source_of(name: str, revision: str = "", *, is_masked: bool = False) -> Source:
    """What the setting model names. Raises UserError for nothing known, and for a size where a masked model must be."""
    if name in SIZES:
        if is_masked:
            raise UserError(
                f"model = {name!r} is causal, but the template has [MASK]: take it out, so that the word follows the "
                "prompt, or give the folder of a masked language model such as BERT or RoBERTa"
            )
        return Fresh(name)
    folder = model_folder(name, revision)
    if _local(name):
        again, config = "copy the folder again from where it came", "bring back the config.json it was saved with"
        return Stored(Saved(folder, f"model folder {str(folder)!r}", again, config), is_masked)
    # Not the snapshot alone: its files are links to others beside it, which would be taken for whole.
    again = f"remove {str(folder.parent.parent)!r} and run zofed models download {name}, or choose another model"
    return Stored(Saved(folder, f"hub model {name!r} at {folder.name}", again, again), is_masked)


def model_folder(name: str, revision: str = "") -> Path:
    """Where a saved model lies: its folder, its snapshot in the hub's cache, or where the shipped one was unpacked.

    Raises UserError for none.
    """
    if folder := _local(name):
        return folder
    if hub.is_id(name):
        return hub.snapshot(name, revision)
    if meant := hub.meant(name):
        raise UserError(
            f"model {name!r} is {meant} on the hub: zofed models download {meant} fetches it, then give {meant}"
        )
    known = unknown(name, [*SIZES, sample_model.NAME], "model")
    raise UserError(f"{known}; or give the folder of a saved model, or OWNER/NAME of the hub")


def _local(name: str) -> Path | None:
    """The folder of this name on this machine, if there is one; of the shipped model where it was unpacked."""
    if name == sample_model.NAME:
        return sample_model.folder()
    folder = Path(os.path.expanduser(name))
    with suppress(OSError, ValueError):  # no name that a file can have
        return folder if name and folder.is_dir() else None
    return None


def commit(name: str, revision: str) -> str:
    """The commit a hub model is at in the local cache; empty for any other model.

    Raises UserError where it is not cached, and for the revision of a model that has none.
    """
    if hub.is_id(name) and not (name in SIZES or _local(name)):
        return hub.snapshot(name, revision).name
    if revision:
        raise UserError(
            f"revision = {revision!r}: model {name!r} is not of the hub, so it has no revision; leave revision out"
        )
    return ""
