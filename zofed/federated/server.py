"""The server of a federation over a Flower grid: a run begun or gone on with, its rounds told, its weights checked."""

import os
import sys
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from zofed import __version__, config
from zofed.base import log
from zofed.base.errors import UserError
from zofed.config import Settings
from zofed.core.journal import Journal
from zofed.core.metrics import Coverage
from zofed.core.replica import Replica
from zofed.data import partitions
from zofed.federated import protocol
from zofed.federated.exchanges import Exchanges
from zofed.federated.membership import Members
from zofed.federated.places import WITHOUT_KEYS, Places
from zofed.federated.rounds import Rounds
from zofed.federated.traffic import Traffic
from zofed.runs import repair, round_log, sinks
from zofed.runs.progress import Progress
from zofed.runs.run_folder import DEPLOYED, SIMULATED, RunFolder
from zofed.runs.tables import Row
from zofed.training.finalize import draw, finish, status_kept
from zofed.training.modes import mode_of
from zofed.training.paths import check_absolute, with_absolute_paths
from zofed.training.problem import Problem, TaskProblem
from zofed.training.process import prepare_process
from zofed.training.task import Task
from zofed.training.trainer import Trainer

HOLDINGS = "partition.csv"  # the table of who holds what
GROUPS_KEPT = 1000  # its columns

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run a federation from Flower's run configuration; the output folder is absolute and printed."""
    way = DEPLOYED if hasten(grid) else SIMULATED
    try:
        given = config.given(context.run_config)
        check_absolute(settings := config.resolve(given))
        if idle := config.without_effect(settings, given, config.FEDERATED):
            warnings.warn("; ".join(idle), stacklevel=1)
        run(grid, settings, f"flower-{context.run_id}", way)
    except UserError as error:
        # Flower marks a run as failed only if an exception leaves the app, and logs it: one line will do for this one.
        sys.tracebacklimit = 0
        raise error from None


def app_for(version: str) -> ServerApp:
    """`app`, for a folder that was written by that version and brings no zofed along; another one refuses its runs."""
    if version == __version__:
        return app
    other = ServerApp()

    @other.main()
    def refuse(grid: Grid, context: Context) -> None:
        sys.tracebacklimit = 0  # as in main
        raise UserError(
            f"this app is of zofed {version}, the server's machine has zofed {__version__}: give all machines the "
            "same, or make the app anew with zofed new"
        )

    return other


def hasten(grid: Grid) -> bool:
    """Have a grid of separate machines ask again soon for what is on its way to it; whether it is one."""
    module = sys.modules[type(grid).__module__]
    if is_deployed := hasattr(module, "pull_objects"):
        from zofed.federated import flower_internals

        flower_internals.hasten(module)
    return is_deployed


def run(grid: Grid, settings: Settings, name: str, way: str = SIMULATED) -> dict[str, Any]:
    """One federated run over `grid`, new or going on from the journal in its folder; returns its summary.

    name: of the folder, where settings.out is empty. way: on this machine (SIMULATED) or on separate ones (DEPLOYED).
    """
    settings, out = prepared(settings, name)
    return carry_out(grid, TaskProblem(Task.load(with_absolute_paths(settings))), out, way)


def prepared(settings: Settings, name: str) -> tuple[Settings, Path]:
    """The settings of a federated run and its absolute folder, this process being ready for it.

    Raises UserError for settings that a federation cannot run with.
    """
    protocol.check_settings(settings)
    sinks.check(settings)
    out = config.absolute(settings.out or Path.home() / "zofed-runs" / name, "out")
    if settings.out and not Path(os.path.expanduser(settings.out)).is_absolute():
        raise UserError(f"out = {settings.out!r}: the server's working folder is not yours, give an absolute path")
    if settings.direction_seeds == "shared" and settings.local_steps > 1:
        warnings.warn(
            f"direction-seeds = 'shared' with local-steps = {settings.local_steps}: the noise of the clients does not "
            "average out; set direction-seeds to distinct",
            stacklevel=3,
        )
    prepare_process(settings.threads)
    return settings.model_copy(update={"out": str(out)}), out


def carry_out(grid: Grid, problem: Problem, out: Path, way: str) -> dict[str, Any]:
    """The run of a problem in the folder `out`, new or going on from the journal there; returns its summary."""
    held_out, settings = problem.held_out(), problem.settings
    if settings.gradient_source == "server" and mode_of(settings).helps_zeroth_order:
        problem.backprop_data()
    replica = problem.first_replica()
    earlier = (
        _reopened(out, way, problem, replica) if os.path.exists(RunFolder(out).journal) else None
    )  # False for a bad name
    try:
        places = Places.read(out, are_lasting=os.environ.get(WITHOUT_KEYS) != "1")
        members = Members(grid, settings, replica, earlier, problem.named, places)
        members.meet()
        folder = RunFolder(out) if earlier else RunFolder.create(out, settings, problem.pins(), way, members.partitions)
    except BaseException:
        if earlier:
            earlier.close()
        raise
    folder.write_text("settings.toml", config.to_toml(settings))
    # The journal first: without it what a crash leaves here could neither go on nor begin anew.
    with earlier or Journal.create(folder.journal, replica.genesis) as journal, status_kept(folder):
        members.journal = journal
        members.places.keep_in(folder.path)
        last = journal.last_round
        what = f"goes on after round {last}" if earlier else held_out
        here = f"{len(members.found)} clients, {what}"
        log.tell("\n".join([f"run folder: {out}", problem.told(), settings.steps_told(), here]))
        _tell_holdings(members, folder)
        with Traffic(folder, last, losses_withheld=settings.losses_withheld) as traffic:
            return Server(grid, members, problem, replica, journal, folder, traffic).run()


def _reopened(out: Path, way: str, problem: Problem, replica: Replica) -> Journal:
    """The journal of a run that goes on. Raises UserError where it runs another way, or began otherwise."""
    folder = RunFolder.open(out)
    folder.check_way(way)
    journal = Journal.open(folder.journal)
    try:
        folder.check_unchanged(problem.pins(), journal.genesis, replica.genesis)
        done, rounds = journal.last_round, problem.settings.rounds
        if done > rounds:
            raise UserError(f"rounds = {rounds}, but {out} has done {done}: set rounds to {done} or more")
    except UserError:
        journal.close()
        raise
    if (first := round_log.exchange_of(out, done + 1)) > done:
        return journal
    # A crash kept some of the records that an exchange gave, which no client was told: from there on clients would be
    # asked for other rounds at once than in the run that nothing disturbed.
    journal.close()
    aside = repair.cut(folder, first - 1)
    told = f"the exchange from round {first} on was not whole: asking for it again; what stood there is in {aside}"
    print(told, file=sys.stderr, flush=True)
    return Journal.open(folder.journal)


def _tell_holdings(members: Members, folder: RunFolder) -> None:
    """Table and picture of who holds what, as the clients say."""
    told = {client: member.told for client, member in sorted(members.found.items())}
    held = {client: own.held_counts() for client, own in told.items()}
    for client in (client for client, own in told.items() if own.counts not in ("", "{}") and not held[client]):
        what = "what it says it holds is no table of names with whole numbers, or a longer one than is read"
        print(f"client {client}: {what}: {HOLDINGS} has its number of examples alone", file=sys.stderr, flush=True)
    counts = {client: held[client] or {"examples": own.examples} for client, own in told.items()}
    folder.write_text(HOLDINGS, partitions.to_csv(partitions.largest(counts, GROUPS_KEPT)))
    draw("partition", counts, folder.path / "partition.png")


class Server:
    """The server's side of one run; the law of the house is kept by the Trainer it drives."""

    def __init__(
        self,
        grid: Grid,
        members: Members,
        problem: Problem,
        replica: Replica,
        journal: Journal,
        folder: RunFolder,
        traffic: Traffic,
    ) -> None:
        self.members, self.problem, self.settings, self.replica = members, problem, problem.settings, replica
        self.journal, self.folder, self.traffic = journal, folder, traffic
        self.exchanges = Exchanges(
            grid, members, replica, journal, self.settings, folder.path, traffic, lambda: self.trainer.seconds_moving
        )
        self.rounds = Rounds(members, self.exchanges, problem, replica, journal, folder, traffic)
        self.trainer = Trainer(
            replica,
            journal,
            folder,
            self.settings,
            problem.evaluate,
            self._show,
            traffic.latest,
            self.rounds.note,
        )

        self.progress = Progress("round", self.settings.rounds)

    def run(self) -> dict[str, Any]:
        self.problem.keep_baselines(self.replica.model, self.folder)
        with sinks.opened(self.settings, self.folder.path, self._show) as self.trainer.show:
            totals = self.trainer.run(self.settings.rounds, self.rounds.measure)
        digests = self.exchanges.digests(self.members.there(), "end")
        wrong = self._wrong(digests)
        if wrong:
            self._rebuild(wrong)
            digests |= self.exchanges.digests(wrong, "end")
            wrong = self._wrong(digests)
        own = self.replica.digest()
        for client in wrong:
            what = f"with {digests[client]}, not {own}" if digests[client] else "without saying with which weights"
            print(f"client {client} ends {what}: do not trust its machine", file=sys.stderr, flush=True)
        extra = self.traffic.summary(self.members.bytes) | {
            "client_digests": {str(c): digest for c, digest in sorted(digests.items())},
            "wrong_digests": {str(c): digests[c] for c in wrong},
        }
        draw("federation", self.folder, len(self.members.found))  # before the end, which may be that it diverged
        summary = finish(self.problem, self.replica, self.journal, self.folder, totals, extra)
        answered = list(digests.values()).count(own)
        print(
            f"held-out {summary['eval_loss_start']:.4f} -> {summary['eval_loss_end']:.4f} "
            f"({Coverage(**summary['evaluated'])}); the replay and "
            f"{'all' if answered == len(digests) else f'{answered} of'} {len(digests)} clients end with the server's "
            f"weights; results in {self.folder.path}",
            flush=True,
        )
        return summary

    def _wrong(self, digests: Mapping[int, str]) -> list[int]:
        """Clients with other weights than the server's; where all are needed, also those that gave no answer."""
        own = self.replica.digest()
        return [c for c, digest in sorted(digests.items()) if digest != own and (digest or self.members.strict)]

    def _rebuild(self, clients: Iterable[int]) -> None:
        """Have clients start anew when they are next asked."""
        for client in clients:
            print(f"client {client}: its weights are not the run's; it replays all from the base", flush=True)
            member = self.members.found[client]
            member.rebuild, member.updates = True, set()

    def _show(self, row: Row) -> None:
        round_, now, slope_size = row["step"], self.traffic.now, self.rounds.slope_size
        pace = self.progress.pace(row)
        held_out = f"  held-out {row['eval_loss']:.4f}" if row.get("eval_loss") is not None else ""
        if held_out and self.settings.client_held_out_fraction and not self.settings.losses_withheld:
            held_out += self.exchanges.evaluations(round_)
        if round_ == 0:
            log.tell(f"round 0{held_out}")
            return
        self.traffic.tell(row, slope_size)
        interval = self.settings.weight_check_interval
        if interval and round_ % interval == 0 and round_ < self.settings.rounds:
            self._rebuild(self._wrong(self.exchanges.digests(self.members.there())))
        used, asked = now.results["used"], max(1, now.asked)
        told = "loss withheld" if self.settings.losses_withheld and used else "skipped"
        loss = told if row.get("loss") is None else f"loss {row['loss']:.4f}"
        slopes = "" if slope_size is None else f"  slopes {slope_size:.3g}"
        lost = "".join(
            f"  {count} {what}" for what, count in (("rejected", now.rejected), ("late", now.results["late"])) if count
        )
        log.tell(
            f"round {round_}/{self.settings.rounds}  {loss}{held_out}{slopes}  {used} of {now.asked} replies{lost}  "
            f"up {now.up // asked} B  down {now.down // asked} B a client  {row['seconds']:.1f} s  {pace}"
        )
        self.traffic.begin()  # rounds that the same exchange asked for have cost nothing more
