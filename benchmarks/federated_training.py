"""What a federation learns for its bytes: settings of zeroth order, subspaces, first order and LoRA on private text.

python -m benchmarks.federated_training base     --out FOLDER [--size 1M|20M]    pretrain on the public text
python -m benchmarks.federated_training run      --out FOLDER [--size ...] --arms NAME ... [--seeds 1 2 3]
python -m benchmarks.federated_training settings --out FOLDER [--seeds 1 2 3]    clients, seeds, local steps, partition
python -m benchmarks.federated_training bits     --out FOLDER [--seeds 1 2 3]
python -m benchmarks.federated_training sst2     --out FOLDER --encoder FOLDER [--seeds 1 2 3]
python -m benchmarks.federated_training report   --out FOLDER                    tables, and FOLDER/bytes-SIZE.png

Public text: dclm-web; private: pubmedqa, dealt to the clients; both below the folder that ZOFED_REAL_DATA names. A run
is an ordinary federated run (zofed.federated.local_grid.LocalGrid: all clients in this process) whose folder is kept:
one that is finished is not run again. Bytes are those of Flower's messages and objects, of one client, up and down.
Rule for the rate, the same for every arm: of a grid of ratio 3, the one with the lowest held-out loss of seed 0; the
seeds reported are others.
"""

import argparse
import contextlib
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from zofed import config
from zofed.base.errors import UserError
from zofed.core import directions, metrics
from zofed.data import documents, encoding
from zofed.federated import client, messages, server, wire
from zofed.federated.local_grid import LocalGrid
from zofed.runs.run_folder import RunFolder
from zofed.runs.tables import read_table
from zofed.training import central
from zofed.training.process import prepare_process
from zofed.training.task import Task

Values = dict[str, Any]
Curve = list[tuple[float, float]]  # (bytes of one client so far, held-out loss)

CLIENTS = 4
SHAPES: dict[str, Values] = {
    "1M": {"n_embd": 128, "n_layer": 4, "n_head": 4, "vocab_size": 2048},
    "20M": {"n_embd": 256, "n_layer": 6, "n_head": 4},
}
PRETRAINED: dict[str, Values] = {
    "1M": {"steps": 1500, "optimizer": "adamw", "learning-rate": 2e-3, "batch-size": 8},
    "20M": {"steps": 300, "optimizer": "adamw", "learning-rate": 1e-3, "batch-size": 8},
}
FIRST_ORDER: Values = {"mode": "fo", "local-steps": 8, "batch-size": 4}
SUBSPACE: Values = {"mode": "subspace", "optimizer": "adamw", "subspace-interval": 8, "batch-size": 4}
# name: first rate, how many times as many rounds as first order, settings
ARMS: dict[str, tuple[float, float, Values]] = {
    "FedAvg": (0.3, 1, FIRST_ORDER),
    "FedAdam": (1e-3, 1, FIRST_ORDER | {"optimizer": "adamw", "local-learning-rate": 0.1}),
    "zo, 16 local steps": (
        0.01,
        2,
        {"mode": "zo", "queries": 16, "local-steps": 16, "batch-size": 4, "quantization-bits": 6},
    ),
    "instruct, server's guide": (
        0.1,
        4,
        {"mode": "instruct", "bp-interval": 2, "queries": 16, "gradient-source": "server", "optimizer": "sgd"},
    ),
    "instruct, clients' guide": (0.1, 4, {"mode": "instruct", "bp-interval": 2, "queries": 16, "optimizer": "sgd"}),
}
for count in (256, 1024, 4096, 16384):
    for width in (6, 18):
        ARMS[f"subspace core {count}, {width} bits"] = (
            3e-3,
            3,
            SUBSPACE | {"subspace-size": count, "quantization-bits": width},
        )
for count in (256, 1024):
    ARMS[f"subspace diagonal {count}, 6 bits"] = (
        3e-3,
        3,
        SUBSPACE | {"subspace-size": count, "subspace-variant": "diagonal", "quantization-bits": 6},
    )
ARMS["subspace core 1024, 6 bits, forward passes only"] = (
    1e-3,
    4,
    SUBSPACE | {"subspace-size": 1024, "quantization-bits": 6, "queries": 16, "forward-only": True},
)
LORA = ("LoRA, FedAvg, rank 1", "LoRA, FedAvg, rank 4")
FERRET = {f"Ferret's way, {count} coefficients": count for count in (1024, 4096, 16384)}
ROUNDS = {"1M": 12, "20M": 6}


def _real(name: str) -> Path:
    folder = os.environ.get("ZOFED_REAL_DATA", "")
    if not folder:
        sys.exit("Set the environment variable ZOFED_REAL_DATA to the folder that holds dclm-web and pubmedqa.")
    return Path(folder) / name


PUBLIC, PRIVATE = "dclm-web/pages.jsonl", "pubmedqa/pqal.json"


def base(out: Path, size: str) -> Path:
    """A model pretrained on the public text, made once."""
    folder = out / f"base-{size}"
    if (folder / "model").is_dir():
        return folder / "model"
    start = out / f"start-{size}"
    if size == "1M":
        _small_model(start)
    values = {"mode": "fo", "dataset": str(_real(PUBLIC)), "block-size": 64, "eval-interval": 100, "device": "cpu"}
    values |= {"model": str(start) if size == "1M" else size, "save-interval": 0} | PRETRAINED[size]
    summary = central.train(config.resolve(values), folder, lambda row: None)
    print(f"{size} pretrained on the public text: {summary['eval_loss_start']:.3f} -> {summary['eval_loss_end']:.3f}")
    return folder / "model"


def _small_model(folder: Path) -> None:
    """A model of 1.1M parameters with a tokenizer of its own, random weights."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers import models as kinds
    from transformers import PreTrainedTokenizerFast

    texts = [document.text for document in documents.load_documents(str(_real(PUBLIC)))]
    tokenizer = Tokenizer(kinds.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=2048, special_tokens=["<|end|>"], initial_alphabet=alphabet)
    )
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(n_positions=64, **SHAPES["1M"])).save_pretrained(folder)
    end = dict.fromkeys(("bos_token", "eos_token", "pad_token"), "<|end|>")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **end).save_pretrained(folder)


def federate(values: Values, folder: Path, clients: int, modes: Sequence[str] = ()) -> dict[str, Any]:
    """A federated run in this process, or its summary where it is finished already."""
    if (folder / "summary.json").exists() and RunFolder(folder).summary().get("status") == "completed":
        return RunFolder(folder).summary()
    client.forget()
    settings = config.resolve(values | {"out": str(folder), "clients": clients})
    grid = LocalGrid(client.app, clients, settings.model_dump(by_alias=True))
    for context, mode in zip(grid._contexts.values(), modes, strict=False):
        context.node_config["mode"] = mode
    print_, began = sys.stdout, time.monotonic()
    try:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, the rounds' lines
        summary = server.run(grid, settings, "")
    finally:
        sys.stdout = print_
    print(f"  {folder.parent.name}/{folder.name}: {summary['eval_loss_end']:.4f}, {time.monotonic() - began:.0f} s")
    return summary


def _values(out: Path, size: str, arm: str, rate: float, seed: int) -> Values:
    _, longer, own = ARMS[arm]
    rounds = round(ROUNDS[size] * longer)
    values = {
        "model": str(base(out, size)),
        "dataset": str(_real(PRIVATE)),
        "block-size": 64,
        "seed": seed,
        "rounds": rounds,
        "learning-rate": rate,
        "eval-interval": 1,
        "eval-examples": 128 if size == "1M" else 48,
        "save-interval": 1000,
        "weight-check-interval": 0,
        "device": "cpu",
    }
    if own.get("gradient-source") == "server":
        values["bp-dataset"] = str(_real(PUBLIC))
    return values | {key: value for key, value in own.items() if key != "forward-only"}


def run(out: Path, size: str, arm: str, seeds: Iterable[int]) -> None:
    """Choose the rate of an arm with seed 0, then run the other seeds."""
    first = ARMS[arm][0]
    modes = ["zo"] * CLIENTS if ARMS[arm][2].get("forward-only") else ()
    losses: dict[int, float] = {}

    def loss(power: int) -> float:
        if power not in losses:
            rate = first * 3.0**power
            folder = _folder(out, size, arm) / f"{rate:.3g}-0"
            try:
                losses[power] = federate(_values(out, size, arm, rate, 0), folder, CLIENTS, modes)["eval_loss_end"]
            except UserError as error:
                print(f"  {arm} {rate:.3g}: {error}")
                losses[power] = float("inf")
        return losses[power]

    rate = first * 3.0 ** _best_power(loss)
    _note_rate(out, size, arm, rate)
    for seed in seeds:
        federate(_values(out, size, arm, rate, seed), _folder(out, size, arm) / f"{rate:.3g}-{seed}", CLIENTS, modes)


def _best_power(loss: Callable[[int], float]) -> int:
    """The power of three of the first rate with the lowest loss, walked to from 0 or 1; no further than 4."""
    best = min((0, 1), key=loss)
    while abs(best) < 4 and (better := min((best - 1, best, best + 1), key=loss)) != best:
        best = better
    return best


def _note_rate(out: Path, size: str, arm: str, rate: float) -> None:
    with (out / f"rates-{size}.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"arm": arm, "rate": rate}) + "\n")


def _folder(out: Path, size: str, arm: str) -> Path:
    return out / size / arm.translate(str.maketrans(" ,'", "___"))


def lora(out: Path, size: str, arm: str, seeds: Iterable[int]) -> None:
    """FedAvg on LoRA matrices (Hu et al., 2022), AdamW locally, the usual way: all they hold travels both ways.

    Written here, not a mode of zofed. Bytes: float32 entries up and down, with an empty message's own.
    """
    from peft import LoraConfig, get_peft_model

    rank = int(arm.rsplit(" ", 1)[1])
    overhead = messages.size(messages.pack(wire.Final(0, "", b"")))

    def one(rate: float, seed: int) -> list[tuple[int, float]]:
        name = _folder(out, size, arm) / f"{rate:.3g}-{seed}.json"
        if name.exists():
            return [tuple(row) for row in json.loads(name.read_text())]
        settings = config.resolve(
            _values(out, size, "FedAvg", 0.1, seed) | {"eval-examples": 128 if size == "1M" else 48}
        )
        prepare_process(1)
        task = Task.load(settings)
        torch.manual_seed(seed)
        model: Any = task.replica().model
        wrapped: Any = get_peft_model(
            model,
            LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True),
        )
        trained = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
        shares = [task.shard(index, CLIENTS) for index in range(CLIENTS)]
        cost, curve = 0, [(0, task.evaluate(wrapped).whole.loss)]
        each = 2 * (4 * sum(parameter.numel() for parameter in trained) + overhead)
        for round_ in range(1, ROUNDS[size] * 2 + 1):
            start = [parameter.detach().clone() for parameter in trained]
            total = [torch.zeros_like(parameter) for parameter in trained]
            for index, share in enumerate(shares):
                with torch.no_grad():
                    for parameter, value in zip(trained, start, strict=True):
                        parameter.copy_(value)
                optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
                drawn = encoding.batch(share, seed=seed, client=index, step=round_, batch_size=32)
                for local in range(8):
                    batch = {key: value[local * 4 : local * 4 + 4] for key, value in drawn.items()}
                    optimizer.zero_grad()
                    metrics.loss_of(wrapped, batch, "weights").backward()
                    optimizer.step()
                for sum_, parameter in zip(total, trained, strict=True):
                    sum_.add_(parameter.detach() / CLIENTS)
            with torch.no_grad():
                for parameter, value in zip(trained, total, strict=True):
                    parameter.copy_(value)
            cost += each
            curve.append((cost, task.evaluate(wrapped).whole.loss))
        name.parent.mkdir(parents=True, exist_ok=True)
        name.write_text(json.dumps(curve))
        print(f"  {arm} rate {rate:.3g} seed {seed}: {curve[-1][1]:.4f}")
        return curve

    found = {rate: one(rate, 0)[-1][1] for rate in (1e-3, 3e-3, 1e-2)}
    rate = min(found, key=lambda key: found[key])
    _note_rate(out, size, arm, rate)
    for seed in seeds:
        one(rate, seed)


def ferret(out: Path, size: str, arm: str, seeds: Iterable[int]) -> None:
    """FedAvg whose updates travel as their products with random vectors (Shu et al., "Ferret", arXiv 2409.06277).

    As their code has it: blocks of consecutive tensors, of which each gets coefficients in proportion to the norm of
    its part of the update, at least two; vectors with uniform entries, from a seed; plain SGD locally, here at the rate
    chosen for FedAvg. Not as there: the seeds are new in every round, and the sum of coefficient * vector is scaled to
    the least square error instead of being unbiased, which at so few coefficients would need a server's rate of a
    thousandth. That server's rate is what is chosen. Bytes: bfloat16 coefficients (they travel rounded), two bytes a
    block for its number, a seed down, with an empty message's own.
    """
    count, rounds = FERRET[arm], ROUNDS[size] * 3
    overhead = messages.size(messages.pack(wire.Final(0, "", b"")))
    rates = {row["arm"]: row["rate"] for row in map(json.loads, (out / f"rates-{size}.jsonl").open())}

    def one(rate: float, seed: int) -> Curve:
        name = _folder(out, size, arm) / f"{rate:.3g}-{seed}.json"
        if name.exists():
            return [tuple(row) for row in json.loads(name.read_text())]
        prepare_process(1)
        task = Task.load(config.resolve(_values(out, size, "FedAvg", 0.1, seed)))
        model = task.replica().model
        shares = [task.shard(index, CLIENTS) for index in range(CLIENTS)]
        blocks = _blocks(list(model.parameters()))
        cost, curve = 0.0, [(0.0, task.evaluate(model).whole.loss)]
        for round_ in range(1, rounds + 1):
            start = [_flat(block) for block in blocks]
            updates: list[list[Tensor]] = []  # by client, by block
            for index, share in enumerate(shares):
                drawn = encoding.batch(share, seed=seed, client=index, step=round_, batch_size=32)
                _descend(model, drawn, rates["FedAvg"])
                updates.append([before - _flat(block) for before, block in zip(start, blocks, strict=True)])
                for before, block in zip(start, blocks, strict=True):
                    _write(block, before)
            norms = torch.tensor([[float(part.norm()) for part in own] for own in updates])
            counts = (count * norms / norms.sum(1, keepdim=True)).long().clamp_(min=2)  # (clients, blocks)
            for at, (before, block) in enumerate(zip(start, blocks, strict=True)):
                own = torch.stack([update[at] for update in updates])
                drawn_from = directions.derive_seed("ferret", seed, round_, at)
                _write(block, before - rate * _projected(own, counts[:, at], drawn_from))
            up = float(counts.sum(1).double().mean())
            cost += 2 * (up + int(counts.amax(0).sum())) + 4 * len(blocks) + 8 + 2 * overhead
            curve.append((cost, task.evaluate(model).whole.loss))
        name.parent.mkdir(parents=True, exist_ok=True)
        name.write_text(json.dumps(curve))
        print(f"  {arm} rate {rate:.3g} seed {seed}: {curve[-1][1]:.4f}", flush=True)
        return curve

    def loss(power: int) -> float:
        found = one(3.0**power, 0)[-1][1]
        return found if math.isfinite(found) else math.inf

    rate = 3.0 ** _best_power(loss)
    _note_rate(out, size, arm, rate)
    for seed in seeds:
        one(rate, seed)


def _blocks(parameters: Sequence[Tensor]) -> list[list[Tensor]]:
    """Consecutive tensors together, as long as they hold less than 0.9 of the median tensor's entries."""
    limit = 0.9 * statistics.median(parameter.numel() for parameter in parameters)
    blocks: list[list[Tensor]] = []
    for parameter in parameters:
        if blocks and sum(one.numel() for one in blocks[-1]) + parameter.numel() <= limit:
            blocks[-1].append(parameter)
        else:
            blocks.append([parameter])
    return blocks


def _flat(block: Sequence[Tensor]) -> Tensor:
    """The block's entries in one new tensor."""
    return torch.cat([parameter.detach().flatten() for parameter in block])


@torch.no_grad()
def _write(block: Sequence[Tensor], flat: Tensor) -> None:
    parts = flat.split([parameter.numel() for parameter in block])
    for parameter, part in zip(block, parts, strict=True):
        parameter.copy_(part.view_as(parameter))


def _descend(model: Any, drawn: encoding.Examples, rate: float) -> None:
    """Eight steps of SGD, on four of the examples each."""
    trained = list(model.parameters())
    optimizer = torch.optim.SGD(trained, lr=rate)
    for parameter in trained:
        parameter.requires_grad_()
    for local in range(8):
        optimizer.zero_grad()
        batch = {key: value[local * 4 : local * 4 + 4] for key, value in drawn.items()}
        metrics.loss_of(model, batch, "weights").backward()
        optimizer.step()


def _projected(updates: Tensor, counts: Tensor, seed: int) -> Tensor:
    """Mean over clients of what their coefficients tell of a block's updates, (clients, entries) -> (entries,).

    counts: of each client's coefficients, int64 (clients,); they belong to the first of the vectors that `seed` draws.
    """
    entries, total = updates.shape[1], torch.zeros(updates.shape[1])
    generator = torch.Generator().manual_seed(seed % 2**63)
    at_once = max(1, 2**22 // entries)
    for first in range(0, int(counts.max()), at_once):
        index = torch.arange(first, min(first + at_once, int(counts.max())))
        vectors = torch.rand(len(index), entries, generator=generator).sub_(0.5).mul_(math.sqrt(12.0))  # variance 1
        sent = (updates @ vectors.T).mul_(index < counts[:, None]).div_(counts[:, None] + entries).bfloat16()
        total += sent.float().mean(0).bfloat16().float() @ vectors
    return total


def curve_of(folder: Path) -> list[tuple[float, float]]:
    """(bytes of one client up and down so far, held-out loss) at every evaluation of a run."""
    if folder.suffix == ".json":
        return [(float(cost), loss) for cost, loss in json.loads(folder.read_text())]
    start = float(read_table(folder / "metrics.csv")[0]["eval_loss"])
    total, curve = 0.0, [(0.0, start)]
    for row in read_table(folder / "rounds.csv"):
        total += (int(row["bytes_up"]) + int(row["bytes_down"])) / CLIENTS
        if row["eval_loss"]:
            curve.append((total, float(row["eval_loss"])))
    return curve


def reached(curve: Sequence[tuple[float, float]], loss: float) -> float | None:
    """Bytes after which a curve is at or below a loss."""
    return next((cost for cost, value in curve if value <= loss), None)


def _curves(out: Path, size: str, arm: str, rate: float) -> dict[int, Curve]:
    """The curves of an arm by seed: those reported, or that of the seed that chose the rate where there are none."""
    found = {}
    for path in sorted(_folder(out, size, arm).glob(f"{rate:.3g}-*")):
        with contextlib.suppress(UserError, OSError, IndexError, KeyError, ValueError):
            found[int(path.name.removesuffix(".json").rsplit("-", 1)[1])] = curve_of(path)
    return {seed: curve for seed, curve in found.items() if seed} or found


def report(out: Path) -> None:
    """Tables of final losses and of bytes to the losses of first order with the same seed, and a picture."""
    for size in SHAPES:
        path = out / f"rates-{size}.jsonl"
        if not path.exists():
            continue
        rates = {row["arm"]: row["rate"] for row in map(json.loads, path.read_text().splitlines())}
        curves = {arm: _curves(out, size, arm, rate) for arm, rate in rates.items()}
        first = _curves(out, size, "FedAvg", rates["FedAvg"]) | {
            seed: curve
            for curve_path in _folder(out, size, "FedAvg").glob(f"{rates['FedAvg']:.3g}-0")
            for seed, curve in {0: curve_of(curve_path)}.items()
        }
        rounds = (1, 2, 4)
        heads = "".join(f" KB to FedAvg's loss of round {at} |" for at in rounds)
        print(f"\n{size}\n\n| arm | rate | seeds | start | final loss | KB a client, up and down |{heads}")
        print("| --- | --- | --- | --- | --- | --- |" + " --- |" * len(rounds))
        for arm, some in curves.items():
            if not some:
                continue
            ends = [curve[-1][1] for curve in some.values()]
            spread = f" ± {statistics.stdev(ends):.3f}" if len(ends) > 1 else ""
            cells = ""
            for at in rounds:
                known = {seed: curve for seed, curve in some.items() if len(first.get(seed, ())) > at}
                pairs = [(reached(curve, first[seed][at][1]), first[seed][at][0]) for seed, curve in known.items()]
                if not pairs or any(mine is None for mine, _ in pairs):
                    cells += " not reached |"
                    continue
                mine = statistics.fmean(cost for cost, _ in pairs if cost is not None)
                fewer = statistics.fmean(theirs / cost for cost, theirs in pairs if cost)
                cells += f" {mine / 1e3:,.1f} ({fewer:.0f} times fewer) |"
            starts = statistics.fmean(curve[0][1] for curve in some.values())
            cost = statistics.fmean(curve[-1][0] for curve in some.values()) / 1e3
            print(
                f"| {arm} | {rates[arm]:.3g} | {len(some)} | {starts:.3f} | {statistics.fmean(ends):.3f}{spread} | "
                f"{cost:,.1f} |{cells}"
            )
        _draw({arm: list(some.values()) for arm, some in curves.items()}, out / f"bytes-{size}.png", size)


def _draw(curves: dict[str, list[list[tuple[float, float]]]], path: Path, size: str) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 6))
    styles = ("-", "--", "-.", ":")
    for index, (arm, some) in enumerate(curves.items()):
        color = plt.get_cmap("cividis")(index / max(1, len(curves) - 1))
        for at, curve in enumerate(some):
            points = [(cost / 1e3, loss) for cost, loss in curve if cost]
            axes.plot(*zip(*points, strict=True), color=color, ls=styles[index % 4], lw=1.2, marker="os^vD"[index % 5],
                      ms=3, label=arm if at == 0 else None)  # fmt: skip
    axes.set_xscale("log")
    axes.set(xlabel="KB of one client, up and down, all of Flower's messages", ylabel="held-out loss, nats")
    axes.set_title(f"{size} parameters, pretrained on public text, then 4 clients with private text")
    axes.legend(fontsize=7)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def settings(out: Path, seeds: Sequence[int]) -> None:
    """Distinct or shared seeds, clients, partition and local steps, at equal forward passes of a client."""
    print("| clients | partition | seeds | local steps | rounds | rate | held-out loss | KB a client |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    steps = 48
    for clients in (2, 8, 32):
        for partition in ("iid", "dirichlet"):
            for kind, local in (("distinct", 1), ("shared", 1), ("distinct", 4), ("distinct", 16)):
                found = {}
                for rate in (0.01, 0.03) if clients == 8 else (0.03,):
                    ends, costs = [], []
                    for seed in seeds:
                        values = {
                            "dataset": "sample-dclm", "partition": partition, "dirichlet-alpha": 0.1,
                            "direction-seeds": kind, "local-steps": local, "rounds": steps // local, "queries": 16,
                            "batch-size": 4, "block-size": 64, "learning-rate": rate, "seed": seed,
                            "eval-interval": 1000, "eval-examples": 256, "save-interval": 0,
                            "weight-check-interval": 0, "device": "cpu",
                        }  # fmt: skip
                        name = f"{clients}-{partition}-{kind}-{local}"
                        summary = federate(values, out / "settings" / name / f"{rate:g}-{seed}", clients)
                        ends.append(summary["eval_loss_end"])
                        costs.append(summary["bytes"] / clients)
                    found[rate] = (statistics.fmean(ends), statistics.stdev(ends), statistics.fmean(costs))
                rate = min(found, key=lambda key: found[key][0])
                mean, spread, cost = found[rate]
                print(
                    f"| {clients} | {partition} | {kind} | {local} | {steps // local} | {rate:g} | {mean:.3f} ± "
                    f"{spread:.3f} | {cost / 1e3:.1f} |",
                    flush=True,
                )


def bits(out: Path, seeds: Sequence[int]) -> None:
    """Bits of a slope or coefficient against the loss."""
    print("| mode | bits | held-out loss | payload up, bytes a round | payload down |\n| --- | --- | --- | --- | --- |")
    for mode, own in (
        ("zo", {"rounds": 100, "queries": 16, "learning-rate": 0.03}),
        ("subspace", {"rounds": 20, "optimizer": "adamw", "subspace-interval": 8, "subspace-size": 1024}),
    ):
        for count in (18, 10, 6, 4, 3):
            done = [
                federate(
                    {
                        "dataset": "sample-dclm",
                        "mode": mode,
                        "quantization-bits": count,
                        "seed": seed,
                        "device": "cpu",
                        "eval-interval": 1000,
                        "eval-examples": 256,
                        "save-interval": 0,
                        "weight-check-interval": 0,
                        **own,
                    },
                    out / "bits" / f"{mode}-{count}" / str(seed),
                    4,
                )
                for seed in seeds
            ]
            ends = [summary["eval_loss_end"] for summary in done]
            print(
                f"| {mode} | {count} | {statistics.fmean(ends):.3f} ± {statistics.stdev(ends):.3f} | "
                f"{done[0]['payload_up_per_client_round']:.0f} | {done[0]['payload_down_per_client_round']:.0f} |",
                flush=True,
            )


SST2: dict[str, Values] = {
    "FedAvg, 8 local steps": {"mode": "fo", "local-steps": 8, "rounds": 60, "learning-rate": 0.3},
    "zo, shared seeds, 8 queries": {
        "direction-seeds": "shared", "queries": 8, "rounds": 1000, "learning-rate": 0.01, "quantization-bits": 6,
    },
    "zo, distinct seeds, 4 queries, 8 local steps": {
        "queries": 4, "local-steps": 8, "rounds": 300, "learning-rate": 0.01, "quantization-bits": 6,
    },
    "subspace core 64": {
        "mode": "subspace", "subspace-size": 64, "subspace-interval": 8, "optimizer": "adamw", "rounds": 150,
        "learning-rate": 0.03, "quantization-bits": 6,
    },
}  # fmt: skip


def sst2(out: Path, encoder: Path, seeds: Sequence[int]) -> None:
    """Accuracy on dev by bytes: a classifier's head on a frozen encoder, 8 clients with unlike shares of the labels."""
    import matplotlib.pyplot as plt

    clients = 8
    figure, axes = plt.subplots(figsize=(8, 5))
    print("| way | rounds | dev accuracy, % | KB a client, up and down | KB to 78 % |\n| --- | --- | --- | --- | --- |")
    for index, (name, own) in enumerate(SST2.items()):
        ends, costs, goals = [], [], []
        for seed in seeds:
            values: Values = {
                "task": "classification", "model": str(encoder), "freeze-encoder": True, "block-size": 128,
                "dataset": str(_real("sst2") / "train.tsv"), "eval-dataset": str(_real("sst2") / "dev.tsv"),
                "eval-examples": 1000, "batch-size": 32, "partition": "dirichlet", "dirichlet-alpha": 0.5,
                "seed": seed, "eval-interval": max(1, own["rounds"] // 50), "save-interval": 0,
                "weight-check-interval": 0, "device": "cpu",
            }  # fmt: skip
            folder = out / "sst2" / name.translate(str.maketrans(" ,", "__")) / str(seed)
            federate(values | own, folder, clients)
            sums, curve = 0.0, []
            scores = {int(row["step"]): float(row["accuracy"]) for row in read_table(folder / "evaluations.csv")}
            for row in read_table(folder / "rounds.csv"):
                sums += (int(row["bytes_up"]) + int(row["bytes_down"])) / clients / 1000
                if int(row["round"]) in scores:
                    curve.append((sums, 100 * scores[int(row["round"])]))
            ends.append(curve[-1][1])
            costs.append(sums)
            goals.append(next((cost for cost, score in curve if score >= 78), None))
            axes.plot(*zip(*curve, strict=True), color=plt.get_cmap("cividis")(index / len(SST2)),
                      ls=("-", "--", "-.", ":")[index], label=name if seed == seeds[0] else None)  # fmt: skip
        reached = [goal for goal in goals if goal is not None]
        told = f"{statistics.fmean(reached):,.0f} ({len(reached)} of {len(goals)} seeds)" if reached else "not reached"
        print(
            f"| {name} | {own['rounds']} | {statistics.fmean(ends):.1f} ± {statistics.stdev(ends):.1f} | "
            f"{statistics.fmean(costs):,.0f} | {told} |",
            flush=True,
        )
    axes.set_xscale("log")
    axes.set(xlabel="KB of one client, up and down, all of Flower's messages", ylabel="dev accuracy, %")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(out / "sst2.png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.federated_training", description=__doc__)
    parser.add_argument("what", choices=("base", "run", "settings", "bits", "sst2", "report"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--encoder", type=Path, help="folder of MiniLM, for sst2")
    parser.add_argument("--size", choices=SHAPES, default="1M")
    parser.add_argument("--arms", nargs="+", choices=[*ARMS, *LORA, *FERRET], default=[*ARMS, *LORA, *FERRET])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    given = parser.parse_args()
    out = given.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    if given.what == "base":
        base(out, given.size)
    elif given.what == "run":
        for arm in given.arms:
            print(arm, flush=True)
            (lora if arm in LORA else ferret if arm in FERRET else run)(out, given.size, arm, given.seeds)
    elif given.what == "report":
        report(out)
    elif given.what == "sst2":
        sst2(out, given.encoder, given.seeds)
    else:
        (settings if given.what == "settings" else bits)(out, given.seeds)


if __name__ == "__main__":
    main()
