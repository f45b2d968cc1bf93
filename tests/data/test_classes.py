"""A label means the same class in every file of a run, on every node and in the saved model, or it is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import BertConfig, BertForSequenceClassification

from zofed import config
from zofed.base.errors import UserError
from zofed.config import Settings
from zofed.data import mixing
from zofed.data.classes import Classes
from zofed.data.documents import read
from zofed.data.tokenizers import load_tokenizer
from zofed.federated import client, server
from zofed.federated.local_grid import LocalGrid
from zofed.models.spec import ModelSpec
from zofed.training import pins
from zofed.training.task import Task

WORDS = {"neg": "bad and sad", "neu": "a plain table", "pos": "good and bright"}
QUICK = {"task": "classification", "block-size": 8, "batch-size": 2, "queries": 2, "device": "cpu"}


def lines(path: Path, *names: str, each: int = 10) -> str:
    """A .label file of documents whose text tells their class."""
    shown = [f"{name} {WORDS[name]}, number {n}\n" for n in range(each) for name in names]
    path.write_text("".join(shown))
    return str(path)


def table(path: Path, *labels: object, each: int = 10) -> str:
    path.write_text("text,label\n" + "".join(f"text {n} of {label},{label}\n" for n in range(each) for label in labels))
    return str(path)


def saved(path: Path, names: list[str], rows: list[tuple[str, int]], parquet: bool = False) -> str:
    """A data set of the library datasets, whose labels have names in an order of its own."""
    from datasets import ClassLabel, Dataset, Features, Value

    columns = {"text": [text for text, _ in rows], "label": [label for _, label in rows]}
    made = Dataset.from_dict(columns, Features({"text": Value("string"), "label": ClassLabel(names=names)}))
    if parquet:
        made.to_parquet(str(path))
    else:
        made.save_to_disk(str(path))
    return str(path)


def task(dataset: str, eval_dataset: str = "", **more: Any) -> Task:
    given = (
        QUICK | {"dataset": dataset, "eval-dataset": eval_dataset} | {k.replace("_", "-"): v for k, v in more.items()}
    )
    return Task.load(config.resolve(given))


def labels(found: Task) -> list[int | None]:
    return [document.label for document in found.held_out]


def complaint(do: Callable[[], object]) -> str:
    with pytest.raises(UserError) as raised:
        do()
    assert "\n" not in str(raised.value)
    return str(raised.value)


def classifier(folder: Path, *names: str, count: int = 0) -> str:
    """A tiny fine-tuned classifier as the hub has them."""
    named: dict[str, Any] = {"id2label": dict(enumerate(names)), "label2id": {n: at for at, n in enumerate(names)}}
    named = named if names else {"num_labels": count}
    tokenizer = load_tokenizer("shipped")
    shape = {"vocab_size": len(tokenizer), "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    size = BertConfig(**shape, num_attention_heads=1, pad_token_id=0, **named)
    BertForSequenceClassification(size).save_pretrained(folder)
    tokenizer.save_pretrained(str(folder))
    return str(folder)


def test_the_training_datas_names_number_every_file(tmp_path: Path) -> None:
    train, two = lines(tmp_path / "a.label", "neg", "neu", "pos"), lines(tmp_path / "b.label", "pos", "neg", each=1)
    found = task(train, two)
    assert found.class_names == ("neg", "neu", "pos") and labels(found) == [2, 0] and found.labels == 3
    way = {"mode": "instruct", "bp_dataset": two}
    assert [document.label for document in task(train, **way).backprop] == [2, 0]
    assert pins.of(found)["classes"] == ["neg", "neu", "pos"]
    assert found.told().splitlines()[-1] == "data: 3 classes: 0 neg (11), 1 neu (10), 2 pos (11)"


def test_case_and_numbers_of_a_file_that_lacks_a_class_keep_their_meaning(tmp_path: Path) -> None:
    numbers = table(tmp_path / "a.csv", 0, 1, 2)
    assert labels(task(numbers, table(tmp_path / "b.csv", 0, 2, each=1))) == [0, 2]
    assert labels(task(numbers, table(tmp_path / "c.csv", "2.0", " 1", each=1))) == [2, 1]
    words = lines(tmp_path / "a.label", "neg", "pos")
    (tmp_path / "b.label").write_text("Pos good\nNEG bad\n")
    assert labels(task(words, str(tmp_path / "b.label"))) == [1, 0]


def test_labels_that_are_none_of_the_classes_are_refused_with_the_classes(tmp_path: Path) -> None:
    words, numbers = lines(tmp_path / "a.label", "neg", "pos"), table(tmp_path / "a.csv", 0, 1)
    for train, other, parts in (
        (words, lines(tmp_path / "b.label", "neg", "neu"), ("eval-dataset", "'neu'", "neg, pos")),
        (words, table(tmp_path / "b.csv", 0, 1), ("eval-dataset", "numbers (0, 1)", "neg, pos", ".label")),
        (numbers, table(tmp_path / "c.csv", 1, 2), ("eval-dataset", "label 2", "0 to 1")),
        (numbers, lines(tmp_path / "c.label", "neg", "pos"), ("eval-dataset", "'neg'", "0 to 1")),
        (numbers, "sample-dclm", ("eval-dataset", "without a label")),
    ):
        told = complaint(lambda train=train, other=other: task(train, other))
        assert [part for part in parts if part not in told] == []
    (tmp_path / "d.label").write_text("pos good\nPos good\nneg bad\n" * 3)
    assert "spell them alike" in complaint(lambda: task(str(tmp_path / "d.label")))


@pytest.mark.parametrize("parquet", [False, True])
def test_names_that_a_data_set_has_for_its_numbers_count(tmp_path: Path, parquet: bool) -> None:
    rows = [(f"text {n}", n % 3) for n in range(30)]
    train = saved(tmp_path / "a.parquet" if parquet else tmp_path / "a", ["pos", "neg", "neu"], rows, parquet)
    turned = saved(tmp_path / "b.parquet" if parquet else tmp_path / "b", ["neg", "pos"], [("x", 0), ("y", 1)], parquet)
    found = task(train, turned)
    assert found.class_names == ("pos", "neg", "neu") and labels(found) == [1, 0]
    assert labels(task(train, table(tmp_path / "c.csv", 2, 0, each=1))) == [2, 0]  # numbers mean what they mean there
    assert labels(task(train, lines(tmp_path / "c.label", "neu", each=1))) == [2]
    assert task("sample-sst2").class_names == ("negative", "positive")
    assert task("sample-pubmedqa").class_names == ("yes", "no", "maybe")


def test_a_fine_tuned_models_own_names_count_or_the_clash_is_told(tmp_path: Path) -> None:
    model = classifier(tmp_path / "named", "pos", "neu", "neg")
    two = lines(tmp_path / "a.label", "neg", "pos")
    found = task(two, model=model)  # of three classes, in the model's order
    assert found.class_names == ("pos", "neu", "neg") and {d.label for d in found.train} == {0, 2}
    assert labels(task(two, table(tmp_path / "b.csv", 0, 2, each=1), model=model)) == [0, 2]
    assert task(two, model=model, pooling="mean").class_names == ("neg", "pos"), "its head is drawn anew"
    (tmp_path / "b.label").write_text("good fine\nbad poor\n" * 5)
    told = complaint(lambda: task(str(tmp_path / "b.label"), model=model))
    assert "'bad'" in told and "pos, neu, neg" in told and "id2label" in told
    plain = classifier(tmp_path / "plain", count=3)
    assert "id2label" in complaint(lambda: task(two, model=plain))
    assert task(table(tmp_path / "c.csv", 0, 1), model=plain).labels == 3
    four = task(table(tmp_path / "d.csv", 0, 1, 2, 3), model=plain)
    assert "give data of 3 classes" in complaint(four.replica)


def test_a_nodes_own_file_is_numbered_by_the_runs_names(tmp_path: Path) -> None:
    settings, named = config.resolve(QUICK), Classes(("pos", "neu", "neg"), by_number=False)
    own = Task.own(settings, lines(tmp_path / "a.label", "neg", "pos"), named)
    assert {document.label for document in own.train} == {0, 2} and own.labels == 3
    told = complaint(lambda: Task.own(settings, table(tmp_path / "a.csv", 0, 1), named))
    assert told.startswith("node config dataset") and "pos, neu, neg" in told
    (tmp_path / "b.label").write_text("bad x\npos y\n")
    assert "'bad'" in complaint(lambda: Task.own(settings, str(tmp_path / "b.label"), named))


@pytest.mark.parametrize("classes", [Classes.numbered(3), Classes(("a", "ä, b")), Classes(("1", "0"), False)])
def test_classes_come_back_from_a_message(classes: Classes) -> None:
    assert Classes.unpacked(len(classes), classes.packed()) == classes


@pytest.mark.parametrize("text", ["[", "3", "[]", '["a", "b"]', '[true, "a"]', '[true, "a", "a"]', '[true, "a", 1]'])
def test_what_is_no_list_of_classes_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"does not name 2 classes|Expecting"):
        Classes.unpacked(2, text)


def test_merged_sets_are_numbered_by_their_names(tmp_path: Path) -> None:
    one, other = lines(tmp_path / "a.label", "neu", "pos"), lines(tmp_path / "b.label", "neg", "pos")
    found = read(str(mixing.merge([one, other], tmp_path / "merged", 0)[0]))
    assert found.names == ("neu", "pos", "neg") and not found.is_ordered
    assert all(WORDS[found.names[document.label or 0]] in document.text for document in found.documents)
    told = complaint(lambda: mixing.merge([one, table(tmp_path / "c.csv", 0, 1)], tmp_path / "no", 0))
    assert "neu, pos" in told and "numbers" in told
    assert not (tmp_path / "no").exists()


def test_a_run_tells_what_it_read_and_its_model_keeps_the_names(
    tmp_path: Path, zofed_command: Callable[..., tuple[int, str, str]]
) -> None:
    train, two = lines(tmp_path / "a.label", "neg", "neu", "pos"), lines(tmp_path / "b.label", "neg", "pos", each=2)
    options = [part for key, value in QUICK.items() for part in (f"--{key}", value)]
    run = tmp_path / "run"
    command = ("train", *options, "--steps", 2, "--dataset", train, "--eval-dataset", two, "--out", run)
    status, out, errors = zofed_command(*command)
    assert status == 0, errors
    assert "data: 30 documents of a.label" in out and "data: 3 classes: 0 neg (12), 1 neu (10), 2 pos (12)" in out
    summary = json.loads((run / "summary.json").read_text())
    assert summary["classes"] == ["neg", "neu", "pos"]
    assert [facts["documents"] for facts in summary["data_read"]] == [30, 4]
    written = json.loads((run / "model" / "config.json").read_text())
    assert written["id2label"] == {"0": "neg", "1": "neu", "2": "pos"}
    assert written["label2id"] == {"neg": 0, "neu": 1, "pos": 2}
    how = config.resolve(QUICK | {"model": str(run / "model")})
    assert ModelSpec.of(how).class_names() == ("neg", "neu", "pos")
    assert labels(task(lines(tmp_path / "c.label", "pos", "neg", each=2), model=str(run / "model")))[0] in (0, 2)
    assert zofed_command("train", "--resume", run)[0] == 0


def test_plans_tell_the_names_to_a_node_that_reads_its_own_file(tmp_path: Path) -> None:
    train = lines(tmp_path / "a.label", "neg", "neu", "pos")
    values = QUICK | {"dataset": train, "rounds": 2, "clients": 2, "out": str(tmp_path / "run"), "eval-interval": 2}
    settings: Settings = config.resolve(values)
    held: list[set[int]] = []
    client.forget()
    grid = LocalGrid(client.app, 2, settings.model_dump(by_alias=True))
    deliver = grid._deliver

    def to_a_new_process(message: Any) -> str:
        client.forget()
        return deliver(message)

    grid._deliver = to_a_new_process  # type: ignore[method-assign]
    grid._contexts[1002].node_config["dataset"] = lines(tmp_path / "own.label", "pos", "neg")
    parts = client.ClientSession.parts

    def noted(self: client.ClientSession, context: Any) -> Any:
        found = parts(self, context)
        if "dataset" in context.node_config:
            held.append(set(found[0]["labels"].tolist()))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(client.ClientSession, "parts", noted)
        summary = server.run(grid, settings, "")
    client.forget()
    assert summary["status"] == "completed" and held and all(found == {0, 2} for found in held)
    assert len(set(summary["client_digests"].values())) == 1
