"""Commands on a run's journal: `zofed journal show`, `verify`, `replay` and `repair`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from zofed.base.errors import UserError
from zofed.commands.console import AsJson, console, print_json
from zofed.commands.groups import CommandGroup
from zofed.runs.run_folder import RunFolder

if TYPE_CHECKING:
    from zofed.core.journal import Survey
    from zofed.runs.repair import Lost

journal_app = typer.Typer(
    cls=CommandGroup, no_args_is_help=True, help="Read, check, replay and repair the journal of a run."
)


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.add_typer(journal_app, name="journal")


@journal_app.command("show")
def journal_show(
    folder: Annotated[Path, typer.Argument(help="folder of a run")],
    last: Annotated[int, typer.Option(min=0, help="show only this many of the newest records; 0: all")] = 20,
    as_json: AsJson = False,
) -> None:
    """A table of the records: round, kind, rate, clients, queries, size of the slopes."""
    from zofed.core import aggregation, journal
    from zofed.core.records import Dense, Guided, Seeded, Skipped

    contents = journal.read(RunFolder.open(folder).journal)
    found: list[dict[str, Any]] = []
    for entry in contents.entries[-last:] if last else contents.entries:
        record = entry.record
        kind = {Seeded: "seeded", Dense: "dense", Guided: "guided"}.get(type(record), "skipped")
        row: dict[str, Any] = {"round": record.round, "kind": kind}
        row["rate"] = None if isinstance(record, Skipped) else record.rate
        of_slopes = isinstance(record, Seeded)
        row["clients"], row["queries"] = (len(record.clients), record.queries) if of_slopes else (None, None)
        row["slope rms"] = aggregation.size(record) if of_slopes else None
        found.append(row | {"bytes": len(entry.raw), "chain": entry.chain.hex()})
    if as_json:
        print_json(found)
        return
    columns = ("round", "kind", "rate", "clients", "queries", "slope rms", "bytes", "chain")
    table = Table(*columns, box=None)
    for row in found:
        shown = {"rate": "g", "slope rms": ".4g"}
        cells = ["" if row[key] is None else format(row[key], shown.get(key, "")) for key in columns[:-1]]
        table.add_row(*cells, row["chain"][:12])
    console.print(table)
    console.print(f"{len(contents.entries)} records, {contents.end} bytes, head {contents.head.hex()}")


@journal_app.command("verify")
def journal_verify(folder: Annotated[Path, typer.Argument(help="folder of a run")]) -> None:
    """Check every checksum, the chain, and that the journal is the one the run's summary names."""
    from zofed.core import journal

    run = RunFolder.open(folder)
    contents = journal.read(run.journal)
    if contents.torn:
        last = contents.entries[-1].record.round if contents.entries else 0
        remedy = f"{run.go_on()} cuts them off and goes on"
        raise UserError(f"journal {run.journal} ends in {contents.torn} torn bytes after round {last}: {remedy}")
    head = run.summary().get("journal_head")
    if head and head != contents.head.hex():
        raise UserError(
            f"journal {run.journal} is whole, but its head {contents.head.hex()} is not the one of the finished run, "
            f"{head}: it was cut or exchanged; restore it from a copy"
        )
    told = "as in summary.json" if head else "the run has no summary yet to compare it with"
    console.print(f"{len(contents.entries)} records whole, chain unbroken, head {contents.head.hex()}: {told}")


@journal_app.command("replay")
def journal_replay(
    folder: Annotated[Path, typer.Argument(help="folder of a run")],
    base: Annotated[str, typer.Option(help="where the saved model the run began with lies now")] = "",
    threads: Annotated[int, typer.Option(min=1, help="CPU threads; the weights do not depend on them")] = 1,
) -> None:
    """Rebuild the weights from the base and the journal alone, and compare them with the run's."""
    from zofed.training.finalize import replay_run

    run = RunFolder.open(folder)
    replica, start = replay_run(run, base, threads)
    if start:
        console.print(
            f"rounds 1 to {start} hold first-order steps whose gradients are not kept whole, which a journal cannot "
            "rebuild: started from their checkpoint"
        )
    digest, expected = replica.digest(), run.summary().get("digest")
    console.print(f"rounds {start + 1} to {replica.round} replayed" if replica.round > start else "no rounds to replay")
    console.print(f"weights SHA-256 {digest}")
    if expected is None:
        console.print("the run has not ended: no digest to compare with")
    elif digest == expected:
        console.print("equal to the run's weights")
    else:
        raise UserError(
            f"the run's weights are {expected}, the journal gives others: it was cut or exchanged; "
            "zofed journal verify tells more, restore it from a copy"
        )


@journal_app.command("repair")
def journal_repair(
    folder: Annotated[Path, typer.Argument(help="folder of a run")],
    to: Annotated[int | None, typer.Option(help="cut behind this round; left out: tell, and change nothing")] = None,
) -> None:
    """Tell up to which round the journal is whole; with --to, cut the run back to a round and keep the rest aside."""
    from zofed.core import journal
    from zofed.runs import repair

    run = RunFolder.open(folder)
    found = journal.survey(run.journal)
    last = found.contents.last_round
    if to is None or (to == last and not found.damage):
        _tell_damage(run, found)
        if not found.damage:
            back = f"; to go back to an earlier round: {repair.command(run, 'ROUND')}" if last else ""
            console.print(f"there is nothing to repair{back}", markup=False)
            return
        whole = repair.last_to_go_on_from(run, found)
        if whole < last:
            why = repair.refusal(run, found.contents.entries, last)
            console.print(f"the run can go on from round {whole}, not from round {last}: {why}", markup=False)
        _tell_lost(f"cutting behind round {whole} would put aside", repair.lost(run, found, whole))
        console.print(f"nothing was changed; this cuts: {repair.command(run, whole)}", markup=False)
        return
    repair.check(run, found, to)
    lost = repair.lost(run, found, to)
    aside = repair.cut(run, to)
    _tell_lost(f"the run ends with round {to} now; put aside, whole, in {aside}", lost)
    console.print(f"go on from there: {run.go_on()}", markup=False)


def _tell_damage(run: RunFolder, found: "Survey") -> None:
    """Up to where a journal is whole, and what is wrong behind that."""
    whole = f"journal {run.journal} is whole up to round {found.contents.last_round}"
    if not found.damage:
        console.print(f"{whole}, its last, byte {found.contents.end}", markup=False)
        return
    console.print(f"{whole}, byte {found.contents.end}; behind it {found.damage}", markup=False)
    if found.is_torn:
        console.print(f"a torn end, of which nobody was told, is cut off by itself: {run.go_on()}", markup=False)
    elif found.behind:
        count, first, last = len(found.behind), min(found.behind), max(found.behind)
        which = f"of round {first}" if count == 1 else f"of rounds {first} to {last}"
        are = "1 whole record stands" if count == 1 else f"{count} whole records stand"
        console.print(
            f"{are} behind the damage, {which}: useless, since weights move by every record in turn", markup=False
        )


def _tell_lost(what: str, lost: "Lost") -> None:
    """What a cut puts aside."""
    first, last = lost.rounds
    rounds = "no round" if last < first else f"round {first}" if first == last else f"rounds {first} to {last}"
    seconds = f", {lost.seconds:.1f} seconds of training" if lost.seconds else ""
    console.print(f"{what}: {rounds} with their lines in the tables{seconds}", markup=False)
    for name in lost.files:
        console.print(f"  {name}", markup=False)
