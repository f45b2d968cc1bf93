"""`--json`: what a table shows, whole, for programs."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from zofed.commands import console
from zofed.config import task_files
from zofed.experiments import sweep_file

Command = Callable[..., tuple[int, str, str]]


def test_what_ships_is_listed_for_programs(zofed_command: Command) -> None:
    recipes = json.loads(zofed_command("recipes", "--json")[1])
    names = [f"experiments/{name}" for name in sweep_file.names()] + [f"tasks/{name}" for name in task_files.names()]
    assert [row["recipe"] for row in recipes] == names and all(row["what"] for row in recipes)
    tasks = json.loads(zofed_command("tasks", "--json")[1])
    assert [row["name"] for row in tasks] == task_files.names() and {type(row["here"]) for row in tasks} == {bool}
    data = {row["name"]: row for row in json.loads(zofed_command("data", "list", "--json")[1])}
    assert data["sst2"]["rows"] > 60_000 and data["sample-sst2"]["here"] == "all"


def test_a_runs_records_and_scores_are_told_to_programs(tmp_path: Path, zofed_command: Command) -> None:
    small = (
        "--steps",
        3,
        "--queries",
        2,
        "--block-size",
        16,
        "--batch-size",
        2,
        "--eval-examples",
        8,
        "--device",
        "cpu",
    )
    assert zofed_command("train", *small, "--out", tmp_path / "run")[0] == 0
    records = json.loads(zofed_command("journal", "show", tmp_path / "run", "--last", 2, "--json")[1])
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert [row["round"] for row in records] == [2, 3] and records[-1]["chain"] == summary["journal_head"]
    assert records[0]["queries"] == 2 and records[0]["slope rms"] > 0
    found = json.loads(zofed_command("eval", tmp_path / "run", "--json")[1])
    assert found["scores"]["loss"] == pytest.approx(summary["eval_loss_end"], abs=1e-6)


def test_what_is_no_number_becomes_null(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_json([{"loss": float("nan"), "best": [float("inf"), 1.5]}, "nan"])
    assert json.loads(capsys.readouterr().out) == [{"loss": None, "best": [None, 1.5]}, "nan"]


def test_figures_of_data_and_models_are_those_of_the_tables(zofed_command: Command, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": f"row {at}", "label": at % 2}) + "\n" for at in range(10)))
    stats = json.loads(zofed_command("data", "stats", path, "--json")[1])
    assert stats["documents"] == 10 and stats["characters"] == 50 and stats["labels"] == {"0": 5, "1": 5}
    assert stats["percentiles"]["characters"]["100"] == 5.0
    small = ("--batch-size", 2, "--block-size", 8, "--queries", 2)
    found = json.loads(zofed_command("diagnose", *small, "--batches", 2, "--json")[1])
    assert found["best_epsilon"] in [row["epsilon"] for row in found["errors"]]
    assert json.loads(zofed_command("memory", *small, "--json")[1])["weights"] == 4 * found["parameters"]


def test_an_uneven_mixture_has_status_1_as_json_too(zofed_command: Command, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"text": f"row {at}", "source": "a" if at < 60 else "b"} for at in range(120)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    status, out, _ = zofed_command("data", "distribution", path, "--json")
    found = json.loads(out)
    assert status == 1 and not found["even"] and sum(found["counts"]["a"]) == 60


def test_keys_are_told_with_their_days(zofed_command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    zofed_command("keys", "init", "localhost")
    found = json.loads(zofed_command("keys", "show", "--json")[1])
    assert [row["certificate"] for row in found["certificates"]] == ["ca.crt", "server.crt"]
    assert all(row["days left"] > 300 for row in found["certificates"]) and found["enrolled"] == {}
