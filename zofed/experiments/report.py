"""One page that tells what a sweep found: sentences, tables and pictures in a single HTML file, and a summary.md."""

import contextlib
import html
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from zofed import config
from zofed.base.errors import UserError
from zofed.base.files import write_private
from zofed.experiments import comparisons, plot_arms, plot_run, plot_sweep, report_bytes, report_scores
from zofed.experiments.arms import Arm, collect, differing, grouped, incomparable, sweep_of
from zofed.experiments.html_page import Page, Rows
from zofed.experiments.sweep_folder import SweepFolder
from zofed.runs.run_folder import timestamp
from zofed.runs.run_result import Result

MOST_PAIRED = 10  # arms whose differences one table shows


def write_report(path: Path, points: int) -> tuple[Path, Path]:
    """Write report.html and summary.md into a folder of runs; returns their paths.

    points: steps at which slopes are set against backpropagation, by replay; 0: none. Raises UserError where not one
    run can be read; what cannot be read or drawn besides is told in the page.
    """
    path = config.absolute(path, "folder")
    found, notes = collect([path])
    arms, folder = grouped(found), SweepFolder(path)
    about = ""
    with contextlib.suppress(UserError):  # told among the notes already
        about = sweep.about if (sweep := sweep_of(path)) else ""
    page = Page(f"{path.name}: {about}" if about else path.name)
    page.parts.append(f"<h1>{html.escape(page.title)}</h1><p>{len(found)} runs, {len(arms)} arms; {timestamp()}</p>")
    page.summary += [f"# {page.title}", ""]
    page.heading("What the runs say", short=True)
    page.sentences([*comparisons.sentences(arms), *filter(None, [incomparable(found)])], short=True)
    page.heading("Arms", short=True)
    page.table(*_arms(arms), short=True)
    page.sentences([plot_arms.EQUIVALENTS, f"± is the standard deviation over seeds; {_rule(arms)}"], short=True)
    if scores := report_scores.table(arms):
        page.heading("Scores", short=True)
        page.table(*scores, short=True)
        page.sentences([report_scores.TOLD], short=True)
    if sent := report_bytes.table(arms):
        page.heading("Bytes of federations", short=True)
        page.table(*sent, short=True)
        page.sentences([report_bytes.TOLD], short=True)
    if pairs := _pairs(arms):
        page.heading("Differences between arms")
        page.table(*pairs)
        told = (
            "row above the arm whose number heads the column, in nats at the end, with the 95 % t interval of the pair"
        )
        page.sentences([f"{told} alone; * holds no zero"])
    failed = folder.failures()
    if notes or failed:
        page.heading("Left out, failed, not finished", short=True)
        page.sentences([*notes, *(f"failed: {name}: {error}" for name, error in failed.items())], short=True)
    page.heading("Pictures")
    _pictures(page, path, found, arms, points)
    if controls := _controls(arms):
        page.heading("Controls")
        page.table(*controls)
    if answers := report_scores.samples(found):
        page.heading("Samples")
        for told, table in answers:
            page.table(*table, folded=told)
    page.heading("Settings")
    _settings(page, found, arms)
    page.heading("Runs")
    page.table(*_runs(found), folded=f"all {len(found)} runs: losses, digests, journal heads, costs")
    page.heading("Environment")
    page.table(*_sessions(folder))
    written = path / "report.html", path / "summary.md"
    for target, text in zip(written, (page.to_html(), "\n".join(page.summary)), strict=True):
        write_private(target, text)
    return written


def _arms(arms: Sequence[Arm]) -> tuple[list[str], Rows]:
    """The table of arms, the best first: losses at the end and at equal cost, and what they cost."""
    known = sorted(arms, key=lambda arm: arm.mean)
    head, rows = ["arm", "n", "end loss", "95 % interval", "lowest loss"], []
    equal = [(column, cost) for column in comparisons.COSTS if math.isfinite(cost := comparisons.least(known, column))]
    head += [f"at {comparisons.said(cost)} {comparisons.COSTS[column]}" for column, cost in equal]
    scored = any(math.isfinite(result.score) for arm in arms for result in arm.results)
    metrics = {result.metric for arm in arms for result in arm.results}
    head += [next(iter(metrics)) if len(metrics) == 1 else "score"] * scored
    head += ["forward passes", "backward passes", "forward-equivalents", "seconds", "bytes", "peak MiB"]
    for arm in known:
        done = [result for result in arm.results if result.is_complete]
        row = [arm.name, str(len(done))]
        if not done:
            rows.append(row + ["not complete"] + [""] * (len(head) - 3))
            continue
        ends = comparisons.estimate([result.end for result in done])
        row += [_plus(ends), f"{ends.low:.4f} to {ends.high:.4f}" if ends.n > 1 else ""]
        row.append(_plus(comparisons.estimate([result.best for result in done])))
        row += [_plus(there) if (there := comparisons.at_cost(arm, column, cost)) else "" for column, cost in equal]
        if scored:
            named = f" {done[0].metric}" if len(metrics) > 1 else ""
            # Where a model answered nothing it has no score of its answers.
            scores = [result.score for result in done if math.isfinite(result.score)]
            row.append(_plus(comparisons.estimate(scores)) + named if scores else "")
        for column in ("forward_passes", "backward_passes", "forward_equivalents", "seconds", "bytes"):
            row.append(_mean([result.total(column) for result in done]))
        row.append(_mean([result.summary.get("peak_memory_bytes", math.nan) / 2**20 for result in done]))
        rows.append(row)
    return head, rows


def _pairs(arms: Sequence[Arm]) -> tuple[list[str], Rows] | None:
    """How much higher each arm ends than each better one; None for fewer than three, or more than a page can hold."""
    known = sorted((arm for arm in arms if arm.ends), key=lambda arm: arm.mean)
    if not 3 <= len(known) <= MOST_PAIRED:
        return None
    rows: Rows = []
    numbered = [f"({at}) {arm.name}" for at, arm in enumerate(known, 1)]
    for at, arm in enumerate(known[1:], 1):
        cells = []
        for better in known[:at]:
            found, _ = comparisons.difference(better.ends, arm.ends)
            interval = f" ({found.low:+.3f} to {found.high:+.3f})" if found.n > 1 else " (n = 1)"
            cells.append(f"{found.mean:+.3f}{interval}{'*' * found.is_clear}")
        rows.append([numbered[at], *cells, *[""] * (len(known) - 1 - at)])
    return ["", numbered[0], *(f"({at})" for at in range(2, len(known)))], rows


def _plus(found: comparisons.Estimate) -> str:
    return f"{found.mean:.4f}" + (f" ± {found.deviation:.4f}" if found.n > 1 else "")


def _mean(values: Sequence[float]) -> str:
    known = [value for value in values if math.isfinite(value)]
    return comparisons.said(sum(known) / len(known)) if known else ""


def _rule(arms: Sequence[Arm]) -> str:
    """How each arm's tuned settings were chosen, in words."""
    if not any(arm.chosen_from for arm in arms):
        return "nothing was tuned: each arm ran at the settings it was given"
    counts = sorted({len(arm.chosen_from) for arm in arms if arm.chosen_from})
    tried = " or ".join(map(str, counts))
    return (
        f"each arm's tuned settings are the best of {tried} values by the end loss of the first seed, which is not "
        "among the seeds reported (an arm without others shows that seed itself)"
    )


def _pictures(page: Page, path: Path, found: Sequence[Result], arms: Sequence[Arm], points: int) -> None:
    """The pictures that these runs allow; a sentence for one that cannot be drawn."""
    modes = {str(result.settings["mode"]) for result in found}
    drawn: list[tuple[str, str, Callable[[Path], Path]]] = [
        ("compare", "Losses against what they cost", lambda out: plot_arms.compare(arms, [], out))
    ]
    if len(arms) > 1:
        drawn.append(("sweep", "End losses over the settings that vary", lambda out: plot_sweep.sweep(found, out)))
    if {"fo", "zo"} <= modes:
        drawn.append(("fo-vs-zo", "First order beside zeroth order", lambda out: plot_arms.fo_vs_zo(arms, out)))
    if modes & {"zo", "instruct", "calibrate"}:
        drawn.append(("zo", "Zeroth order's settings and slopes", lambda out: plot_sweep.zo(found, out, points)))
    best_first = [result for arm in sorted(arms, key=lambda arm: arm.mean) for result in arm.results]
    if federated := [result for result in best_first if (result.path / "rounds.csv").exists()]:
        told = f"One run of the best federated arm: {federated[0].name}"
        drawn.append(("federated", told, lambda out: plot_run.federated(federated[0], out)))
    for name, told, draw in drawn:
        page.parts.append(f"<h3>{html.escape(told)}</h3>")
        try:
            page.picture(draw(path / f"{name}.png"), told)
        except UserError as error:
            page.sentences([f"not drawn: {error}"])


def _controls(arms: Sequence[Arm]) -> tuple[list[str], Rows] | None:
    rows: Rows = []
    for arm in arms:
        own = [result for result in arm.results if result.summary.get("controls")]
        if own:
            row = [arm.name, str(len(own)), _plus(comparisons.estimate([result.end for result in own]))]
            for key in comparisons.CONTROLS:
                known = [result.summary["controls"][key] for result in own if key in result.summary["controls"]]
                row.append(_plus(comparisons.estimate(known)) if known else "")
            rows.append(row)
    return (["arm", "n", "end loss", *comparisons.CONTROLS.values()], rows) if rows else None


def _settings(page: Page, found: Sequence[Result], arms: Sequence[Arm]) -> None:
    differ = differing(found)
    rows = [[arm.name, *(_said(arm.results[0].settings.get(key)) for key in differ)] for arm in arms]
    if differ:
        page.table(["arm", *differ], rows)
    same = [[key, _said(value)] for key, value in found[0].settings.items() if key not in (*differ, "seed", "out")]
    page.table(["setting", "value"], same, folded="settings that all runs share")


def _said(value: Any) -> str:
    return (
        json.dumps(value) if isinstance(value, bool | str) else f"{value:g}" if isinstance(value, float) else str(value)
    )


def _runs(found: Sequence[Result]) -> tuple[list[str], Rows]:
    head = [
        "run",
        "status",
        "seed",
        "end loss",
        "lowest",
        "seconds",
        "weights SHA-256",
        "journal head",
        "replay",
        "zofed",
    ]
    rows: Rows = []
    for result in found:
        summary: Mapping[str, Any] = result.summary
        digest, replayed = summary.get("digest", ""), summary.get("replay_digest")
        row = [result.name, summary.get("status", "no summary"), str(result.settings["seed"])]
        row += [f"{loss:.4f}" if math.isfinite(loss) else "" for loss in (result.end, result.best)]
        row += [_mean([result.total("seconds")]), digest[:16] and f"{digest[:16]}...", summary.get("journal_head", "")]
        row += ["" if not replayed else "equal" if replayed == digest else "DIFFERENT"]
        rows.append([*row, summary.get("versions", {}).get("zofed", "")])
    return head, rows


def _sessions(folder: SweepFolder) -> tuple[list[str], Rows]:
    unknown = [["unknown: not made by zofed sweep", "", "", "", ""]]
    rows = [
        [
            session.get("began", ""),
            session.get("commit", "") or "not from a checkout",
            session.get("machine", ""),
            ", ".join(f"{name} {version}" for name, version in session.get("versions", {}).items()),
            session.get("command", ""),
        ]
        for session in folder.sessions()
    ]
    head = ["began", "commit", "machine", "versions", "command"]
    return head, rows or unknown
