"""What may be said of runs, and the page that says it."""

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from zofed.experiments import comparisons, report, report_bytes
from zofed.experiments.arms import Arm
from zofed.runs.run_result import Result

Command = Callable[..., tuple[int, str, str]]


def result(end: float, seed: int = 0, cost: float = 100.0, **more: Any) -> Result:
    columns = {
        "step": np.arange(3.0),
        "eval_loss": np.array([6.0, (6.0 + end) / 2, end]),
        "forward_equivalents": np.array([0.0, cost / 2, cost]),
        "seconds": np.array([0.0, 1.0, 2.0]),
        "bytes": np.zeros(3),
    }
    summary = {"status": "completed", "eval_loss_end": end} | more.pop("summary", {})
    return Result(Path(f"run-{seed}"), {"seed": seed} | more, summary, columns)


def arm(name: str, *ends: float, **more: Any) -> Arm:
    return Arm(name, {}, [result(end, seed, **more) for seed, end in enumerate(ends)])


# --- statistics, against values worked out by hand ---


def test_an_interval_is_students() -> None:
    found = comparisons.estimate([1.0, 2.0, 3.0])
    half = 4.303 / math.sqrt(3)
    assert (found.mean, found.deviation, found.n) == (2.0, 1.0, 3)
    assert (found.low, found.high) == pytest.approx((2 - half, 2 + half))
    one = comparisons.estimate([5.0])
    assert one.n == 1 and math.isnan(one.deviation) and not one.is_clear
    assert [comparisons.t(n) for n in (1, 2, 30, 100)] == [12.706, 4.303, 2.042, 2.042]


def test_seeds_in_common_are_compared_in_pairs() -> None:
    # Seeds spread widely and differences do not: paired, the difference is clear; unpaired it would not be.
    a, b = {1: 1.0, 2: 2.0, 3: 3.0}, {1: 1.1, 2: 2.2, 3: 3.15}
    paired, by_seed = comparisons.difference(a, b)
    assert by_seed and paired.mean == pytest.approx(0.15) and paired.is_clear
    welch, by_seed = comparisons.difference(a, {4: 1.1, 5: 2.2, 6: 3.15})
    assert not by_seed and welch.mean == pytest.approx(0.15) and not welch.is_clear
    # variances 1 and 1.0525 over 3: error 0.8272, 3.997 degrees of freedom, which counts as 3
    assert welch.high - welch.mean == pytest.approx(3.182 * math.sqrt((1 + 1.0525) / 3), rel=1e-3)


def test_equal_cost_is_read_between_evaluations() -> None:
    cheap, dear = arm("cheap", 4.0, 4.0), arm("dear", 3.0, 3.0, cost=400.0)
    assert comparisons.least([cheap, dear], "forward_equivalents") == 100
    there = comparisons.at_cost(dear, "forward_equivalents", 100.0)
    assert there and there.mean == pytest.approx(6.0 - 1.5 / 2)
    assert math.isnan(comparisons.least([cheap, dear], "bytes"))


# --- sentences ---


def said(*arms: Arm) -> str:
    return "\n".join(comparisons.sentences(arms))


def test_the_winner_is_told_with_its_margin_and_uncertainty() -> None:
    told = said(arm("b", 3.5, 3.62, 3.7), arm("a", 3.0, 3.1, 3.2))
    assert "Lowest held-out loss: a, 3.1000 nats (standard deviation 0.1000, n = 3 seeds)." in told
    assert "b ends 0.5067 nats above a (95 % t interval +0.4" in told and "paired by seed, n = 3" in told


def test_what_cannot_be_told_apart_is_not_called_a_win() -> None:
    told = said(arm("a", 3.0, 3.2, 3.1), arm("b", 3.1, 3.0, 3.3))
    assert "b and a cannot be told apart: +0.0333 nats" in told and "above" not in told


def test_few_seeds_unequal_cost_edges_and_controls_are_told() -> None:
    alone = said(arm("a", 3.0), arm("b", 4.0))
    assert "n = 1 no interval can be given" in alone and "Fewer than 3 seeds" in alone
    told = said(arm("cheap", 4.0, 4.1, 4.2), arm("dear", 3.0, 3.1, 3.2, cost=400.0))
    assert "At equal cost, 100 forward-equivalents, which all arms have spent: cheap is lowest with 4.1000" in told
    tried = [result(2.0, **{"learning-rate": rate}) for rate in (0.1, 0.2, 0.3)]
    edge = Arm("edge", {}, [result(2.0, 1, **{"learning-rate": 0.3})], tried)
    inside = Arm("inside", {}, [result(2.1, 1, **{"learning-rate": 0.2})], tried)
    assert "a better one may lie beyond: edge." in said(edge, inside)
    controls = {"controls": {"frozen": 6.0, "random_slopes": 6.5}}
    told = said(arm("a", 5.0, 5.1, 5.2, summary=controls))
    assert (
        "0.9000 nats below weights that never moved (n = 3" in told and "1.4000 nats below steps of equal size" in told
    )
    worse = said(arm("a", 7.0, summary=controls))
    assert "1.0000 nats above weights that never moved" in worse
    assert said(Arm("a", {}, [])) == "No run is complete: there is nothing to say yet."


def test_accuracies_are_compared_in_points_of_a_per_cent() -> None:
    def scored(name: str, *scores: float) -> Arm:
        return Arm(name, {}, [result(0.5, seed, summary={"accuracy": score}) for seed, score in enumerate(scores)])

    told = said(scored("zo", 0.70, 0.72, 0.74), scored("fo", 0.80, 0.82, 0.84))
    assert "Highest accuracy: fo, 82.0 % (n = 3, standard deviation 2.0)." in told
    assert "Accuracy of zo: 72.0 %, 10.0 points below fo; difference +10.0 (95 % t interval +10.0 to +10.0" in told
    told = said(scored("zo", 0.70, 0.90, 0.74), scored("fo", 0.80, 0.82, 0.84))
    assert "not told apart from fo; difference +4.0" in told
    told = said(scored("zo", 0.70), scored("fo", 0.80))
    assert "not told apart from fo; difference +10.0 (no interval, paired by seed, n = 1)" in told
    assert "ccuracy" not in said(arm("a", 3.0, 3.1))


def test_arms_are_compared_by_the_metric_of_their_task() -> None:
    def scored(name: str, score: float, metric: str) -> Arm:
        return Arm(name, {}, [result(0.5, 0, summary={"accuracy": 0.5, "token_f1": score}, metric=metric)])

    told = said(scored("zo", 0.70, "token_f1"), scored("fo", 0.80, "token_f1"))
    assert "Highest token_f1: fo, 80.0 % (n = 1)." in told and "accuracy" not in told
    assert "Highest" not in said(scored("zo", 0.70, "token_f1"), scored("fo", 0.80, "accuracy"))


# --- the page ---


def test_an_arm_without_a_score_stands_beside_one_that_has_it() -> None:
    answered = Arm("fo", {}, [result(0.5, seed, summary={"rouge_l": 0.2}, metric="rouge_l") for seed in (0, 1)])
    silent = Arm("zo", {}, [result(0.6, seed, metric="rouge_l") for seed in (0, 1)])
    head, rows = report._arms([answered, silent])
    assert [row[head.index("rouge_l")] for row in rows] == ["0.2000 ± 0.0000", ""]


def test_a_table_of_pairs_sets_each_arm_against_each_better_one() -> None:
    arms = [arm("c", 5.0, 5.1), arm("a", 3.0, 3.1), arm("b", 3.0, 3.2)]
    found = report._pairs(arms)
    assert found
    head, rows = found
    assert head == ["", "(1) a", "(2)"] and [row[0] for row in rows] == ["(2) b", "(3) c"]
    assert (
        rows[0][1].startswith("+0.050 (-0.585 to +0.685)")
        and rows[1][1].startswith("+2.000")
        and rows[1][2].endswith("*")
    )
    assert report._pairs(arms[:2]) is None


def test_bytes_of_federations_stand_beside_flowertunes_budget() -> None:
    def sent(megabytes: float) -> dict[str, Any]:
        share, up = megabytes / 200_000, megabytes * 2**19
        each = {"bytes_up_per_client_round": up, "bytes_down_per_client_round": 2 * up, "bytes_beside_rounds": 2**19}
        return {"summary": {"flowertune_megabytes": megabytes, "flowertune_budget_share": share, **each}}

    arms = [arm("lora", 3.0, 3.1, **sent(40_000.0)), arm("subspace", 3.2, **sent(0.5)), arm("alone", 3.0)]
    found = report_bytes.table(arms)
    assert found and [len(row) for row in found[1]] == [len(found[0])] * 2, "a run alone sends nothing"
    assert found[1][0] == ["subspace", "1", "0", "0.5", "0.5", "0.00025 %", "262,144", "524,288"]
    assert found[1][1][4:6] == ["40,000", "20 %"]
    assert report_bytes.table([arm("alone", 3.0), arm("spoilt", 3.0, summary={"flowertune_megabytes": "x"})]) is None


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A folder as a sweep leaves it, of runs made in this process."""
    from zofed.experiments import sweep_file
    from zofed.experiments.sweep_folder import SweepFolder
    from zofed.training import central

    folder = SweepFolder(tmp_path_factory.mktemp("swept") / "a <b> sweep")
    text = f"""
    about = "is <i>fo</i> lower & cheaper?"
    seeds = [0, 1]
    [base]
    dataset = "{corpus}"
    block-size = 16
    batch-size = 2
    queries = 3
    steps = 4
    eval-interval = 2
    eval-examples = 8
    save-interval = 0
    device = "cpu"
    controls = true
    [grid]
    mode = ["zo", "fo"]
    """
    file = folder.path.parent / "file.toml"
    file.write_text(text)
    sweep = sweep_file.read(file)
    with folder.opened():
        folder.begin(sweep)
        for run in sweep.first():
            central.train(run.settings, folder.run_path(run), lambda row: None)
        folder.write_failures({"mode=fo,seed=9": "it diverged & stopped"})
        folder.write_summary({run.name: run for run in sweep.first()})
    return folder.path


@pytest.mark.slow
def test_the_page_holds_all_of_it_and_needs_nothing_else(swept: Path, zofed_command: Command) -> None:
    status, told, errors = zofed_command("report", swept)
    assert status == 0, errors
    assert "- Lowest held-out loss: mode=" in told
    page = (swept / "report.html").read_text()
    assert "is &lt;i&gt;fo&lt;/i&gt; lower &amp; cheaper?" in page and "<i>fo" not in page
    assert "Differences between arms" not in page, "two arms need no table of pairs"
    pictures = re.findall(r'src="([^"]{30})', page)
    assert len(pictures) == 3 and all(one.startswith("data:image/png;base64,") for one in pictures)
    assert not re.search(r'(src|href)="(?!data:)', page) and "http" not in page
    for path in (swept / "runs").iterdir():
        summary = json.loads((path / "summary.json").read_text())
        assert summary["journal_head"] in page and summary["digest"][:16] in page
    assert "it diverged &amp; stopped" in page and "weights that never moved" in page
    session = json.loads((swept / "sessions.json").read_text())[0]
    assert session["versions"]["torch"] in page and session["began"] in page
    summary = (swept / "summary.md").read_text()
    assert summary.startswith("# a <b> sweep: is <i>fo</i>") and "| mode=fo | 2 |" in summary
    assert "is &lt;" not in summary and "failed: mode=fo,seed=9" in summary
    for arm_name in ("mode=zo", "mode=fo"):
        ends = [
            json.loads((swept / "runs" / f"{arm_name},seed={n}" / "summary.json").read_text())["eval_loss_end"]
            for n in (0, 1)
        ]
        assert f"{np.mean(ends):.4f} ± {np.std(ends, ddof=1):.4f}" in summary


@pytest.mark.slow
def test_a_page_of_runs_that_are_cut_or_without_a_sweep_tells_so(swept: Path, tmp_path: Path) -> None:
    shutil.copytree(swept / "runs", tmp_path / "loose")
    (tmp_path / "loose" / "mode=zo,seed=0" / "summary.json").write_text('{"status": "running"}')
    page, summary = report.write_report(tmp_path / "loose", 0)
    assert "unknown: not made by zofed sweep" in page.read_text()
    assert "not finished, shown as far as they are: mode=zo,seed=0" in summary.read_text()
    broken = tmp_path / "broken"
    shutil.copytree(swept, broken)
    (broken / "sweep.toml").write_text("[base]\nfrom-another-version = 1\n")
    _, summary = report.write_report(broken, 0)
    assert "arms are told by the runs' settings alone" in summary.read_text()
