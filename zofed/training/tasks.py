"""One class a task: how documents become examples, which classes they have, what knowing nothing scores.

Nothing else of training, federations, pictures and forecasts tells tasks apart by their names; `models` does, which
makes a module for each. A new task is a class and a row of `TASKS`.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from zofed.base.errors import UserError
from zofed.config import Settings
from zofed.core import metrics
from zofed.core.candidates import KEY, NO_TOKEN, PLACE
from zofed.data import chat_templates, classes, columns, documents, encoding, instructions, prompts
from zofed.data.classes import Classes
from zofed.data.documents import Reading
from zofed.data.encoding import Document, Examples
from zofed.data.label_words import label_words
from zofed.data.templates import Template
from zofed.models import spec
from zofed.models.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Encoder:
    """How documents become tokens. cache: folder to keep them in, by the tokenizer's digest too; None: they are not.

    words: that a prompt's label words are. is_masked: a masked model reads prompts. demonstrations: solved, before each
    prompt. loss_on, packing: the settings of that name.
    """

    tokenizer: PreTrainedTokenizerBase
    block_size: int
    cache: Path | None = None
    digest: str = ""
    words: tuple[str, ...] = ()
    is_masked: bool = False
    demonstrations: tuple[Document, ...] = ()
    loss_on: str = "response"
    packing: bool = False


@dataclass(frozen=True, slots=True)
class Question:
    """prompt: token ids, as a model reads them before it answers. wanted: the text of the right answer."""

    prompt: tuple[int, ...]
    wanted: str


class TaskType(ABC):
    """What every task says of itself."""

    base_name: ClassVar[str] = ""  # of what untrained weights score, a baseline; empty: those weights know nothing
    has_classes: ClassVar[bool] = False  # documents have labels, which a run numbers
    has_head: ClassVar[bool] = False  # the classes are outputs of the model
    has_one_example_a_document: ClassVar[bool] = False
    needs_training_data_to_score: ClassVar[bool] = False  # for what scored data alone do not show
    reads_turns: ClassVar[bool] = False  # documents are conversations
    keeps_tokens: ClassVar[bool] = False  # in the user's cache, which takes the tokenizer's digest

    def template(self, settings: Settings) -> Template | None:
        """What makes a document of a row; None: its text is."""
        return None

    def tokenizer(self, settings: Settings, loaded: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
        """The tokenizer as the run uses and saves it. Raises UserError where it cannot be used."""
        return loaded

    def has_own_candidates(self, settings: Settings) -> bool:
        """Whether each row has candidates of its own, among which its label says which is right."""
        return False

    def words(self, settings: Settings, names: tuple[str, ...]) -> tuple[str, ...]:
        """What may follow a prompt in the classes of these names; empty: there is none."""
        return ()

    def classes(self, settings: Settings, found: Reading) -> Classes | None:
        """The classes of a run that begins with this training data; None: it has none. Raises UserError."""
        return None

    def labelled(self, settings: Settings, found: Reading, named: Classes | None, what: str) -> list[Document]:
        """The documents of a data set, their labels as the run has them. named: its classes, None where it has none.

        Raises UserError, which begins with `what`, for labels and candidates that are missing or none of them.
        """
        if not self.has_classes:
            return found.documents
        classes.check_labelled(found, what)
        return found.documents if named is None else classes.renumbered(found, named, what)

    @abstractmethod
    def examples(self, documents: list[Document], encoder: Encoder) -> Examples:
        """Documents as the tensors that a model reads."""

    def to_train(self, settings: Settings, examples: Examples) -> Examples:
        """What of the examples trains; scores see them as they are."""
        return examples

    def empty(self, settings: Settings, documents: list[Document], encoder: Encoder) -> Examples | None:
        """What predictions are calibrated by; None: they are not."""
        return None

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

    def block_for(self, documents: list[Document], encoder: Encoder) -> int:
        """The block size that holds all of the encoder's demonstrations before each of the documents."""
        return encoder.block_size

    def baselines(self, train: Examples, held_out: Examples, vocabulary: int, classes: int) -> dict[str, float]:
        """What knowing nothing scores on the held-out examples: losses (nats); a name that ends in `accuracy`: a share.

        Of tokens: uniform guesses, and the frequencies of those that train.
        """
        return {"uniform": math.log(vocabulary), "unigram": encoding.unigram_loss(train, held_out, vocabulary)}

    @abstractmethod
    def blank(self, examples: int, settings: Settings) -> Examples:
        """A batch of zeros, of the shapes that a run has."""

    @abstractmethod
    def named(self, block_size: int, classes: int) -> str:
        """What its examples are, for people."""

    def told(self, settings: Settings, names: tuple[str, ...]) -> list[str]:
        """What else of the data people should see before a run, in lines."""
        return []


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

    def blank(self, examples: int, settings: Settings) -> Examples:
        """Tokens and labels."""
        ids = torch.zeros(examples, settings.block_size, dtype=torch.int64)
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

    def blank(self, examples: int, settings: Settings) -> Examples:
        """Tokens, mask and one label a document."""
        ids = torch.zeros(examples, settings.block_size, dtype=torch.int64)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0]}

    def named(self, block_size: int, classes: int) -> str:
        """Documents."""
        return f"documents of {classes} classes"


class Prompt(Classification):
    """Predict the label of each document by the candidate that a language model finds likeliest after a prompt.

    Candidates are the label words, or each row's own.
    """

    has_head = False
    base_name = "zero_shot"

    def template(self, settings: Settings) -> Template | None:
        """The setting of that name, and those that label-words may be. Raises UserError for what cannot be used."""
        words, prompt = label_words(settings.label_words), settings.calibration_prompt
        if prompt and prompts.is_masked(prompt) != prompts.is_masked(settings.template):
            one, other = ("without", "with") if prompts.is_masked(settings.template) else ("with", "without")
            raise UserError(
                f"calibration-prompt = {prompt!r} is {one} {prompts.BLANK}, but the template is {other} it: write both "
                "for the same kind of model"
            )
        return Template(settings.template or "{{ text }}", candidates=words.texts if words.are_templates else ())

    def has_own_candidates(self, settings: Settings) -> bool:
        """Unless label-words are words."""
        words = label_words(settings.label_words)
        return words.are_templates or not words.texts

    def words(self, settings: Settings, names: tuple[str, ...]) -> tuple[str, ...]:
        """The setting label-words, in the classes' order. Raises UserError where they do not fit the classes."""
        return () if self.has_own_candidates(settings) else label_words(settings.label_words).of(names)

    def classes(self, settings: Settings, found: Reading) -> Classes | None:
        """Those that the data show, a word for each; None where each row has candidates of its own.

        Raises UserError where there are not as many words.
        """
        if self.has_own_candidates(settings):
            return None
        shown = classes.of_training(found, settings.model, ())
        self.words(settings, shown.names)
        return shown

    def labelled(self, settings: Settings, found: Reading, named: Classes | None, what: str) -> list[Document]:
        """The same; the label of a row with candidates of its own stays a number of them."""
        own = self.has_own_candidates(settings)
        (prompts.check_own if own else prompts.check_none_own)(found.documents, what)
        return super().labelled(settings, found, None if own else named, what)

    def examples(self, documents: list[Document], encoder: Encoder) -> Examples:
        """Each prompt, behind the demonstrations, with its candidates; nothing is cached."""
        encoding = self._encoding(encoder)
        return prompts.prompt_examples(prompts.with_shots(documents, encoder.demonstrations, encoding), encoding)

    def block_for(self, documents: list[Document], encoder: Encoder) -> int:
        """By the tokens of the longest prompt and of all demonstrations."""
        return prompts.block_for(documents, encoder.demonstrations, self._encoding(encoder))

    def _encoding(self, encoder: Encoder) -> prompts.Encoding:
        return prompts.Encoding(encoder.tokenizer, encoder.block_size, encoder.words, encoder.is_masked)

    def to_train(self, settings: Settings, examples: Examples) -> Examples:
        """Under teacher forcing the right candidates alone."""
        return prompts.right_alone(examples) if settings.prompt_loss == "teacher-forcing" else examples

    def empty(self, settings: Settings, documents: list[Document], encoder: Encoder) -> Examples | None:
        """The candidates behind the setting calibration-prompt."""
        prompt = settings.calibration_prompt
        return self.examples(prompts.without_content(documents, prompt), encoder) if prompt else None

    def baselines(self, train: Examples, held_out: Examples, vocabulary: int, classes: int) -> dict[str, float]:
        """As of classes; where rows have candidates of their own, of choosing among them blindly."""
        if classes:
            return super().baselines(train, held_out, vocabulary, classes)
        counts = (held_out[KEY][:, :, 0] != NO_TOKEN).sum(1).double()
        return {"uniform": float(counts.log().mean()), "uniform_accuracy": float((1 / counts).mean())}

    def blank(self, examples: int, settings: Settings) -> Examples:
        """Tokens, mask, a label, and the label words as one token each; two where nobody knows how many there are."""
        ids = torch.zeros(examples, settings.block_size, dtype=torch.int64)
        is_one = settings.prompt_loss == "teacher-forcing"
        classes = 1 if is_one else max(2, len(label_words(settings.label_words).texts))
        batch = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            KEY: ids.new_zeros(examples, classes, 1),
            "labels": ids[:, 0],
        }
        return batch | ({PLACE: ids[:, 0]} if prompts.is_masked(settings.template) else {})

    def named(self, block_size: int, classes: int) -> str:
        """Prompts."""
        return f"prompts of {classes} classes" if classes else "prompts with candidates of their own"

    def told(self, settings: Settings, names: tuple[str, ...]) -> list[str]:
        """Which class gets which word, and how many documents are demonstrations."""
        words = self.words(settings, names) if names else ()
        shown = [f"{name} {word!r}" for name, word in zip(names[: classes.SHOWN], words, strict=False)]
        rest = ", ..." if len(words) > classes.SHOWN else ""
        shots = f"{settings.shots} of the training documents stand before each prompt, and nobody trains on them"
        return [f"label words: {', '.join(shown)}{rest}"] * bool(words) + [shots] * bool(settings.shots)


class Instruction(TaskType):
    """Answer as the assistant of each conversation does: its turns train, each with the token that ends it."""

    reads_turns = True
    base_name = "base"

    def template(self, settings: Settings) -> Template | None:
        """The setting of that name, which makes the prompt; None: the row has its own."""
        return Template(settings.template) if settings.template else None

    def tokenizer(self, settings: Settings, loaded: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
        """With the chat template that the setting of that name says."""
        return chat_templates.with_template(loaded, settings.chat_template)

    def examples(self, documents: list[Document], encoder: Encoder) -> Examples:
        """Each conversation, or several packed into one block; nothing is cached."""
        return instructions.instruction_examples(
            documents, encoder.tokenizer, encoder.block_size, encoder.loss_on, encoder.packing
        )

    def prompts_to_answer(self, documents: list[Document], encoder: Encoder) -> list[Question]:
        """The last response of each conversation, behind the tokens that it was trained behind."""
        return [
            Question(tuple(instructions.prompt_tokens(document, encoder.tokenizer)), document.turns[-1].text)
            for document in documents
            if document.turns[-1].role == "assistant"
        ]

    def stop_tokens(self, encoder: Encoder) -> tuple[int, ...]:
        """What the chat template writes behind a response."""
        return instructions.stop_tokens(encoder.tokenizer)

    def blank(self, examples: int, settings: Settings) -> Examples:
        """Tokens, mask and labels."""
        ids = torch.zeros(examples, settings.block_size, dtype=torch.int64)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}

    def named(self, block_size: int, classes: int) -> str:
        """Conversations."""
        return f"conversations of at most {block_size} tokens"


TASKS: dict[str, TaskType] = {
    "language-model": LanguageModelling(),
    "classification": Classification(),
    "prompt": Prompt(),
    "instruction": Instruction(),
}


def read(settings: Settings, dataset: str, reader: Callable[..., Reading] | None = None) -> Reading:
    """What a run of these settings reads of a data set. reader: None: `documents.read`. Raises UserError as that."""
    kind = TASKS[settings.task]
    how = dataset, kind.template(settings), columns.roles_of(settings.columns)
    return (reader or documents.read)(*how, turns=kind.reads_turns)


def tokenizer_of(settings: Settings) -> PreTrainedTokenizerBase:
    """A run's tokenizer, with the chat template that it writes conversations by. Raises UserError for one it lacks."""
    return TASKS[settings.task].tokenizer(settings, encoding.load_tokenizer(spec.tokenizer_name(settings)))


def encoder_of(
    settings: Settings,
    tokenizer: PreTrainedTokenizerBase,
    class_names: tuple[str, ...] = (),
    demonstrations: tuple[Document, ...] = (),
) -> Encoder:
    """How documents of a run become tokens, in training, scores and use alike; nothing is cached."""
    return Encoder(
        tokenizer,
        settings.block_size,
        words=TASKS[settings.task].words(settings, class_names),
        is_masked=prompts.is_masked(settings.template),
        demonstrations=demonstrations,
        loss_on=settings.loss_on,
        packing=settings.packing,
    )
