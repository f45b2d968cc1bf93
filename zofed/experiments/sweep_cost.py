"""What a sweep will cost before it begins: seconds from a step of each kind of run, memory, disk, bytes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from zofed.base.errors import UserError
from zofed.base.texts import duration
from zofed.config import Settings
from zofed.experiments import sweep_process
from zofed.experiments.sweep import Run, Sweep
from zofed.federated import protocol
from zofed.preflight.check import bytes_needed
from zofed.preflight.footprint import Footprint
from zofed.preflight.forecast import bytes_of_a_round, free_bytes, pace
from zofed.preflight.model_info import ModelInfo, info
from zofed.training.paths import with_absolute_paths
from zofed.training.process import prepare_process
from zofed.training.task import Task

# What a run's process holds of its own besides its model: of the 430 MiB it shows, 295 are shared (measured).
LIBRARIES = 80 * 2**20
START_AND_END = 1.0  # seconds of a run beside its steps and evaluations: fork, data, replay, pictures
# Settings that change neither the seconds nor the bytes of a run.
FREE = ("seed", "learning_rate", "bp_learning_rate", "local_learning_rate", "min_learning_rate", "epsilon", "momentum",
        "weight_decay", "dirichlet_alpha", "instruct_step", "out")  # fmt: skip


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one run. seconds: None where no step was tried. memory, disk, traffic: bytes; traffic: None where no forecast
    of them is made.
    """

    memory: int
    disk: int
    seconds: float | None = None
    traffic: int | None = 0


def estimate(sweep: Sweep, parallel: int) -> Iterator[str]:
    """Lines that list the runs, each with what it will cost, then all of them; nothing is written.

    One short step is taken for each kind of run, so that this takes seconds a kind.
    """
    prepare_process(1)
    costs: dict[Settings, Cost | str] = {}
    runs = sweep.first()
    total, disk, unknown = 0.0, 0, 0
    traffic: list[int | None] = []
    memory: list[int] = []
    for run, name in [*((run, run.name) for run in runs), *_later(sweep)]:
        kind = _kind(run)
        if kind not in costs:
            costs[kind] = _cost(_first_of_merged(run.settings, sweep))
        found = costs[kind]
        if isinstance(found, str):
            unknown += 1
            yield f"{name}: will fail: {found}"
            continue
        how_long = (
            "no step tried: it takes more memory than is free" if found.seconds is None else duration(found.seconds)
        )
        yield f"{name}: {how_long}, {found.memory / 2**20:,.0f} MiB"
        total += START_AND_END + (found.seconds or 0.0)
        unknown += found.seconds is None
        memory.append(found.memory)
        disk += found.disk
        traffic.append(found.traffic)
    told = f"{sweep.size}, {parallel} at a time: about {duration(total / parallel)}"
    told += f" and {unknown} runs of unknown length" if unknown else ""
    told += f"; {sum(sorted(memory)[-parallel:]) / 2**20:,.0f} MiB of memory, {disk / 2**20:,.0f} MiB on disk"
    yield told + _traffic_told(traffic)
    if warning := too_much(sweep, parallel):
        yield f"warning: {warning}"


def _traffic_told(found: Sequence[int | None]) -> str:
    known, unknown = sum(bytes_ or 0 for bytes_ in found), sum(bytes_ is None for bytes_ in found)
    told = f", {known:,} bytes between clients and server" if known else ""
    return told + (f"; what the runs of other modes than zo send is not predicted ({unknown} runs)" if unknown else "")


def too_much(sweep: Sweep, parallel: int) -> str:
    """A warning, with the numbers, where so many runs at a time may take more memory than is free; else empty."""
    prepare_process(1)
    kinds: dict[Settings, int] = {}
    sizes: list[tuple[int, str]] = []
    for run in sweep.first():
        kind = _kind(run)
        if kind not in kinds:
            try:
                kinds[kind] = _memory(kind)[0]
            except UserError:
                kinds[kind] = 0  # the run itself will say why it cannot be
        sizes.append((kinds[kind], run.name))
    settings = sweep.first()[0].settings
    free, places = free_bytes(settings), max(1, sweep_process.gpus(settings))
    largest = sorted(sizes, reverse=True)[: -(-parallel // places)]  # those that may meet on one GPU
    if free is None or sum(size for size, _ in largest) <= free:
        return ""
    fit = max(1, int(free // max(1, largest[0][0]))) * places
    return (
        f"{len(largest)} runs at a time{' on a GPU' * (places > 1)} may take "
        f"{sum(size for size, _ in largest) / 2**20:,.0f} MiB (the largest, "
        f"{largest[0][1]}, {largest[0][0] / 2**20:,.0f}), but {free / 2**20:,.0f} MiB are free: "
        + (f"take --parallel {fit}" if fit < parallel else "take a smaller model, batch-size or block-size")
    )


def memory(run: Run) -> int:
    """Bytes that a run takes of its own. Raises UserError where it cannot be, as of a model that is not there."""
    prepare_process(1)
    return _memory(run.settings)[0]


def _later(sweep: Sweep) -> Iterator[tuple[Run, str]]:
    """The runs that wait for a tuning: as their arm's first values, under a name that says what is not known yet."""
    for arm in sweep.arms:
        if len(arm.tuned) > 1:
            for seed in sweep.seeds[1:]:
                tried = sweep.tried(arm, {})
                yield sweep.run(arm, tried[0], seed), f"{arm.name},(the best of {len(tried)}),seed={seed}"


def _kind(run: Run) -> Settings:
    """The run's settings without those that change no cost."""
    fields = Settings.model_fields
    return run.settings.model_copy(update={name: fields[name].default for name in FREE})


def _first_of_merged(settings: Settings, sweep: Sweep) -> Settings:
    """With the first of the data that are to be merged in the place of all of them, which are not there yet."""
    update = {
        key: sweep.merge[name][0]
        for key in ("dataset", "bp_dataset", "eval_dataset")
        if (name := getattr(settings, key)) in sweep.merge
    }
    return settings.model_copy(update=update)


def _memory(settings: Settings) -> tuple[int, ModelInfo]:
    """Bytes a run takes of its own, libraries among them, and what is known of its model."""
    of = info(with_absolute_paths(settings), (settings.mode,))
    if of.unpredictable:
        size = 4 * of.parameters
        unknown = Footprint(size, state=size, step=2 * size, evaluation=0)  # a guess
        of = replace(of, memory={settings.mode: unknown})
    memory = of.memory[settings.mode]
    replica = memory.weights + memory.state if settings.clients else 0  # of the clients, who share one in one process
    return LIBRARIES + bytes_needed(of, settings.mode) + replica, of


def _cost(settings: Settings) -> Cost | str:
    """What a run costs, or why it will fail."""
    try:
        size, of = _memory(settings)
        memory = of.memory[settings.mode]
        saved = settings.keep_checkpoints * (memory.weights + memory.state) if settings.save_interval else 0
        found = Cost(size, memory.weights + saved)
        free = free_bytes(settings)
        if free is not None and size > free:
            return found
        task = Task.load(with_absolute_paths(settings))
        examples, replica = task.shard(0, max(1, settings.clients)), task.replica()
        took = pace(task, replica, examples, settings.mode)
    except UserError as error:
        return str(error)
    if not settings.clients:
        return replace(found, seconds=took.total)
    # Clients take their steps one after the other in one process; the server alone evaluates.
    asked = protocol.asked_each_round(settings, settings.clients)
    traffic = sum(bytes_of_a_round(settings, replica)) * asked * settings.rounds if settings.mode == "zo" else None
    seconds = took.total + (asked - 1) * took.step * took.steps
    return replace(found, seconds=min(seconds, settings.max_seconds or seconds), traffic=traffic)
