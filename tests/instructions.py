"""A task of prompts and responses for tests: a document is `prompt => response`."""

from typing import ClassVar

import torch

from zofed.core.metrics import IGNORED_LABEL
from zofed.data.encoding import Document, Examples
from zofed.training.tasks import Encoder, LanguageModelling, Question


class PlainInstruction(LanguageModelling):
    """The loss on the response and the end of sequence alone, padded on the right."""

    base_name = "base"
    keeps_tokens = False
    has_one_example_a_document: ClassVar[bool] = True

    def examples(self, documents: list[Document], encoder: Encoder) -> Examples:
        """'input_ids', 'labels', 'attention_mask'."""
        rows = [self.parts(document, encoder) for document in documents]
        ids = torch.zeros(len(rows), encoder.block_size, dtype=torch.int64)
        labels, mask = torch.full_like(ids, IGNORED_LABEL), torch.zeros_like(ids)
        for row, (prompt, response) in enumerate(rows):
            whole = [*prompt, *response, encoder.tokenizer.eos_token_id][: encoder.block_size]
            ids[row, : len(whole)], mask[row, : len(whole)] = torch.tensor(whole), 1
            labels[row, len(prompt) : len(whole)] = torch.tensor(whole[len(prompt) :])
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def parts(self, document: Document, encoder: Encoder) -> tuple[list[int], list[int]]:
        """Tokens of the prompt, and of the response."""
        prompt, _, response = document.text.partition("=>")
        found = [encoder.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (f"{prompt}=>", response)]
        return found[0], found[1]

    def token_bytes(self, documents: list[Document], encoder: Encoder) -> None:
        """Not counted."""

    def baselines(self, train: Examples, held_out: Examples, vocabulary: int, classes: int) -> dict[str, float]:
        """Uniform guesses alone."""
        return {"uniform": float(torch.tensor(float(vocabulary)).log())}

    def prompts_to_answer(self, documents: list[Document], encoder: Encoder) -> list[Question]:
        """Each document's prompt."""
        return [
            Question(tuple(self.parts(document, encoder)[0]), document.text.partition("=>")[2])
            for document in documents
        ]
