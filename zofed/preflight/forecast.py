"""What a run will cost, from one short step: seconds, free memory, bytes of a round."""

import math
import time
from dataclasses import dataclass, replace
from pathlib import Path

from zofed.config import Settings
from zofed.core import metrics
from zofed.core.journal import link
from zofed.core.records import Seeded
from zofed.core.replica import Replica
from zofed.data.encoding import Examples
from zofed.federated import protocol
from zofed.training.modes import mode_of
from zofed.training.process import free_on, layer_devices
from zofed.training.steps import step_function, steps_of
from zofed.training.task import Task

QUICK_SECONDS = 10.0  # a step of two queries that takes longer is not tried with more


@dataclass(frozen=True, slots=True)
class Pace:
    """What a short step tells. loss: of its batch. step: seconds of a whole step. steps: of the run. total: seconds of
    all its steps and evaluations."""

    loss: float
    step: float
    steps: int
    total: float


def free_bytes(settings: Settings) -> int | None:
    """Bytes a new process may take: on the run's GPUs, else in RAM and in this process's container; None: not told."""
    if (chosen := layer_devices(settings))[0].type == "cuda":
        return sum(free_on(chosen))
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return None
    try:
        limit, used = (Path(f"/sys/fs/cgroup/memory.{name}").read_text(encoding="utf-8") for name in ("max", "current"))
        return min(free, int(limit) - int(used))
    except (OSError, ValueError):  # no container, or one without a limit
        return free


def pace(task: Task, replica: Replica, examples: Examples, mode: str, count: int = 0) -> Pace:
    """Take a short step in one mode, and tell from it how long a run takes. May move the replica.

    count: how many examples the run has, where these are only some of them.
    """
    settings = task.settings
    if mode != settings.mode:  # another mode may have other directions and optimizers
        replica = replace(task, settings=settings.model_copy(update={"mode": mode})).replica()
    queries = min(2, settings.queries)
    trial = settings.model_copy(update={"mode": mode, "queries": queries, "subspace_interval": 1})
    _timed(replica, examples, trial.model_copy(update={"batch_size": 1}))  # the first pass checks what no other does
    seconds, loss, moving = _timed(replica, examples, trial)
    if seconds < QUICK_SECONDS:  # once more with as many queries as share a pass
        trial = trial.model_copy(
            update={"queries": min(settings.queries, max(queries, settings.perturbations_per_pass))}
        )
        seconds, loss, moving = _timed(replica, examples, trial)
    asked = settings.model_copy(update={"mode": mode})
    seconds *= mode_of(asked).longer_than(trial)
    began = time.monotonic()
    read = min(8, len(examples["labels"]))
    metrics.evaluate(replica.model, {name: tensor[:read] for name, tensor in examples.items()})
    evaluation = (time.monotonic() - began) / read * settings.eval_examples
    count = steps_within(asked, count or len(examples["labels"]))
    replayed = 0.0 if mode_of(asked).has_gradients else moving  # the replay that proves the run
    total = count * (seconds + moving + replayed) + (count / settings.eval_interval + 2) * evaluation
    return Pace(loss, seconds + moving, count, min(total, settings.max_seconds or total))


def steps_within(settings: Settings, examples: int = 0) -> int:
    """Steps or rounds of a run: those asked for, or as many as its budget of forward-equivalents about allows.

    examples: how many the run has, by which `epochs` count; 0: not known, and `steps` stand for them.
    """
    count = settings.rounds if settings.clients else steps_of(settings, examples) if examples else settings.steps
    if not settings.max_forward_equivalents:
        return count
    cost = mode_of(settings).cost * max(1, settings.clients)
    return min(count, math.ceil(settings.max_forward_equivalents / cost))


def _timed(replica: Replica, examples: Examples, settings: Settings) -> tuple[float, float, float]:
    """(seconds of asking, loss, seconds of moving) of the replica's next step."""
    began = time.monotonic()
    step = step_function(settings, replica, examples, settings.steps)(replica.round + 1)
    asked = time.monotonic()
    replica.apply(link(replica.head, step.record), step.update)
    return asked - began, step.loss, time.monotonic() - asked


def bytes_of_a_round(settings: Settings, replica: Replica) -> tuple[int, int]:
    """(up, down) of each client in a zeroth-order round, as Flower serialises them.

    Down travel the records of the rounds that it was not asked for, one of each turn of all clients.
    """
    from zofed.federated import messages  # Flower takes a while to load

    rate, steps = settings.learning_rate, settings.local_steps
    # Of a size whose code has a bit more than `quantization-bits`: hundreds of one spread take 0.4 more as a mean.
    values = (2 ** (settings.quantization_bits - 2),) * (settings.queries * steps)
    everybody = max(1, settings.clients)
    asked = protocol.asked_each_round(settings, everybody)
    clients = (0,) if settings.direction_seeds == "shared" else tuple(range(asked))
    integers = values * len(clients)
    record = Seeded(replica.round, rate, clients, settings.queries, integers, -17, 1.0, local_steps=steps)
    missed = [link(replica.head, record)] * round(everybody / asked)
    plan = protocol.plan_for(replica, replica.head, missed, client=0)
    answer = protocol.Answer(plan.genesis, plan.round, 1, 0, b"", plan.probe, "", 1.0, 1, 1, values, -17)
    up, down = (messages.size(messages.pack(content)) for content in (answer, plan))
    return up, down
