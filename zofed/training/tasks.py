"""One class a task: how documents become examples, which classes they have, what knowing nothing scores.

Nothing else of training, federations, pictures and forecasts tells tasks apart by their names; `models` does, which
makes a module for each. A new task is a class and a row of `TASKS`.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from zofed.base.errors import UserError
from zofed.config import Settings
from zofed.core import metrics
from zofed.data import classes, encoding, prompts
from zofed.data.classes import Classes
from zofed.data.documents import Reading
from zofed.data.encoding import Document, Examples
from zofed.data.templates import Template, words_of
from zofed.models.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Encoder:
    """How documents become tokens. cache: folder to keep them in, by the tokenizer's digest too; None: they are not.

    words: that a prompt's label words are.
    """

    tokenizer: PreTrainedTokenizerBase
    block_size: int
    cache: Path | None = None
    digest: str = ""
    words: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Question:
    """prompt: token ids, as a model reads them before it answers. wanted: the text of the right answer."""

    prompt: tuple[int, ...]
    wanted: str


class TaskType(ABC):
    """What every task says of itself."""

    base_name: ClassVar[str] = ""  # of what untrained weights score, a baseline; empty: those weights know nothing

    has_classes: ClassVar[bool] = False  # documents have labels, which a run numbers
    reads_turns: ClassVar[bool] = False  # documents are conversations
    has_head: ClassVar[bool] = False  # the classes are outputs of the model
    has_one_example_a_document: ClassVar[bool] = False
    needs_training_data_to_score: ClassVar[bool] = False  # for what scored data alone do not show
    keeps_tokens: ClassVar[bool] = False  # in the user's cache, which takes the tokenizer's digest

    def template(self, settings: Settings) -> Template | None:
        """What makes a document of a row; None: its text is."""
        return None

    def words(self, settings: Settings) -> tuple[str, ...]:
        """What may follow a prompt; empty: there is none."""
        return ()

    def classes(self, settings: Settings, found: Reading) -> Classes | None:
        """The classes of a run that begins with this training data; None: it has none. Raises UserError."""
        return None

    @abstractmethod
    def examples(self, documents: list[Document], encoder: Encoder) -> Examples:
        """Documents as the tensors that a model reads."""

    def token_bytes(self, documents: list[Document], encoder: Encoder) -> Tensor | None:
        """UTF-8 bytes that each token of the examples stands for; None: scores do not count bytes."""
        return None

    def prompts_to_answer(self, documents: list[Document], encoder: Encoder) -> list[Question]:
        """What a model may be asked of each document; empty: the task has no answers."""
        return []

    def stop_tokens(self, encoder: Encoder) -> tuple[int, ...]:
        """Ids of the tokens that end an answer."""
        end = encoder.tokenizer.eos_token_id
        return (end,) if isinstance(end, int) else ()

    def demonstrated(self, documents: list[Document], shown: list[Document], settings: Settings) -> list[Document]:
        """The documents with others, solved, before each; empty: the task has none to solve."""
        return []

    @abstractmethod
    def baselines(self, train: Examples, held_out: Examples, vocabulary: int, classes: int) -> dict[str, float]:
        """Losses (nats) of knowing nothing on the held-out examples; a name that ends in `accuracy`: a share."""

    @abstractmethod
    def blank(self, examples: int, block_size: int) -> Examples:
        """A batch of zeros, of the shapes that a run has."""

    @abstractmethod
    def named(self, block_size: int, classes: int) -> str:
        """What its examples are, for people."""


class LanguageModelling(TaskType):
    """Predict the next token, in blocks of documents' tokens."""

    keeps_tokens = True

    def examples(self, documents: list[Document], encoder: Encoder) -> Examples:
        """Blocks of `block_size` tokens."""
        return encoding.language_model_examples(
            documents, encoder.tokenizer, encoder.block_size, encoder.cache, encoder.digest
        )

    def token_bytes(self, documents: list[Document], encoder: Encoder) -> Tensor | None:
        """Of each token of each block."""
        return encoding.token_bytes(documents, encoder.tokenizer, encoder.block_size, encoder.cache, encoder.digest)

    def baselines(self, train: Examples, held_out: Examples, vocabulary: int, classes: int) -> dict[str, float]:
        """Of uniform guesses, and of the training tokens' frequencies."""
        return {"uniform": math.log(vocabulary), "unigram": encoding.unigram_loss(train, held_out, vocabulary)}

    def blank(self, examples: int, block_size: int) -> Examples:
        """Tokens and labels."""
        ids = torch.zeros(examples, block_size, dtype=torch.int64)
        return {"input_ids": ids, "labels": ids}

    def named(self, block_size: int, classes: int) -> str:
        """Blocks."""
        return f"blocks of {block_size} tokens"


class Classification(TaskType):
    """Predict the label of each document."""

    has_classes = True
    has_head = True
    has_one_example_a_document = True
    needs_training_data_to_score = True  # they say which classes there are

    def classes(self, settings: Settings, found: Reading) -> Classes | None:
        """Those of the model's own head, else those that the data show."""
        return classes.of_training(found, settings.model, ModelSpec.of(settings).class_names())

    def examples(self, documents: list[Document], encoder: Encoder) -> Examples:
        """Each document padded or cut to `block_size` tokens; nothing is cached."""
        return encoding.classification_examples(documents, encoder.tokenizer, encoder.block_size)

    def baselines(self, train: Examples, held_out: Examples, vocabulary: int, classes: int) -> dict[str, float]:
        """Of uniform guesses, and of the training labels' frequencies; the accuracy of the most frequent label."""
        return metrics.class_baselines(train["labels"], held_out["labels"], classes)

    def blank(self, examples: int, block_size: int) -> Examples:
        """Tokens, mask and one label a document."""
        ids = torch.zeros(examples, block_size, dtype=torch.int64)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0]}

    def named(self, block_size: int, classes: int) -> str:
        """Documents."""
        return f"documents of {classes} classes"


class Prompt(Classification):
    """Predict the label of each document by the word that a language model finds likeliest after a prompt."""

    has_head = False
    base_name = "zero_shot"

    def template(self, settings: Settings) -> Template | None:
        """The setting of that name."""
        return Template(settings.template or "{{ text }}")

    def words(self, settings: Settings) -> tuple[str, ...]:
        """The setting label-words."""
        return words_of(settings.label_words)

    def classes(self, settings: Settings, found: Reading) -> Classes | None:
        """Those that the data show, a word for each. Raises UserError where there are not as many."""
        words = self.words(settings)
        shown = classes.of_training(found, settings.model, ())
        if len(shown) != len(words):
            raise UserError(
                f"label-words = {settings.label_words!r} are {len(words)} words, but {found.dataset!r} has "
                f"{len(shown)} classes ({shown}): give a word for each, in that order"
            )
        return shown

    def examples(self, documents: list[Document], encoder: Encoder) -> Examples:
        """Each prompt with the label words; nothing is cached."""
        return prompts.prompt_examples(documents, encoder.tokenizer, encoder.block_size, encoder.words)

    def demonstrated(self, documents: list[Document], shown: list[Document], settings: Settings) -> list[Document]:
        """Prompts with their right words before each, a blank line between them."""
        words = self.words(settings)
        before = "".join(f"{one.text}{words[one.label or 0]}\n\n" for one in shown)
        return [replace(document, text=before + document.text) for document in documents]

    def blank(self, examples: int, block_size: int) -> Examples:
        """Tokens, mask, two words of one token and a label."""
        ids = torch.zeros(examples, block_size, dtype=torch.int64)
        mask, words = torch.ones_like(ids), torch.zeros(examples, 2, 1, dtype=torch.int64)
        return {"input_ids": ids, "attention_mask": mask, "candidates": words, "labels": ids[:, 0]}

    def named(self, block_size: int, classes: int) -> str:
        """Prompts."""
        return f"prompts of {classes} classes"


TASKS: dict[str, TaskType] = {
    "language-model": LanguageModelling(),
    "classification": Classification(),
    "prompt": Prompt(),
}
