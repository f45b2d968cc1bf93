"""Sweeps: what a file says, what a folder holds, what goes wrong, and a sweep killed twice."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from zofed.base.errors import UserError
from zofed.experiments import sweep_cost, sweep_file, sweep_process
from zofed.experiments.sweep import Sweep
from zofed.experiments.sweep_folder import SweepFolder
from zofed.runs.run_folder import RunFolder
from zofed.training import central

ZOFED = [sys.executable, "-c", "import sys; sys.argv[0] = 'zofed'; from zofed.commands.cli import main; main()"]
Command = Callable[..., tuple[int, str, str]]

SMALL = """
[base]
block-size = 16
batch-size = 2
queries = 3
steps = 4
rounds = 4
eval-examples = 8
eval-interval = 2
device = "cpu"
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "sweep-file.toml"
    path.write_text(text)
    return path


def sweep(folder: Path, text: str, scale: str = "", **options: str) -> Sweep:
    return sweep_file.read(written(folder, text), scale, options)


def names(found: Sweep) -> list[str]:
    return [run.name for run in found.first()]


# --- what a file says ---


def test_a_grid_is_crossed_with_the_seeds(tmp_path: Path) -> None:
    found = sweep(tmp_path, 'seeds = [0, 2]\n[base]\nsteps = 7\n[grid]\nmode = ["zo", "fo"]\nqueries = [2, 4]')
    assert names(found) == [
        f"mode={mode},queries={queries},seed={seed}" for seed in (0, 2) for mode in ("zo", "fo") for queries in (2, 4)
    ]
    run = found.first()[-1]
    assert (run.settings.mode, run.settings.queries, run.settings.seed, run.settings.steps) == ("fo", 4, 2, 7)
    assert found.count({}) == 8 and not found.later({})


def test_runs_have_names_and_cross_their_lists_with_the_grid(tmp_path: Path) -> None:
    text = """
    [grid]
    optimizer = ["sgd", "adamw"]
    [[runs]]
    name = "many directions"
    queries = [8, 64]
    [[runs]]
    mode = "fo"
    """
    assert names(sweep(tmp_path, text)) == [
        "many-directions,optimizer=sgd,queries=8,seed=0",
        "many-directions,optimizer=sgd,queries=64,seed=0",
        "many-directions,optimizer=adamw,queries=8,seed=0",
        "many-directions,optimizer=adamw,queries=64,seed=0",
        "mode=fo,optimizer=sgd,seed=0",
        "mode=fo,optimizer=adamw,seed=0",
    ]


def test_what_is_left_out_does_not_run(tmp_path: Path) -> None:
    text = '[grid]\nmode = ["zo", "fo"]\nqueries = [2, 4]\n[[leave-out]]\nmode = "fo"\nqueries = [4]'
    assert names(sweep(tmp_path, text)) == [
        "mode=zo,queries=2,seed=0",
        "mode=zo,queries=4,seed=0",
        "mode=fo,queries=2,seed=0",
    ]


TUNED = """
seeds = [5, 6, 7]
[tune]
learning-rate = [0.1, 0.2]
[[runs]]
name = "a"
[[runs]]
name = "b"
tune.learning-rate = [0.3]
"""


def test_an_arm_tunes_with_the_first_seed_and_runs_the_others_at_the_best(tmp_path: Path) -> None:
    found = sweep(tmp_path, TUNED)
    first = names(found)
    assert first == [
        "a,learning-rate=0.1,seed=5", "a,learning-rate=0.2,seed=5",
        "b,learning-rate=0.3,seed=5", "b,learning-rate=0.3,seed=6", "b,learning-rate=0.3,seed=7",
    ]  # fmt: skip
    assert [run.tunes for run in found.first()] == [True, True, False, False, False]
    assert found.count({}) == 7
    assert not found.later({first[0]: 3.0}), "the other rate is not over"
    later = found.later({first[0]: 3.0, first[1]: 2.0})
    assert [run.name for run in later] == ["a,learning-rate=0.2,seed=6", "a,learning-rate=0.2,seed=7"]
    failed = found.later({first[0]: 3.0, first[1]: float("inf")})
    assert [run.settings.learning_rate for run in failed] == [0.1, 0.1]
    assert not found.later(dict.fromkeys(first, float("inf"))), "an arm that always fails has no best"


SCALED = """
seeds = [0, 1, 2]
[base]
steps = 100
model = "200M"
[[runs]]
name = "a"
queries = 64
[[runs]]
name = "b"
[scale.laptop]
seeds = [0]
base.model = "tiny"
[[scale.laptop.runs]]
name = "a"
queries = 4
[scale.paper]
"""


def test_a_scale_puts_its_parts_in_place_and_the_first_is_the_default(tmp_path: Path) -> None:
    laptop, paper = sweep(tmp_path, SCALED).first(), sweep(tmp_path, SCALED, "paper").first()
    assert [(run.name, run.settings.model, run.settings.queries, run.settings.steps) for run in laptop] == [
        ("a,seed=0", "tiny", 4, 100), ("b,seed=0", "tiny", 32, 100)
    ]  # fmt: skip
    assert len(paper) == 6 and (paper[0].settings.model, paper[0].settings.queries) == ("200M", 64)


def test_options_override_the_base_and_data_take_the_place_of_names(tmp_path: Path) -> None:
    text = '[base]\ndataset = "sample-dclm"\n[[runs]]\nname = "a"\n[[runs]]\nname = "b"\nbp-dataset = "sample-dclm"'
    text += '\n[merge]\nboth = ["sample-dclm", "pydoc"]'
    found = sweep_file.read(written(tmp_path, text), "", {"steps": "9"}, ["sample-dclm=/data/x.jsonl"])
    a, b = (run.settings for run in found.first())
    assert (a.steps, a.dataset, b.bp_dataset) == (9, "/data/x.jsonl", "/data/x.jsonl")
    assert found.merge == {"both": ["/data/x.jsonl", "pydoc"]}
    again = sweep_file.of(found.parts)
    assert again.first() == found.first(), "what is written into the folder is the sweep"


WRONG = [
    ("[grid]\nlearning-rat = [1]", "'learning-rat'", "'learning-rate'"),
    ("[grid]", "[grid] is empty", "leave it out"),
    ("[grid]\nqueries = []", "queries = [] is empty", "give it values"),
    ("[grid]\nqueries = 8", "queries = 8 is no list", "[8]"),
    ("[grid]\nqueries = [0]", "queries = 0", "greater than or equal to 1"),
    ("[grid]\nqueries = [8, 8]", "two runs are called", "queries=8"),
    ("[base]\nstep = 8", "'step'", "'steps'"),
    ("[base]\nseed = 1", "seed is not for runs to say", "seeds = [0, 1, 2]"),
    ("[[runs]]\nout = 'x'", "out is not for runs to say", "--out"),
    ("steps = 8", "steps is a setting", "[base]"),
    ("[gird]\nqueries = [8]", "'gird'", "'grid'"),
    ("seeds = 3", "seeds = 3", "[0, 1, 2]"),
    ("seeds = []", "seeds = []", "[0, 1, 2]"),
    ("seeds = [1, 1]", "[1, 1]", "twice"),
    ("grid = 3", "grid = 3 is no table", "[grid]"),
    ("[runs]\nname = 'a'", "runs is no list of tables", "[[runs]]"),
    ("runs = []", "no runs", "runs = []"),
    ("[grid]\nmode = ['zo']\n[[leave-out]]\nmode = 'zo'", "no runs", "[[leave-out]]"),
    ("[[leave-out]]\nmod = 'zo'", "'mod'", "'mode'"),
    ("with-controls = 1", "with-controls = 1", "true or false"),
    ("[tune]\nlearning-rate = 0.1", "learning-rate = 0.1 is no list", "[0.1]"),
    ("[merge]\nboth = ['pydoc']", "both = ['pydoc']", "two data sets"),
    ("[grid\n", "not valid TOML", "line 1"),
    ("[base]\nsubspace-size = 5\nmode = 'subspace'", "subspace-size = 5", "take 4"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "what", "remedy"), WRONG)
def test_a_wrong_file_is_told_in_one_line_with_its_remedy(tmp_path: Path, text: str, what: str, remedy: str) -> None:
    with pytest.raises(UserError) as told:
        sweep(tmp_path, text)
    assert what in str(told.value) and remedy in str(told.value) and "sweep-file.toml" in str(told.value)
    assert "\n" not in str(told.value)


def test_a_former_name_of_a_setting_is_answered_and_read_in_the_copy_that_a_sweep_keeps(tmp_path: Path) -> None:
    text = """
[base]
estimator = "two-point"
[grid]
merge = ["mean", "median"]
[[leave-out]]
merge = "median"
seeds = "distinct"
[[runs]]
name = "a"
copies-per-pass = 4
tune = { coefficient-bits = [6, 18] }
"""
    for name in ("mine.toml", "sweep.toml"):
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=r"\[base\]: setting 'estimator' is now called 'finite-difference'"):
        sweep_file.read(tmp_path / "mine.toml")
    (tmp_path / "top.toml").write_text('estimator = "two-point"')
    with pytest.raises(UserError, match=r"finite-difference is a setting: it goes into \[base\]"):
        sweep_file.read(tmp_path / "top.toml")
    found = sweep_file.read(tmp_path / "sweep.toml")
    assert found.base == {"finite-difference": "two-point"}
    assert [arm.values["perturbations-per-pass"] for arm in found.arms] == [4] * len(found.arms)
    assert {key for arm in found.arms for values in arm.tuned for key in values} == {"quantization-bits"}


def test_wrong_names_scales_options_and_data_are_told(tmp_path: Path) -> None:
    path = written(tmp_path, SCALED)
    for arguments, what in (
        ((path, "laptp"), "did you mean 'laptop'"),
        ((path, "", {"queries": "3"}), "--queries is what this sweep varies"),
        ((path, "", {"seed": "3"}), "seeds = [0, 1, 2]"),
        ((path, "", {}, ["pydok=x"]), "no data set 'pydok'"),
        ((path, "", {}, ["pydoc"]), "NAME=PATH"),
        ((written(tmp_path / "..", "[base]"), "laptop"), "no scales"),
    ):
        with pytest.raises(UserError, match=what.replace("[", r"\[").replace("]", r"\]")):
            sweep_file.read(*arguments)
    with pytest.raises(UserError, match="did you mean 'quick'"):
        sweep_file.find("quik")
    with pytest.raises(UserError, match="is no file"):
        sweep_file.find("nowhere.toml")


@pytest.mark.parametrize("name", sweep_file.names())
def test_a_shipped_experiment_can_be_read_at_both_scales(name: str) -> None:
    path = sweep_file.find(name)
    laptop, paper = (sweep_file.read(path, scale) for scale in ("laptop", "paper"))
    assert laptop.about and paper.about == laptop.about and paper.first()[0].settings != laptop.first()[0].settings
    if name != "quick":  # the seeds that are reported, of which a tuning's is none
        assert all(len(found.seeds) - (len(arm.tuned) > 1) >= 3 for found in (laptop, paper) for arm in found.arms)


# Of adap/flower, examples/flowertune-llm-*: data, clients, share of them asked each round.
CHALLENGES = {
    "nlp": ("alpaca-gpt4", 20, 0.1),
    "finance": ("fingpt-sentiment", 50, 0.1),
    "medical": ("medical-flashcards", 20, 0.1),
    "code": ("code-alpaca", 10, 0.2),
}


@pytest.mark.parametrize("name", CHALLENGES)
def test_a_flowertune_experiment_has_the_challenges_settings(name: str) -> None:
    path = sweep_file.find(f"flowertune-{name}")
    paper, laptop = (sweep_file.read(path, scale).first() for scale in ("paper", "laptop"))
    for run in paper:
        own = run.settings
        assert (own.dataset, own.clients, own.participation) == CHALLENGES[name] and own.partition == "iid"
        assert (own.rounds, own.batch_size, own.block_size, own.task) == (200, 16, 512, "instruction")
        assert (own.local_steps if own.mode != "subspace" else own.subspace_interval) == 10
    lora = paper[0].settings
    assert (lora.mode, lora.adapter, lora.lora_rank, lora.lora_alpha, lora.lora_targets) == ("fo", "lora", 32, 64, "")
    assert (lora.local_optimizer, lora.optimizer, lora.momentum, lora.weighting) == ("adamw", "sgd", 0, "examples")
    assert (lora.learning_rate, lora.min_learning_rate, lora.schedule) == (5e-5, 1e-6, "cosine")
    assert lora.clip_norm == 1.0 and lora.local_learning_rate == 0.0, "that of the server, which makes it FedAvg"
    assert {run.settings.clients for run in laptop} == {CHALLENGES[name][1]}
    assert {run.settings.link_megabits for run in paper + laptop} == {0.001}, "bytes would hang on the machine's speed"
    assert {(run.settings.dataset, run.settings.template) for run in laptop} == {("sample-alpaca", lora.template)}


def test_a_forecast_counts_the_clients_that_are_asked(tmp_path: Path) -> None:
    def cost(**changes: Any) -> sweep_cost.Cost:
        text = "[base]\nclients = 8\nrounds = 10\nqueries = 2\nblock-size = 16\nbatch-size = 2\n"
        settings = sweep(tmp_path, text).first()[0].settings.model_copy(update=changes)
        found = sweep_cost._cost(settings)
        assert isinstance(found, sweep_cost.Cost) and found.seconds
        return found

    every, some = cost(), cost(participation=0.25)
    assert some.traffic < 0.6 * every.traffic


def test_the_file_that_the_docs_show_is_read_at_its_scales(tmp_path: Path) -> None:
    page = (sweep_file.SHIPPED.parent / "docs" / "experiments.md").read_text()
    text = page.split("```toml\n")[1].split("```")[0]
    found = sweep(tmp_path, text)
    # zo with 8 and 64 directions, and fo, each with both optimizers; adamw tunes among two rates, sgd among three
    assert [len(arm.tuned) for arm in found.arms] == [3, 3, 2, 2, 3, 2]
    assert {run.settings.model for run in sweep(tmp_path, text, "paper").first()} == {"200M"}
    table = page.split("## Experiments that ship")[1].split("\n## ")[0]
    shown = {line.split("`")[1] for line in table.splitlines() if line.startswith("| `")}
    assert shown == set(sweep_file.names())


INSTRUCT = """
[tune]
learning-rate = [0.1, 0.2]
[[runs]]
name = "zo"
[[runs]]
name = "guided"
mode = "instruct"
[[runs]]
name = "guide"
mode = "instruct"
instruct-kind = "guide-only"
"""


@pytest.mark.parametrize("by_flag", [True, False])
def test_one_flag_adds_the_controls_and_the_arms_of_instruct(tmp_path: Path, by_flag: bool) -> None:
    path = written(tmp_path, INSTRUCT if by_flag else "with-controls = true" + INSTRUCT)
    found = sweep_file.read(path, with_controls=by_flag)
    assert [arm.name for arm in found.arms] == [
        "zo", "guided", "guide", "guided,instruct-kind=line",
    ]  # fmt: skip
    assert all(run.settings.controls for run in found.first()) and all(len(arm.tuned) == 2 for arm in found.arms)
    assert sweep_file.of(found.parts).first() == found.first()
    assert not sweep_file.read(written(tmp_path, INSTRUCT)).first()[0].settings.controls
    kinds = sweep(
        tmp_path, "with-controls = true\n[base]\nmode = 'instruct'\n[tune]\ninstruct-kind = ['hybrid', 'cosine']"
    )
    assert [run.settings.instruct_kind for run in kinds.first()] == ["hybrid", "cosine", "guide-only", "line"]


def test_runs_share_gpus_as_they_are_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep_process, "device_count", lambda: 2)
    chosen = [(None, 0.5, 4), (3, 0.5, 3), (9, 0.5, 4), (None, 1, 2), (None, 0.3, 6), (5, 0, 5), (None, 0, 1)]
    for parallel, share, runs in chosen:
        assert sweep_process.at_a_time(parallel, share) == runs
    monkeypatch.setattr(sweep_process, "device_count", lambda: 0)
    assert sweep_process.at_a_time(None, 0) == 1
    with pytest.raises(UserError, match=r"--gpus-per-run 0.5: no CUDA device.*--parallel"):
        sweep_process.at_a_time(None, 0.5)
    with pytest.raises(UserError, match=r"--gpus-per-run nan: give a share above 0"):
        sweep_process.at_a_time(None, float("nan"))


def test_runs_that_may_choose_take_the_gpus_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    monkeypatch.setattr(sweep_process, "device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.set_device", taken.append)
    chooses, named = (sweep(tmp_path, f"[base]\ndevice = '{name}'").first()[0].settings for name in ("auto", "cpu"))
    for slot in range(4):
        sweep_process.choose_gpu(chooses, slot)
        sweep_process.choose_gpu(named, slot)
    assert taken == [0, 1, 0, 1]


# --- what is run ---


def rows(folder: Path) -> dict[str, dict[str, str]]:
    with open(folder / "summary.csv") as file:
        return {row["run"]: row for row in csv.DictReader(file)}


@pytest.mark.slow
def test_runs_are_those_of_train_and_simulate_and_a_failure_stops_no_other(
    tmp_path: Path, zofed_command: Command
) -> None:
    missing = tmp_path / "later.jsonl"
    text = (
        SMALL
        + f"""
    [[runs]]
    name = "alone"
    [[runs]]
    name = "wrong"
    dataset = "{missing}"
    [[runs]]
    name = "two"
    clients = 2
    """
    )
    out = tmp_path / "sweep"
    command = ("sweep", written(tmp_path, text), "--out", out, "--parallel", 2)
    status, told, _ = zofed_command(*command)
    assert status == 1
    assert "2 runs complete, 0 of them before; 1 failed" in told and "wrong,seed=0: " in told and str(missing) in told
    found = rows(out)
    assert [found[f"{name},seed=0"]["status"] for name in ("alone", "wrong", "two")] == [
        "completed",
        "failed",
        "completed",
    ]
    assert str(missing) in found["wrong,seed=0"]["error"]
    assert int(found["two,seed=0"]["bytes"]) > 0 and int(found["alone,seed=0"]["forward_passes"]) == 16
    # The same code: the weights of an ordinary run, and of the same federation.
    alone = RunFolder.open(out / "runs" / "alone,seed=0")
    ordinary = central.train(alone.settings().model_copy(update={"out": ""}), tmp_path / "ordinary", lambda row: None)
    assert alone.summary()["digest"] == ordinary["digest"]
    before = {name: (out / "runs" / f"{name},seed=0" / "summary.json").stat().st_mtime_ns for name in ("alone", "two")}
    # Again, with the cause removed: what is finished stays as it is.
    missing.write_text(
        "".join(json.dumps({"text": f"word {n} and another word, {n} times over"}) + "\n" for n in range(60))
    )
    status, told, _ = zofed_command(*command)
    assert status == 0 and "3 runs complete, 2 of them before; 0 failed" in told
    assert before == {name: (out / "runs" / f"{name},seed=0" / "summary.json").stat().st_mtime_ns for name in before}
    assert [row["status"] for row in rows(out).values()] == ["completed"] * 3
    assert len(json.loads((out / "sessions.json").read_text())) == 2
    # Other settings under the same name must not pass for what is there, nor take the sweep's place.
    as_it_was = {name: (out / name).read_bytes() for name in ("sweep.toml", "sessions.json")}
    status, _, errors = zofed_command(*command, "--steps", 5)
    assert status == 2 and "was made with steps = 4, and the sweep now says 5" in errors
    assert as_it_was == {name: (out / name).read_bytes() for name in as_it_was}


@pytest.mark.slow
def test_a_sweep_tunes_merges_and_goes_on_from_its_own_folder(tmp_path: Path, zofed_command: Command) -> None:
    text = "seeds = [0, 1]\n" + SMALL + 'dataset = "both"\n[merge]\nboth = ["sample-sst2", "sample-pubmedqa"]\n'
    text += "[tune]\nlearning-rate = [0.01, 1e-6]"
    out = tmp_path / "sweep"
    status, told, errors = zofed_command("sweep", written(tmp_path, text), "--out", out)
    assert status == 0, told + errors
    found = rows(out)
    assert len(found) == 3
    losses = {name: float(row["eval_loss_end"]) for name, row in found.items() if row["tunes"] == "True"}
    chosen = min(losses, key=losses.__getitem__).removesuffix("seed=0")
    assert list(found)[-1] == f"{chosen}seed=1"
    status, told, _ = zofed_command("sweep", out / "sweep.toml", "--out", out)
    assert status == 0 and "3 runs complete, 3 of them before; 0 failed" in told


@pytest.mark.slow
def test_a_tried_value_that_diverges_is_an_outcome_and_not_tried_again(tmp_path: Path, zofed_command: Command) -> None:
    text = "seeds = [0, 1]\n" + SMALL + "[tune]\nlearning-rate = [1e30, 0.01]\n"
    out = tmp_path / "sweep"
    command = ("sweep", written(tmp_path, text), "--out", out)
    status, told, errors = zofed_command(*command)
    assert status == 0, told + errors
    diverged = "learning-rate=1e+30,seed=0"
    assert f"{diverged}: diverged" in told and "2 runs complete, 0 of them before; 0 failed" in told
    assert {name: row["status"] for name, row in rows(out).items()} == {
        diverged: "diverged", "learning-rate=0.01,seed=0": "completed", "learning-rate=0.01,seed=1": "completed"
    }  # fmt: skip
    status, told, _ = zofed_command(*command)
    assert (
        status == 0 and "2 runs complete, 2 of them before" in told and f"1 diverged while tuning: {diverged}" in told
    )
    status, _, _ = zofed_command("report", out)
    assert status == 0 and f"- diverged while tuning, not chosen: {diverged}" in (out / "summary.md").read_text()
    # A grid that no longer has that value, in the same folder.
    written(tmp_path, text.replace("1e30, ", ""))
    status, told, _ = zofed_command(*command)
    assert status == 0 and "2 runs complete, 2 of them before" in told
    status, _, _ = zofed_command("report", out)
    told = (out / "summary.md").read_text()
    assert status == 0 and f"- left out, no runs of the sweep as it now stands: {diverged}" in told
    # An arm of which nothing trains is told, and so is a page of nothing else.
    none = written(tmp_path, text.replace("0.01", "1e31") + "[grid]\nqueries = [2, 4]\nmode = ['zo', 'fo']")
    status, told, _ = zofed_command("sweep", none, "--out", tmp_path / "none")
    assert status == 1 and "0 runs complete" in told and "for queries=4,mode=fo trains: its other seeds" in told
    status, told, errors = zofed_command("report", tmp_path / "none")
    assert status == 0 and "No run is complete" in told, errors
    # What is no tuning must not diverge.
    status, told, _ = zofed_command("sweep", written(tmp_path, SMALL + "learning-rate = 1e30"), "--out", tmp_path / "b")
    assert status == 1 and "1 failed" in told and "training diverged" in told


@pytest.mark.slow
def test_a_sweep_goes_on_from_another_working_folder(
    tmp_path: Path, zofed_command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    text = "".join(json.dumps({"text": f"word {n} and another word, {n} times over"}) + "\n" for n in range(60))
    for name in ("words.jsonl", "more.jsonl"):
        (here / name).write_text(text)
    monkeypatch.chdir(here)
    file = written(here, SMALL + '[[runs]]\nname = "a"\ndataset = "pydoc"\n[grid]\neval-dataset = ["more.jsonl"]')
    command = ("sweep", file, "--out", "out", "--data", "pydoc=words.jsonl")
    status, told, errors = zofed_command(*command)
    assert status == 0, told + errors
    monkeypatch.chdir(there)
    status, told, _ = zofed_command("sweep", here / "out" / "sweep.toml", "--out", here / "out")
    assert status == 0 and "1 runs complete, 1 of them before" in told
    settings = RunFolder.open(next((here / "out" / "runs").iterdir())).settings()
    assert (settings.dataset, settings.eval_dataset) == (str(here / "words.jsonl"), str(here / "more.jsonl"))


@pytest.mark.slow
def test_a_dry_run_lists_the_runs_and_writes_nothing(tmp_path: Path, zofed_command: Command) -> None:
    text = "seeds = [0, 1]\n" + SMALL + "[tune]\nlearning-rate = [0.1, 0.2]"
    status, told, _ = zofed_command("sweep", written(tmp_path, text), "--out", tmp_path / "out", "--dry-run")
    lines = told.splitlines()
    assert status == 0 and len(lines) == 4 and not (tmp_path / "out").exists()
    assert lines[0].startswith("learning-rate=0.1,seed=0: ") and "(the best of 2),seed=1" in lines[2]
    assert lines[3].startswith("3 runs, 1 at a time: about ") and "MiB of memory" in lines[3]


@pytest.mark.slow
def test_more_runs_at_a_time_than_memory_allows_are_warned_of_with_the_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = sweep(tmp_path, "seeds = [0, 1, 2]\n" + SMALL)
    monkeypatch.setattr(sweep_cost, "free_bytes", lambda settings: 200 * 2**20)
    assert sweep_cost.too_much(found, 2) == ""
    told = sweep_cost.too_much(found, 3)
    assert "3 runs at a time may take 24" in told and "200 MiB are free" in told and "--parallel 2" in told


def test_two_sweeps_do_not_work_in_one_folder(tmp_path: Path, zofed_command: Command) -> None:
    with SweepFolder(tmp_path / "out").opened():
        status, _, errors = zofed_command("sweep", written(tmp_path, SMALL), "--out", tmp_path / "out")
    assert status == 2 and "another sweep is at work" in errors


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_sweep_of_24_runs_killed_twice_completes_each_run_once(tmp_path: Path) -> None:
    text = "seeds = [0, 1, 2]\n" + SMALL.replace("steps = 4", "steps = 25").replace("rounds = 4", "rounds = 25")
    text += "save-interval = 10\n[grid]\nclients = [0, 2]\nmode = ['zo', 'fo']\nlearning-rate = [0.01, 0.02]"
    out = tmp_path / "sweep"
    command = [*ZOFED, "sweep", str(written(tmp_path, text)), "--out", str(out), "--parallel", "2"]
    finished: dict[Path, int] = {}
    for after in (5, 13):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + 300
        while len(complete(out)) < after:
            assert process.poll() is None and time.monotonic() < deadline, "the sweep did not get going"
            time.sleep(0.05)
        time.sleep(0.4)  # into the middle of the next runs
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert all(path.stat().st_mtime_ns == when for path, when in finished.items())
        finished = {path: path.stat().st_mtime_ns for path in complete(out)}
        assert after <= len(finished) < 24
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=os.environ)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "24 runs complete" in done.stdout
    assert len(complete(out)) == 24 and {row["status"] for row in rows(out).values()} == {"completed"}
    assert all(path.stat().st_mtime_ns == when for path, when in finished.items()), "a finished run was run again"
    for path in (out / "runs").iterdir():
        with open(path / "metrics.csv") as file:
            assert [int(row["step"]) for row in csv.DictReader(file)] == list(range(26)), path


@pytest.mark.slow
@pytest.mark.parametrize("name", sweep_file.names())
def test_every_arm_of_a_shipped_experiment_takes_a_step(name: str, tmp_path: Path) -> None:
    found = SweepFolder(tmp_path).begin(sweep_file.read(sweep_file.find(name), "laptop"))
    for arm in found.arms:
        out = tmp_path / arm.name
        short = {"steps": 1, "rounds": 1, "eval_examples": 8, "out": str(out)}
        run = found.run(arm, arm.tuned[0], found.seeds[0])
        sweep_process.carry_out(run.settings.model_copy(update=short), lambda row: None)
        assert json.loads((out / "summary.json").read_text())["status"] == "completed"


@pytest.mark.slow
def test_ctrl_c_ends_the_runs_too_and_says_how_to_go_on(tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    text = SMALL.replace("steps = 4", "steps = 100000").replace("eval-interval = 2", "eval-interval = 1000")
    text = text.replace("rounds = 4\n", "")
    command = [*ZOFED, "sweep", str(written(tmp_path, text)), "--out", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics, deadline = out / "runs" / "seed=0" / "metrics.csv", time.monotonic() + 120
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 4:
        assert process.poll() is None and time.monotonic() < deadline, "the sweep did not get going"
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == f"zofed: interrupted; continue with: zofed sweep {out / 'sweep.toml'} --out {out}\n"
    assert json.loads((metrics.parent / "summary.json").read_text())["status"] == "interrupted"
    size = metrics.stat().st_size
    time.sleep(1)
    assert metrics.stat().st_size == size, "the run went on"
    assert rows(out)["seed=0"]["status"] == "cut"


def complete(out: Path) -> list[Path]:
    """summary.json of every run that is complete."""
    paths = sorted(out.glob("runs/*/summary.json"))
    return [path for path in paths if json.loads(path.read_text())["status"] == "completed"]
