"""A table over all types of causal and classifier models: batched, one by one, another scope needed, or refused."""

import json
import multiprocessing
import re
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers.processors import TemplateProcessing

from benchmarks import tiny_models
from benchmarks.tiny_models import END, EXAMPLES, TOKENS, examples
from zofed import config
from zofed.base.errors import UserError
from zofed.core import metrics
from zofed.core.estimators import FiniteDifference, bound_loss, scalar
from zofed.core.perturbed import Loss
from zofed.core.replica import Replica
from zofed.data import encoding
from zofed.models import scopes, spec
from zofed.training.process import prepare_process
from zofed.training.replicas import replica_of

EPSILON, QUERIES, COPIES = 0.01, 4, 8
LARGEST_ERROR = 0.01  # of a slope's size, between batched losses and those at really moved weights
LONGEST = 80  # characters of a message that the table shows
SECONDS = 180  # after which a type is given up

OUTCOMES = ("batched", "one by one", "scope needed", "refused", "not built", "wrong")


@dataclass(frozen=True, slots=True)
class Row:
    """What became of a type. error: of the slopes, as a share of their root mean square; NaN where none were measured.

    own: the outcome where every query has examples of its own. why: the message, where it was not `batched`.
    """

    task: str
    kind: str
    architecture: str
    outcome: str
    own: str
    error: float
    scope: str
    why: str


def measure(task: str, kind: str) -> Row:
    """One row, by the way of any run: from a saved folder to the slopes of one step."""
    try:
        built = tiny_models.build(task, kind)
    except Exception as error:
        return Row(task, kind, "", "not built", "", torch.nan, "", _line(error))
    name = type(built).__name__
    tokenizer = encoding.load_tokenizer("shipped")
    if task == "classifier":  # ends documents as the examples do; encoder-decoders read a document's class there
        tokenizer.eos_token = end = tokenizer.convert_ids_to_tokens(END)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"$A {end}", special_tokens=[(end, END)])
    with tempfile.TemporaryDirectory() as folder:
        built.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        chosen = {"model": folder, "task": "classification" if task == "classifier" else "language-model"}
        try:
            settings = config.resolve(
                chosen | {"block-size": TOKENS, "queries": QUERIES, "device": "cpu", "directions": "rank1"}
            )
            model = spec.create_model(settings, tokenizer, 2 if task == "classifier" else 0)
            scope, why = "full", ""
            try:
                outcome, error, why = _outcome(replica_of(settings, model), model, task, False)
            except UserError as refusal:
                remedy = re.search(r"set scope \(trainable, in a script\) to '(.*)'$", str(refusal))
                if not remedy:
                    raise
                scope, why = remedy[1], str(refusal)
                settings = settings.model_copy(update={"scope": scope})
                followed, error, _ = _outcome(replica_of(settings, model), model, task, False)
                outcome = {"batched": "scope needed"}.get(followed, followed)
            own, _, _ = _outcome(replica_of(settings, model), model, task, True)
        except UserError as refusal:
            return Row(task, kind, name, "refused", "", torch.nan, "", str(refusal).replace(folder, "FOLDER"))
    return Row(task, kind, name, outcome, own, error, scope, why)


def _outcome(replica: Replica, model: Any, task: str, is_own: bool) -> tuple[str, float, str]:
    """How the losses of a step were measured, how far its slopes are from those of moved weights, what was said."""
    batch = examples(task, QUERIES * EXAMPLES if is_own else EXAMPLES)
    if is_own:
        batch = {name: tensor.unflatten(0, (QUERIES, EXAMPLES)) for name, tensor in batch.items()}
    loss, own = loss_of(model, batch, is_own)
    with torch.no_grad():
        first, second = (scalar(bound_loss(loss, own, 0)()) for _ in range(2))
    if not torch.equal(first, second):
        return "refused", torch.nan, f"the loss is random: {float(first)}, then {float(second)}"
    seeds = list(range(1, QUERIES + 1))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = replica.measure.slopes(loss, seeds, EPSILON, COPIES, examples=own).slopes
    told = [str(one.message) for one in said if "the loss cannot run" in str(one.message)]
    how = FiniteDifference(replica.kind, EPSILON, "two-point", COPIES, replica.sizes)
    moved = how.slopes(loss, replica.parameters, seeds, own, batched=False).slopes
    difference = torch.tensor(found) - torch.tensor(moved)
    error = float(difference.square().mean().sqrt() / torch.tensor(moved).square().mean().sqrt())
    outcome = "one by one" if told else "batched"
    return (outcome if error < LARGEST_ERROR else "wrong"), error, told[0] if told else ""


def loss_of(model: Any, batch: encoding.Examples, is_own: bool) -> tuple[Loss, encoding.Examples | None]:
    """The loss of a run's step, and each query's own examples where it has some."""
    if is_own:
        return lambda own: metrics.loss_of(model, own), batch
    return lambda: metrics.loss_of(model, batch), None


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300]


def report(out: Path, only: list[str]) -> None:
    """Measure every type that `out`/rows.jsonl does not hold yet, each in a process of its own; print the table."""
    out.mkdir(parents=True, exist_ok=True)
    file = out / "rows.jsonl"
    prepare_process(1)
    known = {(row.task, row.kind) for row in read(file)}
    for task in tiny_models.TYPES:
        for kind in tiny_models.types(task):
            if (task, kind) in known or (only and kind not in only):
                continue
            began = time.monotonic()
            row = _in_a_process(task, kind)
            with file.open("a", encoding="utf-8") as opened:
                opened.write(json.dumps(asdict(row)) + "\n")
            print(
                f"{task} {kind}: {row.outcome} ({row.own}) {row.error:.1e} {row.why[:160]} "
                f"[{time.monotonic() - began:.0f} s]",
                flush=True,
            )
    rows = list(read(file))
    lines = [*counts(rows), "", *table(rows), "", *scope_table(rows)]
    (out / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(counts(rows)))


def read(file: Path) -> Iterator[Row]:
    """The rows of a file; none where there is no file."""
    if file.is_file():
        for line in file.read_text(encoding="utf-8").splitlines():
            yield Row(**json.loads(line))


def _in_a_process(task: str, kind: str) -> Row:
    """A type in a forked process, so that none can spoil the next, for SECONDS at most."""
    forking = multiprocessing.get_context("fork")
    here, there = forking.Pipe(duplex=False)
    process = forking.Process(target=_send, args=(there, task, kind), daemon=True)
    process.start()
    there.close()
    try:
        if not here.poll(SECONDS):
            process.kill()
            return Row(task, kind, "", "wrong", "", torch.nan, "", f"no answer within {SECONDS} s")
        return here.recv()
    except EOFError:
        return Row(task, kind, "", "wrong", "", torch.nan, "", "the process died")
    finally:
        process.join()


def _send(there: Any, task: str, kind: str) -> None:
    try:
        there.send(measure(task, kind))
    except Exception as error:  # a traceback that a person would meet: counted as wrong
        there.send(Row(task, kind, "", "wrong", "", torch.nan, "", _line(error)))


def counts(rows: list[Row]) -> list[str]:
    """How many types of each task came out how."""
    lines = [f"| task | types | {' | '.join(OUTCOMES)} |", "| --- " * (2 + len(OUTCOMES)) + "|"]
    for task in tiny_models.TYPES:
        found = Counter(row.outcome for row in rows if row.task == task)
        lines.append(f"| {task} | {found.total()} | " + " | ".join(str(found[one]) for one in OUTCOMES) + " |")
    return lines


def table(rows: list[Row]) -> list[str]:
    """Markdown: a line a type."""
    lines = ["| task | type | outcome | own examples | why |", "| --- | --- | --- | --- | --- |"]
    for row in sorted(rows, key=lambda row: (row.task, row.kind)):
        why = "" if row.outcome == "batched" else row.why.replace("|", "/")[:LONGEST].rstrip()
        lines.append(f"| {row.task} | {row.kind} | {row.outcome} | {row.own} | {why} |")
    return lines


def scope_table(rows: list[Row]) -> list[str]:
    """Markdown: for every type that can be built, modules that scopes train."""
    lines = ["| task | type | head | last-0: after the blocks | reduced | norms |", "| --- " * 6 + "|"]
    for row in sorted(rows, key=lambda row: (row.task, row.kind)):
        if row.outcome != "not built":
            model = tiny_models.build(row.task, row.kind)
            head, top, reduced, norms = (_modules(model, scope) for scope in ("head", "last-0", "reduced", "norms"))
            after = [name for name in top if name not in head]
            shown = f"{_shown(head)} | {_shown(after)} | {len(reduced)} | {len(norms)}"
            lines.append(f"| {row.task} | {row.kind} | {shown} |")
    return lines


def _modules(model: Any, scope: str) -> list[str]:
    """Modules whose parameters a scope trains; none where it is refused."""
    try:
        names = scopes.trainable_names(model, scope)
    except UserError:
        return []
    return list(dict.fromkeys(name.rpartition(".")[0] for name in names))


def _shown(names: list[str]) -> str:
    """The first few of them, without the path that the others have in common with them."""
    short = list(dict.fromkeys(".".join(name.split(".")[-2:]) for name in names))
    return ", ".join(short[:3]) + (f", {len(short) - 3} more" if len(short) > 3 else "")
