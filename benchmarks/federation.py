"""What a federation costs, and what it survives.

python -m benchmarks.federation costs      bytes of a client and round, protocol overhead
python -m benchmarks.federation memory     of the process, by virtual clients and by rounds
python -m benchmarks.federation recovery   late joiners, flipped bits
python -m benchmarks.federation kills      a server killed at random moments
python -m benchmarks.federation machines   digests of clients on other classes of processor, 200 rounds
python -m benchmarks.federation joining    seconds of a cold start by replay and by the weights
python -m benchmarks.federation absence    clients missing, clients sending nonsense, clients that lie within the rules

All clients run in this process (zofed.federated.local_grid.LocalGrid) unless said otherwise.
"""

import argparse
import contextlib
import json
import os
import random
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from flwr.app import ConfigRecord, Message, RecordDict

from zofed import config
from zofed.base.errors import UserError
from zofed.core import journal
from zofed.core.records import Seeded
from zofed.federated import client, messages, protocol, server, wire
from zofed.federated.local_grid import LocalGrid
from zofed.federated.protocol import Answer
from zofed.runs.run_folder import RunFolder
from zofed.runs.tables import read_table
from zofed.training.task import Task

Values = dict[str, Any]
Alter = Callable[[int, Answer, random.Random], Answer | None]  # client, its answer -> what arrives; None: an error

BASE: Values = {
    "dataset": "sample-dclm", "block-size": 32, "batch-size": 2, "queries": 8, "eval-interval": 1000, "device": "cpu",
    "eval-examples": 128, "save-interval": 0, "weight-check-interval": 0, "learning-rate": 0.02,
}  # fmt: skip


class Disturbed(LocalGrid):
    """A grid whose clients' answers are altered on their way."""

    def __init__(self, *arguments: Any, alter: Alter, seed: int) -> None:
        super().__init__(*arguments)
        self._alter, self._chance = alter, random.Random(seed)
        self.altered = 0

    def _deliver(self, message: Message) -> str:
        name = super()._deliver(message)
        reply = self._replies[name]
        if message.metadata.message_type == "train.zo" and reply.has_content():
            answer = messages.unpack(Answer, reply.content)
            changed = self._alter(answer.client, answer, self._chance)
            if changed is None:
                del self._replies[name]  # nothing comes
            elif changed is not answer:
                self.altered += 1
                reply.content = messages.pack(changed)
        return name


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the lines of the rounds."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield


def federate(folder: Path, clients: int, alter: Alter | None = None, **values: Any) -> dict[str, Any]:
    """One run; its summary."""
    shutil.rmtree(folder, ignore_errors=True)
    client.forget()
    changed = {key.replace("_", "-"): value for key, value in values.items()}
    settings = config.resolve(BASE | {"out": str(folder), "clients": clients} | changed)
    given = (client.app, clients, settings.model_dump(by_alias=True))
    grid = Disturbed(*given, alter=alter, seed=settings.seed) if alter else LocalGrid(*given)
    with quiet():
        return server.run(grid, settings, "")


def costs(folder: Path) -> None:
    """Bytes as Flower serialises messages and objects, and zofed's own among them; seconds beside the computing."""
    print("| clients | seeds | q | bits | up, B | down, B | payload up | payload down | overhead, ms a round |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for clients, kind, queries, bits in (
        (10, "shared", 8, 18), (10, "shared", 8, 6), (10, "distinct", 8, 18), (10, "distinct", 8, 6),
        (32, "distinct", 8, 18), (10, "distinct", 32, 6),
    ):  # fmt: skip
        federate(folder / "run", clients, rounds=40, direction_seeds=kind, queries=queries, quantization_bits=bits)
        rounds = read_table(folder / "run" / "rounds.csv")[1:]
        replies = read_table(folder / "run" / "clients.csv")
        computing: Counter[str] = Counter()
        for row in replies:
            computing[row["round"]] += float(row["seconds_compute"])  # type: ignore[assignment]
        over = [1000 * (float(row["seconds_waiting"]) - computing[row["round"]]) for row in rounds]
        names = ("bytes_up", "bytes_down", "payload_up", "payload_down")
        mean = [statistics.fmean(int(row[name]) / clients for row in rounds) for name in names]
        told = " | ".join(f"{value:,.0f}" for value in mean)
        print(f"| {clients} | {kind} | {queries} | {bits} | {told} | {statistics.median(over):.1f} |", flush=True)
    summary = federate(folder / "run", 10, rounds=4, mode="fo", learning_rate=0.1)
    up, down = summary["bytes_up_per_client_round"], summary["bytes_down_per_client_round"]
    print(f"FedAvg of the same model (142,000 parameters): {up:,.0f} B up, {down:,.0f} B down")


def memory(folder: Path) -> None:
    """Peak memory of a process that serves 10 or 1,000 virtual clients of the 20M model, and by rounds."""
    print("| virtual clients | model | rounds | peak, MiB | after round 1 |\n| --- | --- | --- | --- | --- |")
    for clients, model, rounds in ((10, "20M", 2), (1000, "20M", 2), (4, "tiny", 200), (4, "tiny", 2000)):
        code = (
            f"from benchmarks.federation import _memory_of; _memory_of({str(folder)!r}, {clients}, {model!r}, {rounds})"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        print(done.stdout.strip().splitlines()[-1], flush=True)


def _memory_of(folder: str, clients: int, model: str, rounds: int) -> None:
    values: Values = {"model": model, "rounds": rounds, "queries": 2, "batch_size": 1, "eval_examples": 8}
    if clients > 100:
        values |= {"participation": 50.0}
    if model == "20M":  # short sentences, enough for 1,000 clients
        values |= {"dataset": str(Path(os.environ["ZOFED_REAL_DATA"]) / "sst2/train.tsv"), "block_size": 16}
    first: list[int] = []
    show = server.Server._show

    def noting(self: Any, row: Any) -> None:
        show(self, row)
        if row["step"] == 1:
            first.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)

    server.Server._show = noting  # type: ignore[method-assign]
    federate(Path(folder) / "memory", clients, **values)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"| {clients:,} | {model} | {rounds:,} | {peak / 1024:,.0f} | {first[0] / 1024:,.0f} |")


OPTIMIZERS: dict[str, Values] = {
    "sgd": {}, "momentum": {"momentum": 0.9}, "adamw": {"optimizer": "adamw", "learning_rate": 1e-3},
    "mudamw": {"optimizer": "mudamw", "learning_rate": 1e-3},
}  # fmt: skip


def recovery(folder: Path, count: int) -> None:
    """A client that forgets everything, a flipped bit, and a server killed, each at random moments."""
    chance = random.Random(0)
    whole = {name: federate(folder / "whole", 3, rounds=20, **own)["digest"] for name, own in OPTIMIZERS.items()}
    names = list(OPTIMIZERS)
    same = 0
    for index in range(count):
        name, at = names[index % 4], chance.randrange(1, 20)
        with _replicas_forget(at):
            summary = federate(folder / "run", 3, rounds=20, **OPTIMIZERS[name])
        same += summary["digest"] == whole[name] and set(summary["client_digests"].values()) == {whole[name]}
    print(f"late joiners: {same} of {count} end with the digest of the undisturbed run")
    found = healed = 0
    for index in range(count):
        name, at = names[index % 4], chance.randrange(1, 20)
        with _flipped_bit(at, chance) as rebuilt:
            summary = federate(folder / "run", 3, rounds=20, weight_check_interval=5, **OPTIMIZERS[name])
        healed += set(summary["client_digests"].values()) == {summary["digest"]}  # slopes may come from wrong weights
        found += bool(rebuilt)
    print(f"one bit flipped in one weight: found by the next check in {found} of {count}, healed in {healed}")


@contextlib.contextmanager
def _replicas_forget(at: int) -> Iterator[None]:
    """The clients' process loses all it holds before round `at`."""
    measure = client.answers.measure
    done = []

    def forgetful(plan: Any, context: Any) -> Any:
        if plan.round == at and not done:
            done.append(True)
            client.forget()
        return measure(plan, context)

    client.answers.measure = forgetful
    try:
        yield
    finally:
        client.answers.measure = measure


@contextlib.contextmanager
def _flipped_bit(at: int, chance: random.Random) -> Iterator[list[bool]]:
    """After round `at` one random bit of one random weight of the clients' replica is wrong; gives its rebuildings."""
    measure, rebuild = client.answers.measure, client.Task.replica
    done: list[bool] = []
    rebuilt: list[bool] = []

    def flipping(plan: Any, context: Any) -> Any:
        answer = measure(plan, context)
        if plan.round == at and not done:
            done.append(True)
            parameters = list(client.session(context).replica.parameters.values())
            flat = chance.choice(parameters).detach().view(-1).view(torch.int32)
            flat[chance.randrange(len(flat))] ^= 1 << chance.randrange(31)
        return answer

    def noting(self: Any) -> Any:
        rebuilt.extend(done)
        return rebuild(self)

    client.answers.measure, client.Task.replica = flipping, noting
    try:
        yield rebuilt
    finally:
        client.answers.measure, client.Task.replica = measure, rebuild


def kills(folder: Path, count: int) -> None:
    """A server killed with SIGKILL at random moments of a 40-round run, and started again each time."""
    values = {"rounds": 40, "save_interval": 10, "optimizer": "adamw", "learning_rate": 1e-3}
    whole = federate(folder / "whole", 3, **values)["digest"]
    digests, lost, moments = Counter[str](), 0, 0
    chance = random.Random(1)
    code = f"from benchmarks.federation import federate_on; federate_on({str(folder / 'killed')!r}, {values!r})"
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    length = time.monotonic() - began
    shutil.rmtree(folder / "killed")
    while moments < count:
        announced = 0
        for _ in range(chance.randrange(1, 4)):
            with subprocess.Popen(
                [sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
            ) as run:
                time.sleep(chance.uniform(0.4, 1.0) * length)
                run.send_signal(signal.SIGKILL)
            moments += 1
            path = RunFolder(folder / "killed").journal
            held = len(journal.read(path).entries) if path.exists() else 0
            told = read_table(folder / "killed" / "metrics.csv")
            lost += max(0, announced - held) + max(0, (int(told[-1]["step"]) if told else 0) - held)
            announced = held
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
        digests[RunFolder(folder / "killed").summary()["digest"]] += 1
        shutil.rmtree(folder / "killed")
    print(f"server killed {moments} times in {sum(digests.values())} runs: digests {dict(digests)}")
    print(f"undisturbed {whole}; announced rounds lost {lost}; a whole run takes {length:.1f} s")


def federate_on(folder: str, values: Values) -> None:
    """Begin a run, or go on with it."""
    changed = {key.replace("_", "-"): value for key, value in values.items()}
    settings = config.resolve(BASE | {"out": folder, "clients": 3} | changed)
    server.run(LocalGrid(client.app, 3, settings.model_dump(by_alias=True)), settings, "")


class Elsewhere(LocalGrid):
    """A grid whose clients each run in a process with an environment of its own, as machines of other kinds would."""

    def __init__(self, nodes: int, run_config: Values, environments: Sequence[dict[str, str]]) -> None:
        super().__init__(client.app, nodes, run_config)
        code = "from benchmarks.federation import serve; serve()"
        self._machines = [
            subprocess.Popen(
                [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ | own
            )
            for own in environments
        ]

    def _deliver(self, message: Message) -> str:
        message.metadata.__dict__["_message_id"] = message.object_id
        context = self._contexts[message.metadata.dst_node_id]
        machine = self._machines[int(context.node_config["partition-id"])]
        raw = message.content[messages.KEY][messages.KEY]  # type: ignore[index]
        header = json.dumps(
            [message.metadata.message_type, dict(context.node_config), dict(context.run_config), len(raw)]  # type: ignore[arg-type]
        )
        assert machine.stdin and machine.stdout
        machine.stdin.write(header.encode() + b"\n" + raw)  # type: ignore[operator]
        machine.stdin.flush()
        answer = machine.stdout.read(int(machine.stdout.readline()))
        content = RecordDict({messages.KEY: ConfigRecord({messages.KEY: answer})})
        self._replies[message.metadata.message_id] = Message(content=content, reply_to=message)
        return message.metadata.message_id

    def close(self) -> None:
        for machine in self._machines:
            machine.kill()
            machine.wait()


def serve() -> None:
    """One client's process: a request, an answer, and so on."""
    out, sys.stdout = sys.stdout.buffer, sys.stderr
    handlers: dict[str, tuple[Any, Any]] = {
        "query.status": (wire.Greeting, client.answers.greet),
        "train.zo": (protocol.Plan, client.answers.measure),
        "query.digest": (protocol.Plan, client.answers.final),
        "train.fo": (protocol.Plan, client.answers.backpropagate),
    }
    while line := sys.stdin.buffer.readline():
        kind, node, run, length = json.loads(line)
        content, handler = handlers[kind]
        context = SimpleNamespace(node_config=node, run_config=run)
        answer = wire.encoded(handler(wire.decoded(content, sys.stdin.buffer.read(length)), context))
        out.write(str(len(answer)).encode() + b"\n" + answer)
        out.flush()


def machines(folder: Path) -> None:
    """A server of AVX-512 with clients of other classes of processor: digests after 200 rounds."""
    environments: list[dict[str, str]] = [
        {}, {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE"}, {"ATEN_CPU_CAPABILITY": "avx2"},
    ]  # fmt: skip
    print("| directions | optimizer | rounds | digests of server and 3 clients |\n| --- | --- | --- | --- |")
    for kind in ("rank1", "rank4", "rademacher", "gaussian"):
        for name, own in OPTIMIZERS.items():
            shutil.rmtree(folder / "run", ignore_errors=True)
            changed = {key.replace("_", "-"): value for key, value in own.items()}
            values = BASE | {"out": str(folder / "run"), "clients": 3, "rounds": 200, "directions": kind} | changed
            settings = config.resolve(values)
            grid = Elsewhere(3, settings.model_dump(by_alias=True), environments)
            try:
                with quiet():
                    summary = server.run(grid, settings, "")
            finally:
                grid.close()
            digests = {summary["digest"], *summary["client_digests"].values()}
            print(f"| {kind} | {name} | 200 | {len(digests)} |", flush=True)


def joining(folder: Path) -> None:
    """Replaying a run's journal at 20M, against its weights over a link of 10 Mbit/s."""
    task = Task.load(config.resolve({"model": "20M", "dataset": "pydoc", "block-size": 32, "device": "cpu"}))
    replica = task.replica()
    count = sum(parameter.numel() for parameter in replica.parameters.values())
    print("| record | rounds | seconds of replay | seconds of its bytes at 10 Mbit/s | of the weights |")
    print("| --- | --- | --- | --- | --- |")
    for clients, queries in ((1, 8), (10, 8)):
        head, entries = replica.head, []
        for round_ in range(replica.round + 1, replica.round + 101):
            values = tuple((index * 7919) % 63 - 31 for index in range(clients * queries))
            made = Seeded(round_, 1e-3, tuple(range(clients)), queries, values, -10, float(len(values)))
            entries.append(journal.link(head, made))
            head = entries[-1].chain
        raw = journal.bodies(entries)
        began = time.monotonic()
        replica.replay(entries)
        seconds = time.monotonic() - began
        told = f"{seconds:.1f} | {len(raw) * 8e-7:.3f} | {4 * count * 8e-7:.0f}"
        print(f"| {clients} x {queries} directions | 100 | {told} |", flush=True)


CLIENTS, BAD = 10, (0, 1)  # 20 %


def _nonsense(index: int, answer: Answer, chance: random.Random) -> Answer | None:
    if index not in BAD:
        return answer
    ways: tuple[Answer, ...] = (
        replace(answer, loss=float("nan")),
        replace(answer, exponent=100),
        replace(answer, exponent=-100 + 180, coefficients=tuple(-c for c in answer.coefficients)),
        replace(answer, coefficients=answer.coefficients[:-1]),
        replace(answer, coefficients=(*answer.coefficients, 1)),
        replace(answer, examples=10**12, loss=1e30),
        replace(answer, problem="not_finite"),
    )
    return chance.choice(ways)


def _flipped(index: int, answer: Answer, chance: random.Random) -> Answer:
    return answer if index not in BAD else replace(answer, coefficients=tuple(-c for c in answer.coefficients))


def _tenfold(index: int, answer: Answer, chance: random.Random) -> Answer:
    """-10 times the honest slopes: 8 times by the exponent, near enough."""
    if index not in BAD:
        return answer
    return replace(answer, coefficients=tuple(-c for c in answer.coefficients), exponent=answer.exponent + 3)


def absence(folder: Path, seeds: Sequence[int], only: str) -> None:
    """Final held-out losses, mean ± standard deviation over the seeds. only: disturbances that hold this text."""
    shared = {"rounds": 200, "queries": 16, "quorum": 3, "learning_rate": 0.02, "round_timeout": 0.05}

    def several(alter: Alter | None, **values: Any) -> str:
        done = []
        for seed in seeds:
            with contextlib.suppress(UserError):
                done.append(federate(folder / "run", CLIENTS, alter, seed=seed, **(shared | values)))
        if not done:
            return "diverged"
        ends = [summary["eval_loss_end"] for summary in done]
        reasons: Counter[str] = Counter()
        for summary in done:
            for counts in summary["replies"].values():
                reasons.update(counts)
        told = ", ".join(f"{name} {number}" for name, number in sorted(reasons.items()) if number)
        left = "" if len(done) == len(seeds) else f" ({len(seeds) - len(done)} of {len(seeds)} diverged)"
        return f"{statistics.fmean(ends):.4f} ± {statistics.stdev(ends):.4f}{left} | {told}"

    def missing(index: int, answer: Answer, chance: random.Random) -> Answer | None:
        return None if chance.random() < 0.3 else answer

    print("| disturbance | direction-seeds | aggregation | held-out loss | replies |\n| --- | --- | --- | --- | --- |")
    for name, alter, kind, rule, limit in (
        ("none", None, "distinct", "mean", 10.0),
        ("30 % missing each round", missing, "distinct", "mean", 10.0),
        ("20 % send nonsense", _nonsense, "distinct", "mean", 10.0),
        ("the 20 % absent", lambda i, a, c: None if i in BAD else a, "distinct", "mean", 10.0),
        ("none", None, "shared", "mean", 10.0),
        ("20 % flip signs", _flipped, "shared", "mean", 0.0),
        ("20 % flip signs", _flipped, "shared", "trimmed", 0.0),
        ("20 % flip signs", _flipped, "shared", "median", 0.0),
        ("20 % send -8 times", _tenfold, "shared", "mean", 0.0),
        ("20 % send -8 times", _tenfold, "shared", "mean", 2.0),
        ("20 % send -8 times", _tenfold, "shared", "trimmed", 0.0),
        ("20 % send -8 times", _tenfold, "shared", "median", 0.0),
        ("20 % send -8 times", _tenfold, "distinct", "mean", 0.0),
        ("20 % send -8 times", _tenfold, "distinct", "mean", 2.0),
    ):
        if only not in name:
            continue
        told = several(alter, direction_seeds=kind, aggregation=rule, clip_slopes=limit)
        print(f"| {name} | {kind} | {rule}{f', clipped at {limit:g}' if limit else ''} | {told} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.federation", description=__doc__)
    parser.add_argument("what", choices=("costs", "memory", "recovery", "kills", "machines", "joining", "absence"))
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3, 4, 5])
    parser.add_argument("--only", default="", help="absence: only disturbances whose name holds this")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if given.what == "costs":
            costs(folder)
        elif given.what == "memory":
            memory(folder)
        elif given.what == "recovery":
            recovery(folder, given.count)
        elif given.what in ("machines", "joining"):
            (machines if given.what == "machines" else joining)(folder)
        elif given.what == "kills":
            kills(folder, given.count)
        else:
            absence(folder, given.seeds, given.only)


if __name__ == "__main__":
    main()
