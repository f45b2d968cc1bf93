"""Pictures of runs: what they show, and what they say of what they leave out."""

import itertools
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib.colors
import numpy as np
import pytest

from zofed.base.errors import UserError
from zofed.experiments import plot_arms, plot_run, plot_scores, plot_sweep
from zofed.experiments.arms import Arm, collect, grouped, incomparable, run_folders
from zofed.federated import client, server
from zofed.federated.local_grid import LocalGrid
from zofed.runs import plot_style, run_result
from zofed.runs.run_result import Result
from zofed.training import central

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """Two seeds each of a zo and an fo run, and a federated one."""
    from zofed import config

    folder = tmp_path_factory.mktemp("runs")
    common = {"dataset": str(corpus), "block-size": 16, "batch-size": 2, "queries": 3, "steps": 6, "rounds": 6}
    common |= {"eval-interval": 3, "eval-examples": 8, "save-interval": 0, "device": "cpu", "controls": True}
    for mode, seed in itertools.product(("zo", "fo"), (0, 1)):
        settings = config.resolve(common | {"mode": mode, "seed": seed})
        central.train(settings, folder / f"{mode}-{seed}", lambda row: None)
    values = common | {
        "clients": 3,
        "participation": 0.7,
        "out": str(folder / "federated"),
        "client-held-out-fraction": 0.2,
    }
    server.run(LocalGrid(client.app, 3, values), config.resolve(values), "")
    return folder


@pytest.fixture
def runs(made: Path, tmp_path: Path) -> Path:
    """A copy of the central runs that a test may spoil."""
    for path in made.iterdir():
        if path.name != "federated":
            shutil.copytree(path, tmp_path / "runs" / path.name)
    return tmp_path / "runs"


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Sequence[str]]]:
    """(figure, notes) of every picture, which is written as ever."""
    found: list[tuple[Any, Sequence[str]]] = []
    save = plot_style.save

    def keep(figure: Any, path: Path, title: str = "", notes: Sequence[str] = (), legend_of: Any = None) -> Path:
        found.append((figure, notes))
        return save(figure, path, title, notes, legend_of)

    monkeypatch.setattr(plot_style, "save", keep)
    return found


def line(place: Any, label: str) -> Any:
    return next(each for each in place.lines if each.get_label() == label)


def test_curves_can_be_told_apart_in_grey_and_by_any_eye() -> None:
    strokes = [plot_style.stroke(index) for index in range(plot_style.MOST)]
    assert len({(repr(one.dash), one.marker) for one in strokes}) == len(strokes)
    assert len({one.hatch for one in strokes}) == len(strokes)
    grey = [float(np.dot(matplotlib.colors.to_rgb(one.color), (0.3, 0.59, 0.11))) for one in strokes]
    assert all(abs(a - b) > 0.1 for a, b in itertools.pairwise(grey[:8])), (
        "neighbours in the legend look alike in print"
    )


@pytest.mark.slow
def test_compare_shows_mean_and_range_of_the_seeds_against_each_cost(runs: Path, drawn: Any, tmp_path: Path) -> None:
    found, notes = collect([runs])
    arms = grouped(found)
    assert [(arm.name, len(arm.results)) for arm in arms] == [("fo", 2), ("zo", 2)] and not notes
    path = plot_arms.compare(arms, [], tmp_path / "compare.png", notes)
    assert path.stat().st_size > 10_000
    figure, _ = drawn[0]
    places = figure.axes
    assert [place.get_xlabel() for place in places[2:4]] == ["forward-equivalents (examples)", "seconds of training"]
    assert places[0].get_ylabel() == "held-out loss (nats)"
    ends = [result.end for result in found if result.settings["mode"] == "zo"]
    curve = line(places[0], "zo (n = 2)")
    assert curve.get_ydata()[-1] == pytest.approx(np.mean(ends))
    assert curve.get_xdata()[-1] == 6 * 4 * 2, "6 steps of 4 passes of 2 examples"
    band = places[0].collections[1].get_paths()[0].vertices
    last = band[band[:, 0] == band[:, 0].max()][:, 1]
    assert (last.min(), last.max()) == pytest.approx((min(ends), max(ends)))


def test_a_running_mean_is_centred_and_keeps_a_constant() -> None:
    assert plot_arms.smoothed(np.full(7, 3.0)) == pytest.approx(np.full(7, 3.0))
    assert plot_arms.smoothed(np.array([0.0, 0, 0, 5, 0, 0, 0]))[3] == pytest.approx(1.0)
    assert plot_arms.smoothed(np.array([4.0, 6.0])) == pytest.approx([5.0, 5.0]) and not len(
        plot_arms.smoothed(np.zeros(0))
    )


def test_a_legend_is_no_wider_than_its_picture(tmp_path: Path) -> None:
    figure, places = plot_style.panels(1, 2)
    names = ["short", f"{'a name that goes on and on, ' * 12}(n = 2)"]
    for name in names:
        places[0, 0].plot([0, 1], [0, 1], label=name)
    plot_style.save(figure, tmp_path / "a.png", legend_of=places[0, 0])
    (legend,) = figure.legends
    box = legend.get_window_extent().transformed(figure.transFigure.inverted())
    assert box.x0 >= 0 and box.x1 <= 1 and box.y0 >= 0
    panel = places[0, 0].get_tightbbox().transformed(figure.transFigure.inverted())
    assert box.y1 <= panel.y0 and [" ".join(t.get_text().split()) for t in legend.get_texts()] == names


@pytest.mark.slow
def test_fo_vs_zo_takes_the_best_arm_of_each_mode_and_needs_both(runs: Path, drawn: Any, tmp_path: Path) -> None:
    found, _ = collect([runs])
    plot_arms.fo_vs_zo(grouped(found), tmp_path / "a.png")
    figure, _ = drawn[0]
    ends = [bar.lines[0].get_ydata()[0] for bar in figure.axes[2].containers]
    assert ends == pytest.approx([arm.mean for arm in grouped(found)]) and not figure.axes[2].patches
    assert all(patch.get_y() == 0 for patch in figure.axes[3].patches) and figure.axes[3].get_ylim()[0] == 0
    only = [result for result in found if result.settings["mode"] == "fo"]
    with pytest.raises(UserError, match="no run of mode zo"):
        plot_arms.fo_vs_zo(grouped(only), tmp_path / "b.png")


def fake(name: str, end: float, **settings: Any) -> Result:
    columns = {"step": np.arange(2.0), "eval_loss": np.array([6.0, end]), "loss": np.array([np.nan, end])}
    summary = {"status": "completed", "eval_loss_end": end, "eval_loss_start": 6.0}
    return Result(Path(name), {"seed": 0, "mode": "zo"} | settings, summary, columns)


GRID = {(2, 0.1): 5.0, (2, 0.2): 4.0, (8, 0.1): 3.0, (8, 0.2): 9.0}


@pytest.mark.slow
def test_a_heat_map_has_the_mean_of_the_seeds_at_the_best_of_the_rest(drawn: Any, tmp_path: Path) -> None:
    found = [
        fake(f"{n}", end + 0.2 * seed + (mode == "fo"), queries=q, seed=seed, mode=mode, **{"learning-rate": rate})
        for n, (((q, rate), end), seed, mode) in enumerate(itertools.product(GRID.items(), (0, 1), ("zo", "fo")))
    ]
    plot_sweep.sweep(found, tmp_path / "map.png")
    figure, _ = drawn[0]
    maps = {
        (place.get_ylabel(), place.get_xlabel()): place.images[0].get_array() for place in figure.axes if place.images
    }
    # ratio of rows to columns may turn the map; queries are 2 and 8, rates 0.1 and 0.2, both in their order
    assert np.asarray(maps["queries", "learning-rate"]) == pytest.approx(np.array([[5.1, 4.1], [3.1, 9.1]]))
    best = next(place for place in figure.axes if place.get_xlabel() == "queries" and not place.images)
    joined = next(each for each in best.lines if len(each.get_ydata()) == 2 and each.get_linestyle() == "-")
    assert list(joined.get_ydata()) == pytest.approx([4.1, 3.1])


def test_a_map_needs_runs_that_ended_and_differ(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run is complete"):
        plot_sweep.sweep([fake("a", float("nan"))], tmp_path / "x.png")
    with pytest.raises(UserError, match="do not differ but by their seed"):
        plot_sweep.sweep([fake("a", 1.0), fake("b", 2.0, seed=1)], tmp_path / "x.png")


@pytest.mark.slow
def test_zo_compares_slopes_with_backpropagation_along_the_way_once(runs: Path, drawn: Any, tmp_path: Path) -> None:
    found, notes = collect([runs])
    plot_sweep.zo(found, tmp_path / "zo.png", 2, notes)
    figure, told = drawn[0]
    assert any("not zeroth order, left out: fo-0, fo-1" in note for note in told)
    cosine = next(place for place in figure.axes if place.get_ylabel().startswith("cosine"))
    measured, exact, chance = cosine.lines
    assert list(measured.get_xdata()) == [0, 5]
    assert list(exact.get_ydata()) == pytest.approx([(3 / 141_056) ** 0.5] * 2, rel=0.05)
    assert list(chance.get_ydata()) == pytest.approx([(1 / 141_056) ** 0.5] * 2, rel=0.05)
    assert any("dashed, what exact slopes" in note and "dotted, what chance gives" in note for note in told)
    assert all(place.get_visible() for place in figure.axes)  # no empty panel
    kept = runs / "zo-0" / "course.csv"
    before = kept.stat().st_mtime_ns
    plot_sweep.zo(found, tmp_path / "again.png", 2, [])
    assert kept.stat().st_mtime_ns == before
    with pytest.raises(UserError, match="no run with zeroth-order steps"):
        plot_sweep.zo([result for result in found if result.settings["mode"] == "fo"], tmp_path / "x.png", 0)
    with pytest.raises(UserError, match="--points 5 shows how good"):
        plot_sweep.zo(found, tmp_path / "x.png", 0)


def test_cosines_that_all_arms_share_are_one_line(drawn: Any, tmp_path: Path) -> None:
    def guided(name: str, queries: int, kept: float, direction: float) -> Result:
        one = fake(name, 1.0, queries=queries, mode="instruct")
        more = {"cosine_kept": np.array([np.nan, kept]), "cosine_direction": np.array([np.nan, direction])}
        return Result(one.path, one.settings, one.summary, one.columns | more)

    plot_sweep.zo([guided("a", 2, 0.9, 0.7), guided("b", 4, 0.901, 0.5)], tmp_path / "zo.png", 0)
    figure, _ = drawn[0]
    cosine = next(place for place in figure.axes if place.get_ylabel().startswith("cosine"))
    labels = [each.get_label() for each in cosine.lines]
    assert labels == ["cosine kept, alike in 2 arms", "queries 2: cosine direction", "queries 4: cosine direction"]


def test_quick_shows_loss_rate_and_spread(runs: Path, drawn: Any, tmp_path: Path) -> None:
    result = run_result.read(runs / "zo-0")
    plot_run.quick(result, tmp_path / "quick.png")
    figure, notes = drawn[0]
    loss, rate, spread = figure.axes
    assert list(line(loss, "held out").get_ydata()) == pytest.approx(list(result.held_out[1]))
    assert set(rate.lines[0].get_ydata()[1:]) == {0.01}
    assert list(spread.lines[0].get_xdata()) == [1, 2, 3, 4, 5, 6] and "slopes" in spread.get_ylabel() and not notes


def test_federated_shows_who_took_part_and_refuses_other_runs(made: Path, drawn: Any, tmp_path: Path) -> None:
    plot_run.federated(run_result.read(made / "federated"), tmp_path / "federated.png")
    figure, notes = drawn[0]
    assert len(figure.axes) == 3 and "every answer was used" in notes  # no empty panel
    grid = np.asarray(figure.axes[0].images[0].get_array())
    assert grid.shape == (3, 6) and set(grid.sum(0)) == {2.0}, "two of three clients are asked in each round"
    with pytest.raises(UserError, match="no federated run"):
        plot_run.federated(run_result.read(made / "zo-0"), tmp_path / "x.png")


# --- what cannot be read ---


def test_what_was_cut_or_is_of_another_version_is_shown_as_far_as_it_goes_and_told(
    runs: Path, drawn: Any, tmp_path: Path
) -> None:
    metrics = runs / "zo-0" / "metrics.csv"
    metrics.write_text(metrics.read_text()[:-120])  # cut in the middle of a line
    old = runs / "zo-1" / "metrics.csv"
    old.write_text(old.read_text().replace("forward_equivalents", "queries_asked"))
    (runs / "zo-1" / "settings.toml").write_text('mode = "zo"\nseed = 1\nfrom-elsewhere = 3\n')
    (runs / "fo-0" / "summary.json").write_text('{"status": "interrupted"}')
    (runs / "fo-1" / "metrics.csv").unlink()
    found, notes = collect([runs])
    assert [result.name for result in found] == ["fo-0", "zo-0", "zo-1"]
    told = "\n".join(notes)
    assert "left out fo-1" in told and "not finished, shown as far as they are: fo-0" in told
    assert "metrics.csv was cut, shown as far as it goes: zo-0" in told
    plot_arms.compare(grouped(found), ["forward-equivalents"], tmp_path / "compare.png", notes)
    assert any("without forward_equivalents" in note and "zo-1" in note for note in drawn[0][1])


def test_no_run_to_draw_is_told(runs: Path, tmp_path: Path, zofed_command: Command) -> None:
    (tmp_path / "empty").mkdir()
    for words, what in (
        (("compare", tmp_path / "empty"), "holds no runs"),
        (("sweep", tmp_path / "nowhere"), "there is no folder"),
        (("quick", tmp_path / "empty"), "is not the folder of a run"),
        (("compare", runs, "--axis", "second"), "did you mean 'seconds'"),
    ):
        status, _, errors = zofed_command("plot", *words)
        assert status == 2 and what in errors, errors
    for path in runs.glob("*/metrics.csv"):
        path.write_text("")
    status, _, errors = zofed_command("plot", "compare", runs)
    assert status == 2 and "not one run can be read" in errors and "(and 3 more)" in errors
    old = next(runs.glob("*/metrics.csv"))
    old.write_text("step,loss\n0,1.0\n")
    status, _, errors = zofed_command("plot", "compare", old.parent, "--axis", "bytes")
    assert status == 2 and "no run has the column bytes" in errors


@pytest.mark.slow
def test_every_picture_has_a_command(made: Path, tmp_path: Path, zofed_command: Command) -> None:
    for words in (
        ("quick", made / "zo-0"), ("compare", made / "zo-0", made / "fo-0", "--axis", "tokens"), ("sweep", made),
        ("zo", made, "--points", 1), ("fo-vs-zo", made), ("federated", made / "federated"),
    ):  # fmt: skip
        out = tmp_path / f"{words[0]}.png"
        status, told, errors = zofed_command("plot", *words, "--out", out)
        assert status == 0 and f"wrote {out}" in told, errors
        assert out.read_bytes().startswith(b"\x89PNG")


def test_losses_of_other_data_are_warned_of() -> None:
    a, b = fake("a", 1.0, dataset="x"), fake("b", 1.0, dataset="y")
    assert "differ in dataset" in incomparable([a, b])
    same = [fake(name, 1.0, dataset=name, **{"eval-dataset": "z"}) for name in "ab"]
    assert not incomparable(same)


def test_arms_of_a_sweep_report_other_seeds_than_those_that_chose() -> None:
    def run(end: float, rate: float, seed: int, tunes: bool) -> Result:
        one = fake(f"{rate}-{seed}", end, seed=seed, **{"learning-rate": rate})
        return Result(one.path, one.settings, one.summary, one.columns, "arm", tunes)

    tuning = [run(3.0, 0.1, 0, True), run(2.0, 0.2, 0, True)]
    (alone,) = grouped(tuning)
    assert (alone.ends, len(alone.chosen_from)) == ({0: 2.0}, 2)
    (whole,) = grouped([*tuning, run(2.5, 0.2, 1, False), run(2.7, 0.2, 2, False)])
    assert whole.ends == {1: 2.5, 2: 2.7} and whole.mean == pytest.approx(2.6)
    tie = [run(3.0, 0.1, 0, True), run(3.0, 0.2, 0, True), run(2.5, 0.2, 1, False)]
    assert grouped(tie)[0].ends == {1: 2.5}, "of equals the one with which the sweep went on"
    wider = [*tuning, run(2.5, 0.2, 1, False), run(1.0, 0.3, 0, True), run(1.2, 0.3, 1, False)]
    assert grouped(wider)[0].ends == {1: 1.2}, "seeds at the rate that an earlier grid chose"
    assert isinstance(whole, Arm)


def test_a_tuned_setting_is_mapped_over_the_seed_that_all_its_values_have(drawn: Any, tmp_path: Path) -> None:
    def run(arm: str, end: float, rate: float, seed: int, tunes: bool) -> Result:
        one = fake(f"{arm}-{rate}-{seed}", end, seed=seed, **{"learning-rate": rate})
        return Result(one.path, one.settings, one.summary, one.columns, arm, tunes)

    # Of arm b 0.1 wins on the tuning's seed, and does worse on the others than 0.2 did there.
    found = [run("a", 4.0, 0.1, 0, True), run("a", 5.0, 0.2, 0, True), run("a", 4.2, 0.1, 1, False)]
    found += [run("b", 2.0, 0.1, 0, True), run("b", 2.1, 0.2, 0, True), run("b", 2.6, 0.1, 1, False)]
    plot_sweep.sweep(found, tmp_path / "map.png")
    figure, notes = drawn[0]
    grid = next(np.asarray(place.images[0].get_array()) for place in figure.axes if place.images)
    assert grid == pytest.approx(np.array([[4.0, 5.0], [2.0, 2.1]])) and any("tuning's seed alone" in n for n in notes)
    best = next(place for place in figure.axes if place.get_ylabel() == "arm" and not place.images)
    assert list(best.lines[-1].get_xdata()) == pytest.approx([4.2, 2.6]), "the arms at the seeds that are reported"


def test_runs_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    names = ["q=2,rate=1e-05", "q=2,rate=0.003", "q=2,rate=0.01", "q=16,rate=0.01,seed=2", "q=16,rate=0.01,seed=10"]
    for name in sorted(names):
        (tmp_path / name).mkdir()
        (tmp_path / name / "settings.toml").write_text("")
    assert [path.name for path in run_folders(tmp_path)] == names


def test_the_settings_of_a_missing_summary_are_those_of_its_file(runs: Path) -> None:
    (runs / "zo-0" / "summary.json").unlink()
    result = run_result.read(runs / "zo-0")
    assert not result.is_complete and np.isnan(result.end) and result.settings["queries"] == 3
    summary = json.loads((runs / "zo-1" / "summary.json").read_text())
    assert summary["eval_loss_end"] == run_result.read(runs / "zo-1").end


def scored(path: Path, accuracies: Sequence[float], sent: int, zero_shot: float = 0.5) -> Result:
    """A run of three evaluations, each after as many bytes again, with a source of its own among the data."""
    path.mkdir(parents=True)
    lines = [f"{step},{source},{value}" for step, value in enumerate(accuracies) for source in ("", "forum")]
    (path / "evaluations.csv").write_text("\n".join(["step,source,accuracy", *lines]) + "\n")
    steps = np.arange(len(accuracies), dtype=float)
    baselines = {"zero_shot_accuracy": zero_shot, "majority_accuracy": 0.4, "zero_shot_loss": 0.7}
    return Result(path, {"seed": 0}, {"baselines": baselines}, {"step": steps, "bytes": steps * sent})


def test_scores_stand_against_their_cost_beside_what_the_untouched_model_scores(tmp_path: Path, drawn: Any) -> None:
    few = Arm("few", {}, [scored(tmp_path / "a", (0.5, 0.7, 0.8), 100), scored(tmp_path / "b", (0.5, 0.6, 0.7), 100)])
    many = Arm("many", {}, [scored(tmp_path / "c", (0.5, 0.75, 0.9), 100_000)])
    plot_scores.scores([few, many], "bytes", tmp_path / "scores.png", metric="accuracy")
    place, notes = drawn[0][0].axes[0], drawn[0][1]
    assert list(line(place, "few (n = 2)").get_xdata()) == [50, 100, 200]  # the start has no logarithm
    assert list(line(place, "few (n = 2)").get_ydata()) == pytest.approx([50, 65, 75])
    assert list(line(place, "many (n = 1)").get_xdata()) == [50_000, 100_000, 200_000]
    assert place.get_xscale() == "log" and any("the start has cost nothing" in note for note in notes)
    assert {text.get_text() for text in place.texts} == {"untouched", "most frequent class"}
    other = Arm("other", {}, [scored(tmp_path / "d", (0.6, 0.7, 0.8), 100, zero_shot=0.6)])
    plot_scores.scores([few, other], "bytes", tmp_path / "again.png", metric="accuracy")
    assert {text.get_text() for text in drawn[1][0].axes[0].texts} == {"most frequent class"}  # two models: none is the
    with pytest.raises(UserError, match="no run has the metric 'rouge_l': their evaluations have accuracy"):
        plot_scores.scores([few], "bytes", tmp_path / "none.png", metric="rouge-l")
    with pytest.raises(UserError, match=r"give --out a name that ends in \.png"):
        plot_scores.scores([few], "bytes", tmp_path / "scores.pdf")


def test_arms_without_the_score_or_the_cost_are_left_out_and_named(tmp_path: Path, drawn: Any) -> None:
    few = Arm("few", {}, [scored(tmp_path / "a", (0.5, 0.7, 0.8), 100)])
    free = Arm("free", {}, [scored(tmp_path / "b", (0.5, 0.6, 0.7), 0)])  # a central run sends nothing
    bare = Arm("bare", {}, [scored(tmp_path / "c", (0.5, 0.6, 0.7), 100)])
    (tmp_path / "c" / "evaluations.csv").unlink()
    plot_scores.scores([bare, free, few], "bytes", tmp_path / "scores.png")
    assert len(drawn[0][0].axes[0].get_legend_handles_labels()[1]) == 1
    assert any(note.endswith("left out: bare, free") for note in drawn[0][1])
    with pytest.raises(UserError, match=r"nothing to draw; .* left out: free: choose another --axis"):
        plot_scores.scores([free], "bytes", tmp_path / "none.png")
