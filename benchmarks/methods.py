"""Which zeroth-order options pay: small GPT-2 shaped models trained at equal forward passes, rates tuned alike.

python -m benchmarks.methods --setting NAME --out FOLDER [--arms NAME ...]   run, or resume
python -m benchmarks.methods --check --out FOLDER     real finite differences against the simulation below
python -m benchmarks.methods --report --out FOLDER    markdown tables, and FOLDER/methods.png

Settings: "shift" and "shift-small" adapt a pretrained language model to other text (the small one's base is by far the
better trained for its size), "scratch" starts at random weights, "classifier" trains a pretrained trunk and a new head.

Slopes are exact directional derivatives: one backprop gives g, and the slope along z is <g, z>. A real two-point query
at a sound epsilon gives the same number at the price of two forward passes, and that price is what is charged; the
backprop is only how a CPU can afford the comparison. Gaussian estimates are drawn from their exact distribution.

Rule for the rate, the same for every arm: a grid of ratio 3, climbed until both neighbours of the best are worse, then
climbed once more in half steps (ratio 1.73), by the final loss of seed 0 on the tuning windows. Seeds 1, 2 and 3 at the
best rate are reported, on other held-out windows.
Data: the folder named by the environment variable ZOFED_REAL_DATA. Every finished run is one line of a JSON-lines file.
"""

import argparse
import itertools
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Generator, Tensor, nn
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel

Batch = tuple[Tensor, Tensor]  # input ids (n, length); targets (n, length) for a language model, (n,) for a classifier
Factors = tuple[Tensor, Tensor | None]  # +-1 float32: a (terms, rows) and b (terms, columns), or a (terms, entries)
Record = dict[str, Any]  # one line of the results: see `run`

EPSILON = 3e-4
END, PAD = "<|end|>", "<|pad|>"
SEEDS = (1, 2, 3)
SENTENCE = 48  # tokens a sentence of the classifier keeps


@dataclass(frozen=True)
class Arm:
    """One way to estimate and step.

    `rank`: terms summed per direction, 0 for dense +-1 entries, None for Gaussian ones. `scaled`: each tensor's
    direction is multiplied by a power of two near its rms, which makes slopes small and so the best rate large.
    """

    title: str
    rank: int | None = 1
    queries: int = 64
    one_sided: bool = False
    scaled: bool = False
    normalised: bool = True

    @property
    def passes(self) -> int:
        """Forward passes of one batch that a real step takes."""
        return self.queries + 1 if self.one_sided else 2 * self.queries


ARMS = {
    "two-point": Arm("1 two-point, rank1"),
    "one-sided": Arm("2 one-sided centred", queries=127, one_sided=True),
    "scaled": Arm("3 two-point, scaled by rms", scaled=True),
    "scaled-one-sided": Arm("4 scaled, one-sided centred", queries=127, one_sided=True, scaled=True),
    "plain": Arm("5 two-point, plain SGD", normalised=False),
    "gaussian": Arm("gaussian, normalised", rank=None),
    "rademacher": Arm("rademacher, normalised", rank=0),
    "rank4": Arm("sum of 4 rank1 / 2, normalised", rank=4),
    "mezo": Arm("mezo: gaussian, plain SGD", rank=None, normalised=False),
}


@dataclass(frozen=True)
class Setting:
    """Sizes of one comparison. `centre`: the first exponent of the grid, rate = 0.001 * 3^exponent."""

    title: str
    width: int
    layers: int
    heads: int
    vocabulary: int
    batch: int
    steps: int
    windows: int  # held-out windows each evaluation reads, at most
    curve_every: int
    pretrain_steps: int
    centre: float
    block: int = 64


SETTINGS: dict[str, Setting] = {
    "shift": Setting("shift: 17.4M LM, web text to PubMedQA", 384, 8, 6, 8192, 4, 100, 64, 10, 300, 2),
    "shift-small": Setting("shift-small: 1.1M LM, web text to PubMedQA", 128, 4, 4, 2048, 4, 200, 128, 10, 1000, 2),
    "scratch": Setting("scratch: 0.9M LM, tiny Shakespeare", 128, 4, 4, 1024, 4, 200, 128, 10, 0, 2),
    "classifier": Setting("classifier: 1.1M, SST-2", 128, 4, 4, 2048, 16, 150, 436, 15, 1000, 2),
}


@dataclass
class Task:
    """A start model and its data. Trained in place; `start` is what `nn.Module.load_state_dict` brings back."""

    setting: Setting
    model: nn.Module
    start: dict[str, Tensor]
    train: Batch
    tuning: Batch
    report: Batch
    classes: bool


# --- data -------------------------------------------------------------------------------------------------------------


def data_folder() -> Path:
    """The folder of ZOFED_REAL_DATA; exits with one sentence where there is none."""
    folder = os.environ.get("ZOFED_REAL_DATA", "")
    if not folder or not Path(folder).is_dir():
        sys.exit("Set the environment variable ZOFED_REAL_DATA to the folder that holds dclm-web, pubmedqa and so on.")
    return Path(folder)


def documents(name: str) -> list[str]:
    """All texts of one data set, in the order of its file. Shakespeare's documents are groups of 30 speeches."""
    folder = data_folder() / name
    if name == "dclm-web":
        return [json.loads(line)["text"] for line in (folder / "pages.jsonl").read_text("utf-8").splitlines()]
    if name == "pubmedqa":
        rows = json.loads((folder / "pqal.json").read_text("utf-8")).values()
        return ["\n".join([row["QUESTION"], *row["CONTEXTS"], row["LONG_ANSWER"]]) for row in rows]
    if name == "sst2":
        return [sentence for sentence, _ in sentences("train")]
    speeches = (folder / "input.txt").read_text("utf-8").split("\n\n")
    return ["\n\n".join(speeches[first : first + 30]) for first in range(0, len(speeches), 30)]


def sentences(split: Literal["train", "dev"]) -> list[tuple[str, int]]:
    """SST-2's rows: sentence, label (1 positive). Read without quoting, as its file has none."""
    lines = (data_folder() / "sst2" / f"{split}.tsv").read_text("utf-8").splitlines()
    rows = (line.rsplit("\t", 1) for line in lines)
    return [(sentence, int(label)) for sentence, label in rows]


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> Tokenizer:
    """Byte-level BPE of `vocabulary` entries; entry 0 ends a document, entry 1 pads."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def windows(tokenizer: Tokenizer, texts: Sequence[str], block: int) -> Batch:
    """Every window of the joined texts as (inputs, targets): int64 (tokens - block, block), views of one stream."""
    ids = [[*encoding.ids, 0] for encoding in tokenizer.encode_batch(list(texts))]
    stream = torch.tensor([token for document in ids for token in document])
    return stream[:-1].unfold(0, block, 1), stream[1:].unfold(0, block, 1)


def spaced(batch: Batch, count: int) -> Batch:
    """At most `count` examples of a batch, evenly spaced, so that windows do not overlap and all texts count."""
    chosen = torch.linspace(0, len(batch[0]) - 1, min(count, len(batch[0]))).long()
    return batch[0][chosen], batch[1][chosen]


def labelled(tokenizer: Tokenizer, rows: Sequence[tuple[str, int]]) -> Batch:
    """Sentences cut or padded on the right to SENTENCE tokens, and their labels: int64 (n, SENTENCE) and (n,)."""
    ids = [encoding.ids[:SENTENCE] for encoding in tokenizer.encode_batch([sentence for sentence, _ in rows])]
    padded = [[*row, *[1] * (SENTENCE - len(row))] for row in ids]
    return torch.tensor(padded), torch.tensor([label for _, label in rows])


def sample(batch: Batch, count: int, generator: Generator) -> Batch:
    """`count` random examples, with repetition."""
    chosen = torch.randint(0, len(batch[0]), (count,), generator=generator)
    return batch[0][chosen], batch[1][chosen]


# --- models -----------------------------------------------------------------------------------------------------------


def gpt2_config(setting: Setting) -> GPT2Config:
    """GPT-2's shape without dropout, so that every pass computes one function. Two labels are its own default."""
    return GPT2Config(
        vocab_size=setting.vocabulary,
        n_positions=setting.block,
        n_embd=setting.width,
        n_layer=setting.layers,
        n_head=setting.heads,
        activation_function="gelu_pytorch_tanh",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
    )


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy in nats over all targets of a batch: a scalar."""
    logits = model(input_ids=batch[0], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, -2), batch[1].flatten())


@torch.no_grad()
def evaluate(task: Task, held_out: Batch) -> tuple[float, float | None]:
    """Mean held-out loss in nats, and the accuracy of a classifier (None for a language model)."""
    total, right, count = 0.0, 0, 0
    for inputs, targets in zip(held_out[0].split(32), held_out[1].split(32), strict=True):
        logits = task.model(input_ids=inputs, use_cache=False).logits
        total += float(F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="sum"))
        right += int((logits.argmax(-1) == targets).sum())
        count += targets.numel()
    return total / count, right / count if task.classes else None


def pretrain(model: nn.Module, train: Batch, steps: int, say: Callable[[str], None]) -> None:
    """AdamW by backprop, batch 16, warm-up then cosine; in place."""
    generator = Generator().manual_seed(7)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(step / 30 + 0.01, 0.55 + 0.45 * math.cos(math.pi * step / steps))
    )
    for step in range(steps):
        loss = loss_of(model, sample(train, 16, generator))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            say(f"pretraining step {step}: training loss {loss.item():.3f}")


def base_model(setting: Setting, train: Batch, file: Path) -> GPT2LMHeadModel:
    """The language model a setting starts from, trained once and kept in `file`."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(gpt2_config(setting))
    if setting.pretrain_steps and not file.exists():
        pretrain(model, train, setting.pretrain_steps, lambda text: print(text, flush=True))
        torch.save(model.state_dict(), file.with_suffix(".part"))
        file.with_suffix(".part").rename(file)  # whole or not at all: an interrupted run pretrains again
    if file.exists():
        model.load_state_dict(torch.load(file))
    return model


def load_task(name: str, out: Path) -> Task:
    """Data, tokenizer and start model of one setting. Every 8th document is held out, never seen by the tokenizer."""
    setting = SETTINGS[name]
    small = ["dclm-web", "sst2"]  # one base serves two settings
    sources = {"scratch": ["tinyshakespeare"], "shift": ["dclm-web"]}.get(name, small)
    texts = [text for source in sources for text in documents(source)]
    if sources != small:
        texts = [text for index, text in enumerate(texts) if index % 8]
    tokenizer = train_tokenizer(texts, setting.vocabulary)
    file = out / f"start-{'-'.join(sources)}-{setting.width}.pt"
    model: nn.Module = base_model(setting, windows(tokenizer, texts, setting.block), file)
    if name == "classifier":
        torch.manual_seed(1)  # the head is fresh
        classifier = GPT2ForSequenceClassification(gpt2_config(setting))
        classifier.transformer.load_state_dict(model.get_submodule("transformer").state_dict())
        model, rows = classifier, sentences("dev")
        train = labelled(tokenizer, sentences("train"))
        tuning, report = labelled(tokenizer, rows[0::2]), labelled(tokenizer, rows[1::2])
    else:
        target = documents("tinyshakespeare" if name == "scratch" else "pubmedqa")
        train = windows(tokenizer, [text for index, text in enumerate(target) if index % 8], setting.block)
        tuning, report = (windows(tokenizer, target[first::16], setting.block) for first in (0, 8))
    model.eval()
    start = {key: value.clone() for key, value in model.state_dict().items()}
    held_out = [spaced(batch, setting.windows) for batch in (tuning, report)]
    return Task(setting, model, start, train, held_out[0], held_out[1], name == "classifier")


# --- estimates --------------------------------------------------------------------------------------------------------


def signs(rows: int, columns: int, generator: Generator) -> Tensor:
    """Independent +-1, one random bit an entry: float32 (rows, columns)."""
    words = torch.empty(-(-rows * columns // 64), dtype=torch.int64).random_(-(2**63), None, generator=generator)
    bits = np.unpackbits(words.numpy().view(np.uint8), count=rows * columns)
    return torch.from_numpy(bits).to(torch.float32).mul_(2).sub_(1).view(rows, columns)


def draw_factors(parameters: Sequence[Tensor], arm: Arm, generator: Generator) -> list[Factors]:
    """Fresh directions of every tensor as factors: queries * rank terms each; dense +-1 entries where rank is 0."""
    terms = arm.queries * (arm.rank or 1)
    factors: list[Factors] = []
    for parameter in parameters:
        matrix = parameter.ndim == 2 and bool(arm.rank)
        a = signs(terms, len(parameter) if matrix else parameter.numel(), generator)
        factors.append((a, signs(terms, parameter.shape[1], generator) if matrix else None))
    return factors


def exact_slopes(
    factors: Sequence[Factors], gradient: Sequence[Tensor], scales: Sequence[float], queries: int
) -> Tensor:
    """Derivative of the loss along each direction, <g, s z>: float32 (queries,)."""
    slopes = torch.zeros(len(factors[0][0]))
    for (a, b), g, scale in zip(factors, gradient, scales, strict=True):
        slopes += scale * (a @ g.flatten() if b is None else ((a @ g) * b).sum(1))
    rank = len(slopes) // queries  # a sum of r terms is divided by sqrt(r), which keeps its variance at 1
    return slopes.view(queries, rank).sum(1) / math.sqrt(rank)


def combine(factors: Sequence[Factors], coefficients: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Sum over queries of coefficient * z, one tensor for each of `like`; coefficients (queries,)."""
    rank = len(factors[0][0]) // len(coefficients)
    weights = coefficients.repeat_interleave(rank) / math.sqrt(rank)
    sums = (a.T @ weights if b is None else (a * weights[:, None]).T @ b for a, b in factors)
    return [total.view_as(tensor) for total, tensor in zip(sums, like, strict=True)]


def gaussian_estimate(gradient: Sequence[Tensor], queries: int, generator: Generator) -> tuple[Tensor, list[Tensor]]:
    """Slopes c (queries,) and sum c_k z_k for Gaussian z_k, exact in distribution, from one dense draw.

    The slopes c_k = <g, z_k> are independent N(0, |g|^2). Given them, z_k = c_k g / |g|^2 + (w_k off g) with w_k
    standard normal, so sum c_k z_k = (sum c_k^2 / |g|^2) g + |c| (w off g) with one standard normal w.
    """
    square = sum(float(g.square().sum()) for g in gradient)
    slopes = torch.randn(queries, generator=generator) * math.sqrt(square)
    noise = [torch.randn(g.shape, generator=generator) for g in gradient]
    along = sum(float((w * g).sum()) for w, g in zip(noise, gradient, strict=True)) / square
    length = float(slopes.norm())
    share = length * length / square - length * along
    return slopes, [w.mul_(length).add_(g, alpha=share) for w, g in zip(noise, gradient, strict=True)]


def tensor_scales(parameters: Sequence[Tensor]) -> list[float]:
    """The power of two nearest to (rms + 0.01) of each tensor: scaling by it rounds nothing."""
    return [2.0 ** round(math.log2(float(parameter.square().mean().sqrt()) + 0.01)) for parameter in parameters]


@torch.no_grad()
def measured_slopes(
    task: Task, batch: Batch, factors: Sequence[Factors], scales: Sequence[float], one_sided: bool, epsilon: float
) -> Tensor:
    """Finite differences with the weights really moved along each rank1 direction, restored from a copy: (queries,)."""
    parameters = list(task.model.parameters())
    kept = [parameter.clone() for parameter in parameters]

    def loss_at(query: int, signed: float) -> float:
        for parameter, saved, (a, b), scale in zip(parameters, kept, factors, scales, strict=True):
            direction = a[query] if b is None else torch.outer(a[query], b[query])
            torch.add(saved, direction, alpha=signed * scale, out=parameter.data)
        return float(loss_of(task.model, batch))

    centre = float(loss_of(task.model, batch))
    slopes = [
        (loss_at(query, epsilon) - centre) / epsilon
        if one_sided
        else (loss_at(query, epsilon) - loss_at(query, -epsilon)) / (2 * epsilon)
        for query in range(len(factors[0][0]))
    ]
    for parameter, saved in zip(parameters, kept, strict=True):
        parameter.copy_(saved)
    return torch.tensor(slopes)


# --- training ---------------------------------------------------------------------------------------------------------


def train(
    task: Task,
    arm: Arm,
    rate: float,
    seed: int,
    held_out: Batch,
    every: int,
    steps: int,
    epsilon: float | None = None,
) -> Iterator[tuple[int, float, float | None]]:
    """Train from the start model; yields (step, held-out loss, accuracy) at step 0, each `every` steps and the end.

    One seed gives every arm the same batches. With `epsilon` the slopes are measured by really moving the weights,
    along the same directions as without. Ends early, with a loss of NaN, where training has diverged.
    """
    task.model.load_state_dict(task.start)
    parameters = list(task.model.parameters())
    scales = tensor_scales([p.detach() for p in parameters]) if arm.scaled else [1.0] * len(parameters)
    data, draws = Generator().manual_seed(seed), Generator().manual_seed(1_000_000 + seed)
    first, accuracy = evaluate(task, held_out)
    yield 0, first, accuracy
    mean_square, weight = 0.0, 0.0  # running mean of the slopes' squares and the sum of its weights
    for step in range(1, steps + 1):
        batch = sample(task.train, task.setting.batch, data)
        loss = loss_of(task.model, batch)
        gradient = torch.autograd.grad(loss, parameters)
        if arm.rank is None:
            slopes, estimate = gaussian_estimate(gradient, arm.queries, draws)
            count = arm.queries
        else:
            factors = draw_factors(parameters, arm, draws)
            if epsilon is None:
                slopes = exact_slopes(factors, gradient, scales, arm.queries)
            else:
                slopes = measured_slopes(task, batch, factors, scales, arm.one_sided, epsilon)
            count = arm.queries
            if arm.one_sided:  # the common offset of one-sided slopes is curvature, not slope
                slopes, count = slopes - slopes.mean(), arm.queries - 1
            estimate = combine(factors, slopes, parameters)
        mean_square = 0.9 * mean_square + 0.1 * float(slopes.square().sum()) / count
        weight = 0.9 * weight + 0.1
        spread = math.sqrt(mean_square / weight) if arm.normalised else 1.0
        with torch.no_grad():
            for parameter, total, scale in zip(parameters, estimate, scales, strict=True):
                parameter.add_(total, alpha=-rate * scale / (count * spread))
        if not loss.item() < first + 3:  # also where it is NaN
            yield step, math.nan, None
            return
        if step % every == 0 or step == steps:
            found, accuracy = evaluate(task, held_out)
            yield step, found if found < first + 1 else math.nan, accuracy
            if not found < first + 1:
                return


def run(task: Task, setting: str, name: str, exponent: float, seed: int) -> Record:
    """One run as a record: `curve` is [forward passes, held-out loss, accuracy] rows; seed 0 tunes, the others report.

    Tuning runs are evaluated seldom: only their end decides.
    """
    arm, rate = ARMS[name], 0.001 * 3.0**exponent
    held_out, every = (task.report, task.setting.curve_every) if seed else (task.tuning, 50)
    began, curve = time.perf_counter(), []
    for step, loss, accuracy in train(task, arm, rate, seed, held_out, every, task.setting.steps):
        curve.append([step * arm.passes, None if math.isnan(loss) else round(loss, 6), accuracy])
    return {
        "setting": setting,
        "arm": name,
        "exponent": exponent,
        "rate": rate,
        "seed": seed,
        "steps": task.setting.steps,
        "diverged": curve[-1][1] is None,
        "curve": curve,
        "seconds": round(time.perf_counter() - began, 1),
    }


def results(out: Path) -> list[Record]:
    """Every finished run in the folder."""
    return [json.loads(line) for file in sorted(out.glob("runs-*.jsonl")) for line in file.read_text().splitlines()]


def end_loss(record: Record) -> float:
    """Final held-out loss; infinite where the run diverged."""
    return math.inf if record["diverged"] else record["curve"][-1][1]


def climb(loss_at: Callable[[float], float], centre: float) -> float:
    """The exponent of least loss: climbs in whole steps, then in half steps, until both neighbours are known.

    The half steps matter: where the best rate lies midway between two of the grid, ratio 3 alone costs an arm a quarter
    of its gain, as much as the options compared here bring.
    """
    losses = {centre: loss_at(centre)}
    for stride in (1.0, 0.5):
        while True:
            best = min(losses, key=lambda exponent: losses[exponent])
            missing = [neighbour for neighbour in (best - stride, best + stride) if neighbour not in losses]
            if not missing:
                break
            losses[missing[0]] = loss_at(missing[0])
    return min(losses, key=lambda exponent: losses[exponent])


def run_setting(setting: str, names: Sequence[str], out: Path) -> None:
    """All runs of the named arms that the folder lacks: seed 0 climbs the grid, seeds 1 to 3 run at the rate found."""
    task = load_task(setting, out)
    size = sum(parameter.numel() for parameter in task.model.parameters())
    print(f"{setting}: {size:,} parameters, {len(task.train[0]):,} training examples", flush=True)
    for name in names:
        finished = {(r["exponent"], r["seed"]): r for r in results(out) if (r["setting"], r["arm"]) == (setting, name)}

        def record(exponent: float, seed: int, name: str = name, finished: dict = finished) -> Record:
            if (exponent, seed) not in finished:
                finished[exponent, seed] = run(task, setting, name, exponent, seed)
                with (out / f"runs-{setting}.jsonl").open("a") as file:
                    file.write(json.dumps(finished[exponent, seed]) + "\n")
            found = finished[exponent, seed]
            line = f"{setting} {name} rate {found['rate']:.3g} seed {seed}: {found['curve'][0][1]:.4f}"
            print(f"{line} -> {end_loss(found):.4f} ({found['seconds']} s)", flush=True)
            return found

        centre = task.setting.centre + 2 * ARMS[name].scaled  # only saves climbing
        best = climb(lambda exponent, record=record: end_loss(record(exponent, 0)), centre)
        for seed in SEEDS:
            record(best, seed)


# --- check ------------------------------------------------------------------------------------------------------------


def check(out: Path) -> None:
    """Slopes by real finite differences against exact ones, and short real runs against simulated ones ("shift")."""
    task = load_task("shift", out)
    task.model.load_state_dict(task.start)
    parameters = list(task.model.parameters())
    batch = sample(task.train, task.setting.batch, Generator().manual_seed(5))
    gradient = torch.autograd.grad(loss_of(task.model, batch), parameters)
    factors = draw_factors(parameters, Arm("", queries=16), Generator().manual_seed(6))
    print("| directions | differences | epsilon | rms of exact slopes | rms error / rms slope |")
    print("| --- | --- | --- | --- | --- |")
    for title, scales in (
        ("rank1", [1.0] * len(parameters)),
        ("rank1, scaled", tensor_scales([p.detach() for p in parameters])),
    ):
        for one_sided in (False, True):
            for epsilon in (EPSILON, 10 * EPSILON):
                exact = exact_slopes(factors, gradient, scales, 16)
                found = measured_slopes(task, batch, factors, scales, one_sided, epsilon)
                if one_sided:
                    exact, found = exact - exact.mean(), found - found.mean()
                size, error = float(exact.square().mean().sqrt()), float((found - exact).square().mean().sqrt())
                way = "one-sided centred" if one_sided else "two-point"
                print(f"| {title} | {way} | {epsilon:g} | {size:.4f} | {error / size:.4f} |", flush=True)
    print("\n| 10 steps | start | real | simulated |\n| --- | --- | --- | --- |")
    for title, arm in (
        ("two-point, q = 16", Arm("", queries=16)),
        ("scaled, one-sided, q = 31", Arm("", queries=31, one_sided=True, scaled=True)),
    ):
        rate = 0.1 if arm.scaled else 0.003
        real = list(train(task, arm, rate, 1, task.report, 10, 10, EPSILON))
        simulated = list(train(task, arm, rate, 1, task.report, 10, 10))
        print(f"| {title} | {real[0][1]:.4f} | {real[-1][1]:.4f} | {simulated[-1][1]:.4f} |", flush=True)


# --- report -----------------------------------------------------------------------------------------------------------


def passes_to(curve: Sequence[Sequence[float]], target: float) -> float:
    """Forward passes at which a curve first falls to `target`, by linear interpolation; infinite where it does not."""
    for (before, high, _), (after, low, _) in itertools.pairwise(curve):
        if low <= target:
            return before + (after - before) * (high - target) / max(high - low, 1e-12)
    return math.inf


def spread_of(values: Sequence[float], digits: int) -> str:
    """Mean +- standard deviation as text."""
    deviation = statistics.stdev(values) if len(values) > 1 else math.nan
    return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"


def reported(records: Sequence[Record], setting: str) -> dict[str, dict[int, Record]]:
    """The runs at the tuned rate: arm to seed to record, in the order of ARMS; arms without any are left out."""
    found: dict[str, dict[int, Record]] = {}
    for name in ARMS:
        own = [record for record in records if (record["setting"], record["arm"]) == (setting, name)]
        tuned = min((record for record in own if record["seed"] == 0), key=end_loss, default=None)
        runs = {r["seed"]: r for r in own if r["seed"] and tuned and r["exponent"] == tuned["exponent"]}
        if runs:
            found[name] = runs
    return found


def table(records: Sequence[Record], setting: str) -> list[str]:
    """Markdown lines of one setting: losses, differences to arm 1 (same seeds, so same batches), gains over
    its mean decrease, and passes to the end loss of mezo.
    """
    arms = reported(records, setting)
    steps = max(record["steps"] for runs in arms.values() for record in runs.values())
    start = next(record["curve"][0][1] for runs in arms.values() for record in runs.values())
    lines = [
        f"### {SETTINGS[setting].title}",
        f"Start loss {start:.4f}; {steps} steps of 128 forward passes of one batch.",
        "",
        "| arm | rate | end loss | minus arm 1's, paired | decrease / arm 1's | accuracy | passes to mezo's end loss "
        "| mezo's passes / these |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    falls = {
        name: {seed: r["curve"][0][1] - end_loss(r) for seed, r in runs.items() if not r["diverged"]}
        for name, runs in arms.items()
    }
    mezo = [end_loss(record) for record in arms.get("mezo", {}).values()]
    for name, runs in arms.items():
        ends = [end_loss(record) for record in runs.values()]
        base = falls.get("two-point", {})
        both = [seed for seed in falls[name] if seed in base]
        difference, gain = "-", "-"
        if both:
            difference = spread_of([base[seed] - falls[name][seed] for seed in both], 4)
            gain = f"{sum(falls[name][seed] for seed in both) / sum(base[seed] for seed in both):.2f}"
        accuracies = [record["curve"][-1][2] for record in runs.values() if record["curve"][-1][2] is not None]
        needed, ratio = "-", "-"
        if mezo and math.isfinite(sum(mezo)):
            curves = [record["curve"] for record in runs.values() if not record["diverged"]]
            middle = statistics.median([passes_to(curve, statistics.median(mezo)) for curve in curves] or [math.inf])
            if math.isfinite(middle):
                needed, ratio = f"{middle:,.0f}", f"{steps * 128 / middle:.2f}"
            else:
                needed, ratio = "not reached", "< 1"
        rate = next(iter(runs.values()))["rate"]
        lines.append(
            f"| {ARMS[name].title} | {rate:.3g} | {spread_of(ends, 4)} | {difference} | {gain} | "
            f"{spread_of(accuracies, 3) if accuracies else '-'} | {needed} | {ratio} |"
        )
    return lines


def tuning_table(records: Sequence[Record], setting: str) -> list[str]:
    """Markdown lines of the tuning grid: seed 0's end loss on the tuning windows for each rate."""
    tuned = [record for record in records if record["setting"] == setting and record["seed"] == 0]
    exponents = sorted({record["exponent"] for record in tuned})
    found = {(record["arm"], record["exponent"]): record for record in tuned}

    def cell(name: str, exponent: float) -> str:
        record = found.get((name, exponent))
        return "" if record is None else "diverged" if record["diverged"] else f"{end_loss(record):.4f}"

    lines = [
        f"Grid of {setting} (seed 0, tuning windows):",
        "",
        "| arm | " + " | ".join(f"{0.001 * 3.0**exponent:.3g}" for exponent in exponents) + " |",
        "| --- |" + " --- |" * len(exponents),
    ]
    for name in ARMS:
        if any(arm == name for arm, _ in found):
            lines.append(f"| {ARMS[name].title} | " + " | ".join(cell(name, e) for e in exponents) + " |")
    return lines


def draw(records: Sequence[Record], out: Path) -> Path:
    """One panel a setting: held-out loss against forward passes, mean over seeds and their range. Returns the file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    # Okabe and Ito's colours, told apart by readers of every colour vision; line styles say it once more.
    colours = ["#000000", "#0072B2", "#E69F00", "#D55E00", "#999999", "#009E73", "#56B4E9", "#CC79A7", "#8A7500"]
    styles = ["-", "-", "-", "-", ":", "--", "--", "--", ":"]
    chosen = [setting for setting in SETTINGS if reported(records, setting)]
    rows, columns = -(-len(chosen) // 2), min(2, len(chosen))
    figure, axes = plt.subplots(
        rows, columns, figsize=(7 * columns, 5 * rows + 0.4), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(chosen) :]:
        axis.remove()
    for axis, setting in zip(axes.flat, chosen, strict=False):
        for name, runs in reported(records, setting).items():
            curves = [record["curve"] for record in runs.values() if not record["diverged"]]
            if not curves:
                continue
            index = list(ARMS).index(name)
            passes = [row[0] / 1000 for row in curves[0]]
            losses = np.array([[row[1] for row in curve] for curve in curves])
            axis.plot(passes, losses.mean(0), styles[index], color=colours[index], lw=1.8, label=ARMS[name].title)
            axis.fill_between(passes, losses.min(0), losses.max(0), color=colours[index], alpha=0.12, lw=0)
        axis.set(title=SETTINGS[setting].title, xlabel="forward passes of one batch (thousands)", xlim=(0, None))
        axis.set_ylabel("held-out loss (nats)")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, frameon=False)
    figure.suptitle("Zeroth-order arms at equal forward passes, rates tuned alike: mean and range of three seeds")
    file = out / "methods.png"
    figure.savefig(file, dpi=130)
    return file


def report(out: Path) -> None:
    """Print every table and write the picture."""
    records = results(out)
    for setting in SETTINGS:
        if reported(records, setting):
            print("\n".join([*table(records, setting), "", *tuning_table(records, setting), ""]))
    if any(record["seed"] for record in records):
        print(f"picture: {draw(records, out)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of results, tokenizers and start models")
    parser.add_argument("--setting", choices=list(SETTINGS))
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--check", action="store_true", help="real finite differences against the simulation")
    parser.add_argument("--report", action="store_true", help="print tables and write the picture")
    given = parser.parse_args()
    torch.set_num_threads(1)  # the order of float sums, and so the results, depend on it
    given.out.mkdir(parents=True, exist_ok=True)
    if given.setting:
        run_setting(given.setting, given.arms, given.out)
    if given.check:
        check(given.out)
    if given.report:
        report(given.out)


if __name__ == "__main__":
    main()
