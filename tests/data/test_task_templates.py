"""Rows of the hub's data sets as the shipped tasks write them, to the character as the papers' code does."""

import json
from pathlib import Path
from typing import Any

import pytest

from zofed.config import task_files
from zofed.data import documents, download
from zofed.data.catalog import CATALOG
from zofed.data.cells import column_of, with_paths
from zofed.data.templates import Template

FLOWER = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n"
    "### Instruction:\n{}\n### Response:"
)
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nWho?\n\n### Response:\n"
)
ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 1\n\n### Response:\n"
)
ABSTRACT = "Abstract: We gave it.\nIt helped.\nQuestion: Does it help?"
# Rows by data set, in the hub's columns.
ROWS: dict[str, dict[str, Any]] = {
    "sst2": {"sentence": "a joy to watch ", "label": 1, "idx": 0},
    "rte": {"premise": "It rained in Ulm.", "hypothesis": "Ulm was wet.", "label": 0},
    "cb": {"premise": "A: Do you think so? B: No.", "hypothesis": "it is so", "label": 1},
    "boolq": {"question": "is it safe", "passage": "It is safe.", "answer": True},
    "wsc": {"text": "Ann told Bob that He won.", "span1_text": "Bob", "span2_text": "He", "label": 1},
    "wic": {"word": "bank", "sentence1": "A bank lends.", "sentence2": "The bank is muddy.", "label": 0},
    "multirc": {"paragraph": "Ann met Bob.", "question": "Who met Bob?", "answer": "Ann", "label": 1},
    "copa": {
        "premise": "The man broke his toe. ",
        "choice1": "He got a hole in his sock.",
        "choice2": "I dropped a hammer.",
        "question": "cause",
        "label": 1,
    },
    "record": {
        "passage": "Ann met Bob in Ulm.\n@highlight\nThey had met",
        "query": "Later @placeholder went home.",
        "entities": ["Ann", "Bob", "Ulm"],
        "answers": ["Bob"],
    },
    "squad": {
        "title": "Ulm",
        "context": "Ulm lies on a river.",
        "question": " Where does Ulm lie? ",
        "answers": {"text": ["on a river", "a river"], "answer_start": [9, 12]},
    },
    "drop": {
        "passage": "He scored 3 times.",
        "question": " How often did he score?",
        "answers_spans": {"spans": ["3"], "types": ["number"]},
    },
    "sst5": {"text": "a joy to watch", "label": 4},
    "mnli": {"premise": "It rained.", "hypothesis": "The streets were wet.", "label": 0},
    "snli": {"premise": "A dog runs.", "hypothesis": "An animal moves.", "label": 0},
    "trec": {"text": "What is a toe ?", "coarse_label": 2, "fine_label": 9},
    "ag-news": {"text": "Shares fell.", "label": 2},
    "pubmedqa": {
        "pubid": 1,
        "question": "Does it help?",
        "context": {"contexts": ["We gave it.", "It helped."], "labels": ["A", "B"]},
        "long_answer": "It helps.",
        "final_decision": "yes",
    },
    "alpaca-gpt4": {"instruction": "Say hi.", "input": "ignored", "output": "Hi!"},
    "fingpt-sentiment": {"instruction": "What is the sentiment?", "input": "Sales rose.", "output": "positive"},
    "medical-flashcards": {"instruction": "Answer truthfully", "input": "What is a toe?", "output": "A digit."},
    "code-alpaca": {"instruction": "Double it.", "input": "x = 1", "output": "x *= 2"},
    "dolly": {"instruction": "Who?", "context": "", "response": "Me.", "category": "open_qa"},
    "natural-instructions": {"task_name": "task1", "id": "a", "definition": "Add.", "inputs": "1 1", "targets": "2"},
}
# Of each task the prompt, and the right word or response behind it.
TEXTS: dict[str, tuple[str, str]] = {
    "sst2": ("a joy to watch It was", " great"),
    "rte": ('It rained in Ulm.\nDoes this mean that "Ulm was wet." is true? Yes or No?\n', "Yes"),
    "cb": ('Suppose A: Do you think so? B: No. Can we infer that "it is so"? Yes, No, or Maybe?\n', "No"),
    "boolq": ("It is safe. Is it safe?\n", "Yes"),
    "wsc": (
        'Ann told Bob that He won.\nIn the previous sentence, does the pronoun "he" refer to Bob? Yes or No?\n',
        "Yes",
    ),
    "wic": (
        'Does the word "bank" have the same meaning in these two sentences? Yes, No?\nA bank lends.\n'
        "The bank is muddy.\n",
        "No",
    ),
    "multirc": (
        'Ann met Bob.\nQuestion: Who met Bob?\nI found this answer "Ann". Is that correct? Yes or No?\n',
        "Yes",
    ),
    "copa": ("The man broke his toe because", " I dropped a hammer."),
    "record": ("Ann met Bob in Ulm.\n- They had met\n-", " Later Bob went home."),
    "squad": ("Title: Ulm\nContext: Ulm lies on a river.\nQuestion: Where does Ulm lie?\nAnswer:", " on a river"),
    "drop": ("Passage: He scored 3 times.\nQuestion: How often did he score?\nAnswer:", " 3"),
    "sst2-masked": ("a joy to watch It was [MASK].", " great"),
    "sst5-masked": ("a joy to watch It was [MASK].", " great"),
    "mnli-masked": ("It rained? [MASK], the streets were wet.", " Yes"),
    "snli-masked": ("A dog runs? [MASK], an animal moves.", " Yes"),
    "rte-masked": ("It rained in Ulm? [MASK], ulm was wet.", " Yes"),
    "trec-masked": ("[MASK]: What is a toe ?", " Description"),
    "pubmedqa": (f"{ABSTRACT}\nAnswer:", " yes"),
    "pubmedqa-long": (ABSTRACT, "It helps."),
    "trec": (
        "Classify the questions based on whether their answer type is a Number, Location, Person, Description, Entity, "
        "or Abbreviation.\n\nQuestion: What is a toe ?\nAnswer Type:",
        " Description",
    ),
    "ag-news": (
        "Classify the news articles into the categories of World, Sports, Business, and Technology.\n\n"
        "Article: Shares fell.\nAnswer:",
        " Business",
    ),
    "flowertune-nlp": (FLOWER.format("Say hi."), " Hi!"),
    "flowertune-finance": (FLOWER.format("What is the sentiment? Sales rose."), " positive"),
    "flowertune-medical": (FLOWER.format("What is a toe?"), " A digit."),
    "flowertune-code": (FLOWER.format("Double it. x = 1"), " x *= 2"),
    "dolly": (ALPACA, "Me."),
    "natural-instructions": (ALPACA_INPUT, "2"),
}


def roles(settings: dict[str, Any]) -> dict[str, list[str]]:
    """What the setting `columns` of a task says: columns by role."""
    pairs = [part.split("=") for part in settings.get("columns", "").split(",") if part]
    return {role.strip(): columns.strip().split("+") for role, columns in pairs}


def right(settings: dict[str, Any], row: dict[str, Any]) -> str:
    """The right word, candidate or response of a row, as the model reads it."""
    own = roles(settings)
    row = with_paths(row, [column for columns in own.values() for column in columns])
    if settings["task"] == "instruction":
        answer = row[own["completion"][0]]
        return f" {answer}" if "' '" in settings.get("chat-template", "") else answer
    label: Any = row.get(own.get("label", ["final_decision" if "final_decision" in row else "label"])[0])
    if "candidates" in own:
        cells = row[own["candidates"][0]] if len(own["candidates"]) == 1 else [row[one] for one in own["candidates"]]
        candidate = label if isinstance(label, str) else cells[label]
        assert candidate in cells
        return Template(settings["label-words"]).render(row | {"candidate": candidate}, "row")
    return settings["label-words"].split(",")[("yes", "no", "maybe").index(label) if isinstance(label, str) else label]


@pytest.mark.parametrize("name", task_files.names())
def test_a_row_reads_as_the_papers_code_writes_it(name: str) -> None:
    settings = task_files.load(name).settings
    row = ROWS[settings["dataset"]]
    assert (Template(settings["template"]).render(row, "row"), right(settings, row)) == TEXTS[name]


def test_questions_and_premises_are_mended_as_there() -> None:
    """A question that ends in its mark gets no second one; effects follow by so; other first words lose their case."""
    boolq, copa = (task_files.load(name).settings for name in ("boolq", "copa"))
    row = ROWS["boolq"] | {"question": "Why not?"}
    assert Template(boolq["template"]).render(row, "row") == "It is safe. Why not?\n"
    row = ROWS["copa"] | {"question": "effect", "premise": "It rained"}
    assert Template(copa["template"]).render(row, "row") == "It rained so"
    words = Template(copa["label-words"])
    assert words.render({"candidate": "He fell."}, "row") == " he fell."
    assert words.render({"candidate": "Itself fell."}, "row") == " itself fell."


@pytest.mark.parametrize("name", task_files.names())
def test_a_download_keeps_every_column_that_a_task_reads(name: str) -> None:
    settings = task_files.load(name).settings
    named = {column_of(column) for columns in roles(settings).values() for column in columns}
    named |= set(Template(settings["template"]).columns)
    if "{{" in settings.get("label-words", ""):
        named |= set(Template(settings["label-words"]).columns) - {"candidate"}
    kept = set(CATALOG[settings["dataset"]].columns)
    assert named <= kept
    assert set(ROWS[settings["dataset"]]) == kept


def test_every_row_survives_its_download(tmp_path: Path) -> None:
    """Tables and lists in cells too, from parquet files as the hub has them."""
    from datasets import Dataset

    for name, row in ROWS.items():
        folder = tmp_path / name / "hub"
        folder.mkdir(parents=True)
        Dataset.from_list([row, row]).to_parquet(str(folder / "train-00000-of-00001.parquet"))
        into = tmp_path / name / "subset"
        into.mkdir()
        download.download(CATALOG[name], into, samples=0, source=folder)
        lines = next(into.glob("*.jsonl")).read_text(encoding="utf-8").splitlines()
        assert [json.loads(line) for line in lines] == [row, row]


def test_a_downloaded_row_is_a_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZOFED_DATA", str(tmp_path))
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "train.jsonl").write_text(json.dumps(ROWS["rte"]) + "\n")
    download.download(CATALOG["rte"], tmp_path / "rte", samples=0, source=tmp_path / "hub")
    found = documents.read("rte", Template(task_files.load("rte").settings["template"]))
    assert [(one.text, one.label) for one in found.documents] == [(TEXTS["rte"][0], 0)]
    assert found.names == ("entailment", "not_entailment")


def test_names_lead_into_cells() -> None:
    row = {"a": {"b": ["x", {"c": 1}]}, "d.e": "own", "f": "text"}
    names = ["a.b.0", "a.b.1.c", "d.e", "a.b.2", "a.x", "g.h", "f.0", "f", "a.b.-1"]
    assert with_paths(row, names) == row | {"a.b.0": "x", "a.b.1.c": 1}
