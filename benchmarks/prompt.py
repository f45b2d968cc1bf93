"""What a prompted step costs over plain passes of the same model over the same tokens, with nothing to choose among."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import common
from zofed import config
from zofed.core import candidates
from zofed.core.journal import Journal
from zofed.data import encoding
from zofed.training.process import prepare_process
from zofed.training.steps import step_function
from zofed.training.task import Task

ONE, THREE = " terrible, great", " a terrible film, a great film"  # label words of one token each, and of three
QUERIES, BATCH, BLOCK = 7, 16, 40


def report(folder: Path, threads: int, pairs: int) -> None:
    """Print a row for each kind of step and for the scores of candidates; ratios of `pairs` alternating runs."""
    print(f"| fo step | one token | a pass forward and backward | {_step(folder, threads, pairs, 'fo')} |", flush=True)
    print(f"| scores | three tokens | a pass for each candidate | {_scores(folder, threads, pairs)} |", flush=True)
    print(f"| zo step | one token | {QUERIES + 1} passes forward | {_step(folder, threads, pairs, 'zo')} |", flush=True)


def _step(folder: Path, threads: int, pairs: int, mode: str) -> str:
    with tempfile.TemporaryDirectory() as place:
        task = _task(folder, threads, mode, ONE, Path(place))
        replica, examples = task.replica(), task.shard(0, 1)
        ask = step_function(task.settings, replica, examples, 10**6)
        batch = encoding.batch(examples, batch_size=BATCH, seed=0, client=0, step=0)
        with Journal.create(Path(place) / "journal.zofed", replica.genesis) as journal:

            def ours() -> None:
                step = ask(replica.round + 1)
                replica.apply(journal.append(step.record), step.update)

            plain = _plain(replica.model, batch, QUERIES + 1 if mode == "zo" else 0)
            return common.median(common.ratios({"step": ours}, plain, pairs)["step"])


def _scores(folder: Path, threads: int, pairs: int) -> str:
    with tempfile.TemporaryDirectory() as place:
        task = _task(folder, threads, "zo", THREE, Path(place))
        model, examples = task.replica().model, task.shard(0, 1)
        batch = encoding.batch(examples, batch_size=BATCH, seed=0, client=0, step=0)

        @torch.inference_mode()
        def ours() -> None:
            candidates.scores(model, batch)

        @torch.inference_mode()
        def plain() -> None:
            for number in range(batch["candidates"].shape[1]):
                word = batch["candidates"][:, number]
                ids = torch.cat([batch["input_ids"], word[:, :-1]], 1)
                mask = torch.cat([batch["attention_mask"], torch.ones_like(word[:, :-1])], 1)
                places = (mask.cumsum(1) - 1).clamp(min=0)
                found = model(input_ids=ids, attention_mask=mask, position_ids=places, logits_to_keep=word.shape[1])
                found.logits.log_softmax(-1).gather(2, word[..., None]).mean(1)

        return common.median(common.ratios({"scores": ours}, plain, pairs)["scores"])


def _task(folder: Path, threads: int, mode: str, words: str, place: Path) -> Task:
    """A run's data and model: 64 reviews of about the lengths of SST-2, of words that every tokenizer has."""
    prepare_process(threads)
    lengths = torch.randint(8, 34, (64,), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [
        {"text": f"{number} " + " ".join(["film"] * length), "label": number % 2}
        for number, length in enumerate(lengths)
    ]
    (place / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    chosen = {"mode": mode, "queries": QUERIES, "model": str(folder), "dataset": str(place / "data.jsonl")}
    prompt = {"task": "prompt", "template": "{{ text }} It was", "label-words": words}
    sizes = {"batch-size": BATCH, "block-size": BLOCK, "learning-rate": 1e-9, "threads": threads, "device": "cpu"}
    return Task.load(config.resolve(chosen | prompt | sizes))


def _plain(model: torch.nn.Module, batch: dict[str, Tensor], passes: int) -> Callable[[], None]:
    """So many passes forward over the batch's prompts; 0: one forward and backward. Logits of the last position."""

    def forward() -> Tensor:
        ids, mask = batch["input_ids"], batch["attention_mask"]
        places = (mask.cumsum(1) - 1).clamp(min=0)
        return model(input_ids=ids, attention_mask=mask, position_ids=places, use_cache=False, logits_to_keep=1).logits

    @torch.inference_mode()
    def forwards() -> None:
        for _ in range(passes):
            forward()

    def both() -> None:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        loss = torch.nn.functional.cross_entropy(forward()[:, -1].float(), batch["labels"])
        torch.autograd.grad(loss, trained)

    return forwards if passes else both
