"""A data set's examples, as a run of zofed reads them, for a training loop of one's own."""

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from zofed.base.errors import UserError
from zofed.data.chat_templates import with_template
from zofed.data.documents import read
from zofed.data.encoding import default_cache
from zofed.data.tokenizers import load_tokenizer
from zofed.training.tasks import TASKS, Encoder


def get_dataloader(
    dataset: str,
    tokenizer: str | PreTrainedTokenizerBase = "shipped",
    block_size: int = 64,
    batch_size: int = 4,
    seed: int = 0,
    task: str = "language-model",
) -> DataLoader[dict[str, Tensor]]:
    """A DataLoader over all examples of a data set (a name or a path), in an order of its own for each epoch.

    task: language-model, classification or instruction. Batches are dictionaries as `encoding.Examples`, of leading
    dimension `batch_size`, or less in the last one. The order is drawn from `seed` alone; no global random state is
    touched. Raises UserError for what cannot be loaded.
    """
    if batch_size < 1:
        raise UserError(f"batch size {batch_size} is below 1: use at least 1")
    if task not in TASKS:
        raise UserError(f"task {task!r} is unknown: use {' or '.join(map(repr, TASKS))}")
    reader = load_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
    kind = TASKS[task]
    found = read(dataset, turns=kind.reads_turns).documents
    if kind.reads_turns:
        reader = with_template(reader, "")
    examples = kind.examples(found, Encoder(reader, block_size, default_cache()))
    rows = [dict(zip(examples, row, strict=True)) for row in zip(*examples.values(), strict=True)]
    order = torch.Generator().manual_seed(seed)
    return DataLoader(rows, batch_size, shuffle=True, generator=order)  # type: ignore[arg-type]
