"""Nothing that a person sets explicitly is ignored in silence."""

import re
import tomllib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from zofed import config
from zofed.base.errors import UserError
from zofed.config import CENTRAL, FEDERATED, SETTINGS, suited
from zofed.experiments import sweep_file
from zofed.models import sources
from zofed.training import central

Zofed = Callable[..., tuple[int, str, str]]

# Settings that always act; every other one says when it does.
ALWAYS = {
    "mode", "model", "revision", "task", "dataset", "tokenizer", "block-size", "scope", "optimizer", "learning-rate",
    "weight-decay", "schedule", "warmup-steps", "clip-norm", "batch-size", "objective", "max-forward-equivalents",
    "max-seconds", "max-tokens", "seed", "dtype", "forward-dtype", "threads", "eval-interval", "eval-examples",
    "eval-dataset", "save-interval", "keep-best", "controls", "report-to", "out", "columns", "metric", "adapter",
    "placement",
}  # fmt: skip

IDLE: list[tuple[str, dict[str, Any], str, str]] = [
    (CENTRAL, {"rounds": 5}, "rounds", "zofed simulate"),
    (CENTRAL, {"clients": 2}, "clients", "zofed simulate"),
    (CENTRAL, {"participation": 0.5}, "participation", "a federation"),
    (FEDERATED, {"participation": 0.5, "only-client": 1}, "participation", "only-client = -1"),
    (CENTRAL, {"aggregation": "median"}, "aggregation", "a federation"),
    (CENTRAL, {"mode": "fo", "local-steps": 3}, "local-steps", "mode = zo or instruct or calibrate"),
    (FEDERATED, {"steps": 5}, "steps", "zofed train"),
    (FEDERATED, {"epochs": 2}, "epochs", "zofed train"),
    (CENTRAL, {"steps": 5, "epochs": 2}, "steps", "epochs = 0"),
    (CENTRAL, {"optimizer": "adamw", "momentum": 0.9}, "momentum", "optimizer = sgd"),
    (CENTRAL, {"cautious": True}, "cautious", "optimizer = mudamw"),
    (FEDERATED, {"trim": 0.3}, "trim", "aggregation = trimmed"),
    (FEDERATED, {"max-examples": 3}, "max-examples", "weighting = examples"),
    (FEDERATED, {"dirichlet-alpha": 0.1}, "dirichlet-alpha", "partition = dirichlet"),
    (FEDERATED, {"proximal": 0.1, "mode": "fo"}, "proximal", "local-steps other than 1"),
    (FEDERATED, {"local-learning-rate": 0.1}, "local-learning-rate", "local-steps other than 1"),
    (FEDERATED, {"local-optimizer": "adamw", "mode": "fo"}, "local-optimizer", "local-steps other than 1"),
    (FEDERATED, {"local-optimizer": "adamw", "local-steps": 4}, "local-optimizer", "mode = fo"),
    (CENTRAL, {"mode": "fo", "queries": 8}, "queries", "mode = zo"),
    (CENTRAL, {"mode": "fo", "epsilon": 1e-3}, "epsilon", "mode = zo"),
    (CENTRAL, {"mode": "fo", "directions": "rank2"}, "directions", "mode = zo"),
    (CENTRAL, {"mode": "subspace", "directions": "rank2"}, "directions", "subspace-variant = diagonal"),
    (CENTRAL, {"bp-interval": 3}, "bp-interval", "mode = instruct or calibrate"),
    (CENTRAL, {"gradient-accumulation": 3}, "gradient-accumulation", "mode = fo"),
    (CENTRAL, {"query-batch-size": 3}, "query-batch-size", "query-batches = per-query"),
    (CENTRAL, {"mode": "calibrate", "instruct-blend": False}, "instruct-blend", "mode = instruct"),
    (CENTRAL, {"subspace-size": 4}, "subspace-size", "mode = subspace"),
    (CENTRAL, {"min-learning-rate": 1e-3}, "min-learning-rate", "schedule = cosine"),
    (
        CENTRAL,
        {"directions": "gaussian", "perturbations-per-pass": 2},
        "perturbations-per-pass",
        "directions other than",
    ),
    (CENTRAL, {"save-interval": 0, "keep-checkpoints": 3}, "keep-checkpoints", "save-interval other than 0"),
    (CENTRAL, {"eval-dataset": "pydoc", "held-out-fraction": 0.2}, "held-out-fraction", "eval-dataset = ''"),
    (CENTRAL, {"pooling": "mean"}, "pooling", "task = classification"),
    (CENTRAL, {"devices": "cpu,cpu", "device": "cpu"}, "device", "devices = ''"),
    (FEDERATED, {"mode": "instruct", "bp-dataset": "pydoc"}, "bp-dataset", "gradient-source = server"),
]


def test_every_setting_says_when_it_acts_or_always_does() -> None:
    conditions = {key: config.traits(field).acts_when for key, field in SETTINGS.items()}
    assert {key for key, alternatives in conditions.items() if not alternatives} == ALWAYS
    for alternatives in conditions.values():
        for condition in alternatives:
            assert set(condition) <= {"run", "ranks", *config.Settings.model_fields}


def test_every_setting_is_in_one_section_in_their_order() -> None:
    by_section = [config.kebab(name) for section in config.SECTIONS.values() for name in section.model_fields]
    assert by_section == list(SETTINGS)


@pytest.mark.parametrize("command", ["train", "simulate", "models", "check"])
def test_help_shows_the_first_settings_and_the_sections(zofed_command: Zofed, command: str) -> None:
    status, out, _ = zofed_command(command, "--help")
    assert status == 0 and len(out.splitlines()) < 90
    shown = set(re.findall(r"^  --([a-z-]+)", out, re.MULTILINE)) & set(SETTINGS)
    assert {"model", "learning-rate"} <= shown and 10 <= len(shown) <= 20
    assert ("rounds" in shown, "steps" in shown) == (command != "train", command != "simulate")
    if command != "models":
        assert re.search(r"^  \[?FILE\]? +TOML file", out, re.MULTILINE), "arguments are explained"
    for name in config.SECTIONS:
        assert re.search(rf"^  {name}  ", out, re.MULTILINE)


def test_a_section_of_settings_alone_is_shown(zofed_command: Zofed) -> None:
    status, out, _ = zofed_command("settings", "subspace")
    assert status == 0 and tomllib.loads(out) == {
        "subspace-size": 1024,
        "subspace-variant": "core",
        "subspace-interval": 16,
    }
    status, _, errors = zofed_command("settings", "subspaces")
    assert status == 2 and errors == "zofed: unknown section 'subspaces': did you mean 'subspace'?\n"


@pytest.mark.parametrize(("run", "values", "key", "remedy"), IDLE, ids=[case[2] for case in IDLE])
def test_a_setting_without_effect_is_told_with_what_makes_it_act(
    run: str, values: dict[str, Any], key: str, remedy: str
) -> None:
    settings = config.resolve(values)
    (told,) = config.without_effect(settings, values, run)
    assert told.startswith(f"{key} = ") and remedy in told.partition("has no effect here: it acts with ")[2]


@pytest.mark.parametrize(
    ("run", "values"),
    [
        (CENTRAL, {"mode": "instruct", "optimizer": "adamw", "bp-optimizer": "sgd", "momentum": 0.9}),
        (CENTRAL, {"local-steps": 3, "local-learning-rate": 0.1, "quantization-bits": 6}),
        (CENTRAL, {"mode": "fo", "bp-learning-rate": 0.1, "gradient-accumulation": 2}),
        (CENTRAL, {"mode": "instruct", "bp-dataset": "pydoc", "instruct-noise-scale": 0.2}),
        (FEDERATED, {"mode": "subspace", "queries": 3, "epsilon": 1e-3}),
        (FEDERATED, {"steps-per-message": 4, "local-learning-rate": 0.1, "clients": 2, "rounds": 3}),
        (FEDERATED, {"mode": "fo", "local-steps": 2, "proximal": 0.1, "aggregation": "trimmed", "trim": 0.3}),
        ("", {"rounds": 3, "steps": 3, "clients": 2}),
    ],
)
def test_a_setting_that_acts_is_not_told(run: str, values: dict[str, Any]) -> None:
    assert config.without_effect(config.resolve(values), values, run) == []


@pytest.mark.parametrize("run", [CENTRAL, FEDERATED])
def test_defaults_are_never_told(run: str) -> None:
    assert config.changed(config.resolve({})) == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config.asked_for(None, {}, run)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["train", "--rounds", "3"], "rounds = 3 has no effect here: it acts with a federation (zofed simulate"),
        (["train", "--clients", "0"], "clients = 0 has no effect here"),
        (["simulate", "--steps", "100"], "steps = 100 has no effect here: it acts with zofed train"),
        (["train", "--optimizer", "adamw", "--momentum", "0.9"], "momentum = 0.9 has no effect here"),
        (["run", "lab", "--epochs", "2"], "epochs = 2.0 has no effect here"),
        (["check", "--mode", "fo", "--queries", "3"], "queries = 3 has no effect here"),
        (["sweep", "arms", "--link-megabits", "3"], "link-megabits = 3.0 has no effect here"),
    ],
    ids=lambda case: " ".join(case) if isinstance(case, list) else "",
)
def test_what_is_typed_without_effect_is_refused(
    zofed_command: Zofed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], told: str
) -> None:
    (tmp_path / "arms.toml").write_text('[base]\nsteps = 2\n[grid]\nmode = ["zo", "fo"]\n')
    monkeypatch.chdir(tmp_path)
    words = ["arms.toml" if word == "arms" else word for word in words]
    status, output, errors = zofed_command(*words)
    assert (status, output) == (2, "")
    assert errors.startswith(f"zofed: {told}") and len(errors.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["arms.toml"]


def test_a_file_that_serves_several_runs_is_told_in_one_warning(tmp_path: Path) -> None:
    file = tmp_path / "both.toml"
    file.write_text('steps = 5\nrounds = 5\nmomentum = 0.0\ntrim = 0.2\naggregation = "median"\n')
    with pytest.warns(UserWarning) as told:
        assert config.asked_for(file, {}, CENTRAL).steps == 5
    (line,) = [str(one.message) for one in told]
    assert line.startswith(f"{file}: rounds = 5 has no effect here") and "aggregation = median has no effect" in line
    assert "steps" not in line and "trim" not in line and "\n" not in line
    with pytest.warns(UserWarning, match=r"both.toml: steps = 5 has no effect here: it acts with zofed train"):
        config.asked_for(file, {"direction-seeds": "shared"}, FEDERATED)
    with pytest.raises(UserError, match=r"^rounds = 7 has no effect here"):
        config.asked_for(file, {"rounds": "7"}, CENTRAL)


@pytest.mark.parametrize(("old", "new"), config.RENAMED.items())
def test_a_former_name_is_answered_with_the_present_one(
    zofed_command: Zofed, tmp_path: Path, old: str, new: str
) -> None:
    file = tmp_path / "old.toml"
    file.write_text(f"{old} = {tomli_w.dumps({'x': SETTINGS[new].default}).partition(' = ')[2]}")
    with pytest.raises(UserError, match=rf"^setting '{old}' is now called '{new}': write {new} instead$"):
        config.asked_for(file, {}, CENTRAL)
    status, _, errors = zofed_command("train", f"--{old}", "1", "--out", tmp_path / "run")
    assert (status, errors) == (2, f"zofed: option '--{old}' is now called '--{new}': write --{new} instead\n")
    assert old not in SETTINGS and not (tmp_path / "run").exists()


def test_a_run_of_a_version_with_other_names_goes_on(quick: Callable[..., Any], tmp_path: Path) -> None:
    steps: list[int] = []

    def interrupt(row: Any) -> None:
        steps.append(row["step"])
        if row["step"] == 2:
            raise KeyboardInterrupt

    settings = quick(steps=4, finite_difference="two-point", direction_scale="rms")
    whole = central.train(settings, tmp_path / "whole", lambda _: None)
    with pytest.raises(KeyboardInterrupt):
        central.train(settings, tmp_path / "run", interrupt)
    for name in ("settings.toml", "inputs.json"):
        file = tmp_path / "run" / name
        text = file.read_text()
        for old, new in config.RENAMED.items():
            text = re.sub(rf'^(\s*"?){new}("?[: ])', rf"\1{old}\2", text, flags=re.MULTILINE)
        assert "estimator" in text and "finite-difference" not in text
        file.write_text(text)
    again = central.resume(tmp_path / "run", lambda row: steps.append(row["step"]))
    assert again["digest"] == whole["digest"] and steps[-1] == 4
    config.resolve(config.read_toml(tmp_path / "run" / "settings.toml"))  # what `the same once more` names


def test_a_sweep_tells_what_acts_in_none_of_its_runs(tmp_path: Path) -> None:
    base = {"steps": 2, "rounds": 2, "momentum": 0.5, "queries": 4, "bp-interval": 2}
    sweep = sweep_file.of({"base": base, "grid": {"mode": ["zo", "fo"], "optimizer": ["sgd", "adamw"]}})
    told = sweep.without_effect(base)
    assert [line.split(" = ")[0] for line in told] == ["rounds", "bp-interval"]


@pytest.mark.parametrize("name", sweep_file.names())
def test_shipped_experiments_set_nothing_without_effect(name: str) -> None:
    sweep = sweep_file.read(sweep_file.find(name))
    assert sweep.without_effect(sweep.base) == []


@pytest.mark.parametrize(
    ("given", "optimizer", "scale", "rate"),
    [
        ({}, "sgd", "equal", 0.01),
        ({"model": "folder"}, "sgd", "equal", 0.003),
        ({"optimizer": "adamw"}, "adamw", "rms", 0.1),
        ({"mode": "calibrate", "optimizer": "adamw"}, "adamw", "equal", 3e-3),
        ({"mode": "instruct", "optimizer": "mudamw"}, "mudamw", "equal", 0.01),
        ({"optimizer": "mudamw", "model": "folder"}, "mudamw", "equal", 1e-3),
        ({"mode": "fo", "local-steps": 4, "optimizer": "adamw"}, "adamw", "equal", 3e-3),  # FedAdam
        ({"normalize-slopes": False, "model": "folder"}, "sgd", "equal", 3e-4),
        ({"mode": "fo"}, "adamw", "equal", 3e-3),
        ({"mode": "fo", "model": "folder"}, "adamw", "equal", 3e-4),
        ({"mode": "fo", "model": "folder", "adapter": "lora"}, "adamw", "equal", 3e-3),
        ({"mode": "fo", "local-steps": 4}, "sgd", "equal", 0.1),  # FedAvg: of clients and server alike
        ({"mode": "fo", "local-steps": 4, "local-optimizer": "adamw"}, "sgd", "equal", 3e-3),
        ({"mode": "subspace", "model": "folder"}, "adamw", "rms", 0.01),
        ({"mode": "subspace", "model": "folder", "adapter": "lora"}, "adamw", "rms", 0.1),
    ],
)
def test_what_nobody_gives_is_chosen_by_the_mode(
    given: dict[str, Any], optimizer: str, scale: str, rate: float
) -> None:
    chosen = config.resolve(given)
    assert (chosen.optimizer, chosen.direction_scale, chosen.learning_rate) == (optimizer, scale, rate)
    assert chosen.quantization_bits == (4 if chosen.mode == "subspace" else 18)
    own = {"optimizer": "mudamw", "direction-scale": "equal", "learning-rate": 0.5, "quantization-bits": 6}
    settings = config.resolve(given | own)
    assert {key: settings.model_dump(by_alias=True)[key] for key in own} == own
    # A run's own file holds what was chosen, and another version's choice cannot change it.
    assert config.resolve(chosen.model_dump(by_alias=True)) == chosen


def test_in_another_mode_what_nobody_gave_is_chosen_anew() -> None:
    slopes, other = config.resolve({"batch-size": 2}), config.resolve({"batch-size": 2, "mode": "subspace"})
    assert config.in_mode(slopes, "subspace") == other and config.in_mode(other, "zo") == slopes
    for given in ({"learning-rate": 0.5, "optimizer": "mudamw"}, {"optimizer": "sgd", "learning-rate": 0.01}):
        there = config.in_mode(config.resolve(given), "fo").model_dump(by_alias=True)
        assert {key: there[key] for key in given} == given, "also where it is what would have been chosen"


def test_the_models_that_begin_untrained_are_those_made_by_size() -> None:
    assert tuple(sources.SIZES) == suited.FRESH
