"""`zofed tasks`: the list, and a row of a task as a model meets it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from zofed.commands import tasks
from zofed.commands.console import PlainConsole
from zofed.config import task_files

Zofed = Callable[..., tuple[int, str, str]]
RTE = {"premise": "It rained.", "hypothesis": "It was \x1b[31mwet", "label": 1}


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ZOFED_DATA", str(tmp_path / "root"))
    return tmp_path / "root"


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rte.jsonl"
    path.write_text("".join(json.dumps(RTE | {"label": label}) + "\n" for label in (0, 1)))
    return path


def test_the_list_names_every_task_with_its_type_data_and_metric(zofed_command: Zofed, root: Path) -> None:
    status, output, _ = zofed_command("tasks")
    table = output.splitlines()[: len(task_files.names()) + 1]  # what another test's console kept back may follow
    lines = {line.split()[0]: line for line in table}
    assert status == 0 and set(task_files.names()) <= set(lines)
    assert lines["squad"].split()[1:4] == ["instruction", "squad", "token_f1"] and " yes " not in lines["rte"]
    (root / "rte").mkdir(parents=True)
    (root / "rte" / "info.json").write_text("{}")
    assert " yes " in {line.split()[0]: line for line in zofed_command("tasks")[1].splitlines()}["rte"]


def test_without_its_data_a_task_says_how_to_get_them(zofed_command: Zofed) -> None:
    status, output, _ = zofed_command("tasks", "show", "boolq")
    assert status == 0 and "zofed data download boolq fetches it" in output
    assert "{{ passage }} {{ question[:1] | upper }}" in output and 'label-words = "No,Yes"  # ' in output


def test_a_row_shows_its_prompt_its_candidates_and_the_right_one(zofed_command: Zofed, rows: Path) -> None:
    status, output, _ = zofed_command("tasks", "show", "rte", "--dataset", rows, "--row", 2)
    shown = output[output.index("row 2 of 2") :].splitlines()
    assert status == 0 and "what trains stands in [ ]" in shown[0]
    assert shown[1:] == [
        "It rained.",
        'Does this mean that "It was \\x1b[31mwet" is true? Yes or No?',
        "",
        "        [Yes]",
        "  right [No]",
        "  class 1",
    ]


def test_a_user_s_file_is_shown_as_a_shipped_one(zofed_command: Zofed, tmp_path: Path) -> None:
    (tmp_path / "own.tsv").write_text("bad day\t0\ngood day\t1\n")
    path = tmp_path / "own.toml"
    path.write_text('task = "prompt"\ndataset = "own.tsv"\ntemplate = "{{ text }} So"\nlabel-words = " bad, good"\n')
    status, output, _ = zofed_command("tasks", "show", path)
    assert status == 0 and "bad day So\n  right [ bad]\n        [ good]\n" in output


@pytest.mark.parametrize(
    "arguments, wanted",
    [
        (("rtf",), "did you mean 'rte'?"),
        (("rte", "--row", "3"), "has the rows 1 to 2"),
        (("sst2",), "has no column 'sentence'"),
    ],
)
def test_mistakes_are_one_line(zofed_command: Zofed, rows: Path, arguments: tuple[str, ...], wanted: str) -> None:
    status, _, errors = zofed_command("tasks", "show", *arguments, "--dataset", rows)
    assert status == 2 and wanted in errors and len(errors.splitlines()) == 1


def test_colours_stand_for_brackets_on_a_terminal_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from zofed.preflight.task_row import Piece, TaskRow

    row = TaskRow(1, 1, (Piece("Answer:", False), Piece(" yes", True)), 3, 1)

    def told(**kind: Any) -> str:
        console = PlainConsole(highlight=False, soft_wrap=True, color_system="standard", **kind)
        monkeypatch.setattr(tasks, "console", console)
        with console.capture() as captured:
            tasks._tell_row(row, "d", "m")
        return captured.get().splitlines()[-1]

    assert told(force_terminal=True) == "Answer:\x1b[32m yes\x1b[0m"
    assert told(force_terminal=True, no_color=True) == told(force_terminal=False) == "Answer:[ yes]"


def test_what_trains_of_a_text_is_all_of_it(zofed_command: Zofed, tmp_path: Path) -> None:
    path = tmp_path / "text.toml"
    path.write_text('task = "language-model"\ndataset = "sample-dclm"\n')
    status, output, _ = zofed_command("tasks", "show", path)
    assert status == 0 and output[output.index("row 1 of 2,000") :].splitlines()[1].startswith("[")


@pytest.mark.parametrize(
    ("task", "row", "shown"),
    [
        (
            "copa",
            {
                "premise": "It fell.",
                "choice1": "It broke.",
                "choice2": "It was dropped.",
                "question": "cause",
                "label": 1,
            },
            ["It fell because", "        [ it broke.]", "  right [ it was dropped.]"],
        ),
        (
            "record",
            {"passage": "B went.", "query": "Then @placeholder ate.", "entities": ["Ann", "Bob"], "answers": ["Bob"]},
            ["B went.", "-", "        [ Then Ann ate.]", "  right [ Then Bob ate.]"],
        ),
    ],
)
def test_candidates_of_a_rows_own_are_shown(
    zofed_command: Zofed, tmp_path: Path, task: str, row: dict[str, Any], shown: list[str]
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    status, output, errors = zofed_command("tasks", "show", task, "--dataset", path)
    assert status == 0, errors
    assert output[output.index("row 1 of 1") :].splitlines()[1:] == shown
