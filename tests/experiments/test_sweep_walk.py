"""A search along one setting: how far it walks, what it chooses, what a file may not say; and `zofed tune`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from zofed.base.errors import UserError
from zofed.commands import experiments
from zofed.experiments import sweep_file
from zofed.experiments.sweep import Sweep
from zofed.runs.run_folder import RunFolder

Command = Callable[..., tuple[int, str, str]]


def searched(seeds: list[int], base: dict[str, Any] | None = None, **tune: Any) -> Sweep:
    return sweep_file.of(
        {"seeds": seeds, "base": base or {}, "tune": {key.replace("_", "-"): tune[key] for key in tune}}
    )


def carried_out(sweep: Sweep, loss: Callable[[float], float]) -> dict[str, float]:
    """End losses by run, as a runner meets them: what is due runs, until nothing new is."""
    losses: dict[str, float] = {}
    due = sweep.first()
    while new := [run for run in due if run.name not in losses]:
        losses[new[0].name] = loss(new[0].settings.learning_rate)  # one at a time, the others wait
        due = [*due, *sweep.later(losses)]
    return losses


def rates(losses: dict[str, float], seed: int = 0) -> list[float]:
    return sorted(float(name.split("=")[1].split(",")[0]) for name in losses if name.endswith(f"seed={seed}"))


AROUND = {"around": 0.01, "factor": 3, "most": 7}
INF = float("inf")


@pytest.mark.parametrize(
    ("loss", "tried", "best"),
    [
        (lambda rate: abs(rate - 0.01), [0.00333, 0.01, 0.03], 0.01),
        (lambda rate: abs(rate - 0.1), [0.00333, 0.01, 0.03, 0.09, 0.27], 0.09),
        (
            lambda rate: rate,
            [4.12e-5, 0.000123, 0.00037, 0.00111, 0.00333, 0.01, 0.03],
            4.12e-5,
        ),  # no further than seven
        (lambda rate: INF if rate > 0.001 else 1.0 - rate, [0.000123, 0.00037, 0.00111, 0.00333, 0.01, 0.03], 0.00037),
        (lambda rate: 1.0, [0.00333, 0.01, 0.03], 0.00333),
        (lambda rate: INF, [4.12e-5, 0.000123, 0.00037, 0.00111, 0.00333, 0.01, 0.03], None),
    ],
)
def test_a_walk_goes_on_until_the_best_lies_between_worse(
    loss: Callable[[float], float], tried: list[float], best: float | None
) -> None:
    sweep = searched([0, 1], learning_rate=AROUND)
    losses = carried_out(sweep, loss)
    assert rates(losses) == tried
    assert rates(losses, seed=1) == ([] if best is None else [best])
    assert sweep.count(losses) == len(tried) + 1 and sweep.size == "4 runs or more"
    assert sweep.chosen(sweep.arms[0], losses) == (None if best is None else {"learning-rate": best})


def test_a_walk_stays_within_the_settings_limits_and_whole_numbers_stay_whole() -> None:
    momenta = searched([0], momentum={"around": 0.9, "factor": 1.05})
    assert [values["momentum"] for values in momenta.arms[0].tuned][-3:] == [0.9, 0.945, 0.992]
    queries = searched([0], queries={"around": 4, "factor": 2, "most": 4})
    assert [values["queries"] for values in queries.arms[0].tuned] == [1, 2, 4, 8, 16]


@pytest.mark.parametrize(
    ("tune", "told"),
    [
        ({"learning-rate": {}}, "no value above 0 to begin at"),
        ({"learning-rate": {"around": 0}}, "no value above 0"),
        ({"learning-rate": {"around": "0.1"}}, "around = '0.1' is no number"),
        ({"learning-rate": {"around": 0.1, "ratio": 3}}, "has 'ratio': write learning-rate = { around = 0.01"),
        ({"learning-rate": {"around": 0.1, "factor": 1}}, "factor = 1: give a number above 1"),
        ({"learning-rate": {"around": 0.1, "most": 2}}, "most = 2: give a whole number from 3"),
        ({"learning-rate": {"around": 0.1, "most": 3.5}}, "most = 3.5"),
        ({"momentum": {"around": 1.5}}, "momentum around 1.5 leaves its limits"),
        ({"optimizer": {"around": 1}}, "optimizer has no numbers to search among: write optimizer = [values]"),
        ({"learning-rat": {"around": 1}}, "did you mean 'learning-rate'"),
        ({"learning-rate": {"around": 0.1}, "epsilon": [1e-3]}, "is searched for, which goes with no other"),
    ],
)
def test_what_a_search_may_not_say_is_told(tune: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError) as error:
        sweep_file.of({"tune": tune})
    assert told in str(error.value)


def test_values_of_a_search_are_not_left_out_one_by_one() -> None:
    with pytest.raises(UserError, match="along which"):
        sweep_file.of({"tune": {"learning-rate": AROUND}, "leave-out": [{"learning-rate": 0.03}]})


FEW = (
    "--steps", 3, "--queries", 2, "--block-size", 16, "--batch-size", 2, "--eval-examples", 8, "--save-interval", 0,
    "--device", "cpu",
)  # fmt: skip


@pytest.mark.slow
def test_tune_finds_a_rate_tells_it_and_its_folder_is_a_sweeps(tmp_path: Path, zofed_command: Command) -> None:
    out = tmp_path / "tuned"
    status, told, errors = zofed_command("tune", *FEW, "--learning-rate", 0.1, "--most", 4, "--out", out)
    assert status == 0, told + errors
    found = {path.name: RunFolder.open(path).summary()["eval_loss_end"] for path in (out / "runs").iterdir()}
    best = min(found, key=found.__getitem__)
    assert len(found) in (3, 4) and f"best: {best.split(',')[0].replace('=', ' = ')}, the run" in told
    next_line = told.splitlines()[-1]
    assert next_line.startswith("next: zofed train --steps 3") and next_line.endswith(best.split(",")[0].split("=")[1])
    assert zofed_command("sweep", out / "sweep.toml", "--out", out)[1].count("complete") == 1


@pytest.mark.slow
def test_tune_stops_where_every_run_meets_an_error(tmp_path: Path, zofed_command: Command) -> None:
    out = tmp_path / "tuned"
    status, told, errors = zofed_command("tune", *FEW, "--dataset", tmp_path / "nowhere.tsv", "--out", out)
    assert status == 1 and "nowhere.tsv" in told + errors
    assert len(list((out / "logs").iterdir())) == 3


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--over", "learning-rat"), "did you mean 'learning-rate'"),
        (("--over", "seed"), "it is no number to tune"),
        (("--over", "optimizer"), "it is no number to tune"),
        (("--over", "quantization-bits", "--mode", "fo"), "no effect"),
        (("--over", "proximal"), "proximal"),
        (("--factor", "0.5"), "factor = 0.5"),
        (("--over", "weight-decay", "--optimizer", "adamw"), "give --weight-decay a first value"),
    ],
)
def test_what_tune_cannot_do_is_told_before_the_first_run(
    options: tuple[str, ...], told: str, tmp_path: Path, zofed_command: Command
) -> None:
    status, _, errors = zofed_command("tune", *options, "--out", tmp_path / "out")
    assert status == 2 and told in errors and not (tmp_path / "out").exists()


def test_a_search_never_tries_0_which_stands_for_another_value() -> None:
    sweep = searched([0], {"mode": "subspace"}, quantization_bits={"around": 6, "factor": 1.5})
    assert [values["quantization-bits"] for values in sweep.arms[0].tuned] == [3, 4, 6, 9, 14]
    assert all(values["gradient-rank"] for values in searched([0], gradient_rank={"around": 2}).arms[0].tuned)


@pytest.mark.parametrize("written", ["typed", "in a file"])
def test_tune_keeps_what_was_given_though_it_would_have_been_chosen(
    written: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zofed_command: Command
) -> None:
    seen: list[Any] = []

    def stopped(sweep: Any, *_: Any) -> None:
        seen.append(sweep)
        raise UserError("seen")

    monkeypatch.setattr(experiments, "carry_out", stopped)
    given = {"mode": "fo", "optimizer": "sgd", "learning-rate": 0.1, "clients": 2, "local-steps": 2}
    if written == "typed":
        words = [word for key, value in given.items() for word in (f"--{key}", value)]
    else:
        words = [tmp_path / "own.toml"]
        words[0].write_text(tomli_w.dumps(given))
    zofed_command("tune", *words, "--over", "local-steps", "--factor", 2, "--out", tmp_path / "out")
    runs = seen[0].first()
    assert {run.settings.local_steps for run in runs} == {1, 2, 4}
    assert {(run.settings.optimizer, run.settings.learning_rate) for run in runs} == {("sgd", 0.1)}
