"""Rows in the shapes people have: recognised by their columns and told; what cannot be used is named or counted."""

import json
from pathlib import Path
from typing import Any

import pytest

from zofed.base.errors import UserError
from zofed.data.columns import roles_of
from zofed.data.conversations import Turn
from zofed.data.documents import Reading, read
from zofed.data.templates import Template

PAIR = (Turn("user", "What is it?"), Turn("assistant", "It is red."))
USER, ASSISTANT = ({"role": turn.role, "content": turn.text} for turn in PAIR)


def reading(folder: Path, *rows: dict[str, Any], columns: str = "", template: str = "", turns: bool = True) -> Reading:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return read(str(path), Template(template) if template else None, roles_of(columns), turns=turns)


def refused(folder: Path, *rows: dict[str, Any], **how: Any) -> str:
    with pytest.raises(UserError) as raised:
        reading(folder, *rows, **how)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"messages": [USER, ASSISTANT]}, "messages (user, assistant)"),
        ({"messages": json.dumps([USER, ASSISTANT])}, "messages (user, assistant)"),
        ({"messages": {"role": ["user", "assistant"], "content": [PAIR[0].text, PAIR[1].text]}}, "messages (user"),
        ({"messages": [USER, ASSISTANT | {"content": [{"type": "text", "text": PAIR[1].text}]}]}, "messages (user"),
        (
            {"conversations": [{"from": "human", "value": PAIR[0].text}, {"from": "gpt", "value": PAIR[1].text}]},
            "ShareGPT conversations (user, assistant)",
        ),
        (
            {"conversation": [{"from": "user", "value": PAIR[0].text}, {"from": "bard", "value": PAIR[1].text}]},
            "ShareGPT conversation (user, assistant)",
        ),
        ({"prompt": PAIR[0].text, "completion": PAIR[1].text}, "prompt and completion: prompt, completion"),
        ({"prompt": [USER], "completion": [ASSISTANT]}, "prompt and completion: prompt, completion"),
        ({"prompt": PAIR[0].text, "response": PAIR[1].text}, "prompt and completion: prompt, response"),
        ({"instruction": PAIR[0].text, "output": PAIR[1].text, "input": ""}, "Alpaca: instruction, input, output"),
        ({"Instruction": PAIR[0].text, "Output": PAIR[1].text, "text": "both"}, "Alpaca: Instruction, Output"),
        ({"instruction": PAIR[0].text, "context": "", "response": PAIR[1].text}, "Dolly: instruction, context"),
        ({"question": PAIR[0].text, "answer": PAIR[1].text}, "question and answer: question, answer"),
        ({"question": PAIR[0].text, "context": {"contexts": ["a"]}, "long_answer": PAIR[1].text}, "PubMedQA: question"),
        ({"QUESTION": PAIR[0].text, "CONTEXTS": ["a"], "LONG_ANSWER": PAIR[1].text}, "PubMedQA: QUESTION, LONG_ANSWER"),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else "",
)
def test_each_shape_is_known_by_its_columns_and_told(tmp_path: Path, row: dict[str, Any], told: str) -> None:
    found = reading(tmp_path, row)
    assert found.documents[0].turns == PAIR and found.documents[0].text == ""
    assert f"read from {told}" in found.told() and found.facts()["shape"].startswith(told)


def test_the_second_part_of_an_instruction_the_system_and_earlier_turns_belong_to_the_prompt(tmp_path: Path) -> None:
    row = {"instruction": "Translate.", "input": "rot", "output": "red", "system": "Be brief.", "history": [["a", "b"]]}
    assert reading(tmp_path, row).documents[0].turns == (
        Turn("system", "Be brief."),
        Turn("user", "a"),
        Turn("assistant", "b"),
        Turn("user", "Translate.\n\nrot"),
        Turn("assistant", "red"),
    )


def written(path: Path, rows: list[dict[str, str]]) -> str:
    """A file of rows, in the format of its name."""
    if path.suffix == ".parquet":
        from datasets import Dataset

        Dataset.from_list(rows).to_parquet(str(path))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        mark = "," if path.suffix == ".csv" else "\t"
        path.write_text("".join(mark.join(line) + "\n" for line in [list(rows[0]), *(row.values() for row in rows)]))
    return str(path)


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.json", "a.parquet"])
def test_every_format_has_the_shapes(tmp_path: Path, name: str) -> None:
    rows = [{"prompt": f"Say {number}", "response": f"It is {number}", "extra": "not at all"} for number in range(3)]
    found = read(written(tmp_path / name, rows), turns=True)
    assert [document.turns[1].text for document in found.documents] == ["It is 0", "It is 1", "It is 2"]
    assert found.unread == ("extra",)


def test_what_a_template_makes_is_the_prompt_and_all_columns_are_at_hand(tmp_path: Path) -> None:
    row = {"QUESTION": "Is it?", "CONTEXTS": ["One.", "Two."], "LONG_ANSWER": "It is.", "final_decision": "yes"}
    found = reading(tmp_path, row, template="{{ CONTEXTS | join(' ') }} {{ QUESTION }}")
    assert found.documents[0].turns == (Turn("user", "One. Two. Is it?"), Turn("assistant", "It is."))
    assert "read from the template's prompts, and LONG_ANSWER" in found.told()
    found = reading(tmp_path, row, template="{{ QUESTION }}", columns="completion=final_decision")
    assert found.documents[0].turns[1].text == "yes"


def test_columns_of_other_names_are_given_roles_and_templates_know_them_by_both(tmp_path: Path) -> None:
    row = {"review": "Fine.", "stars": "good", "where": "here", "about": "films", "kind": "news"}
    found = reading(tmp_path, row, columns="text=review, label=stars, source=where, topic=about", turns=False)
    document = found.documents[0]
    assert (document.text, document.label, document.source, document.topic) == ("Fine.", 0, "here", "films")
    assert found.names == ("good",) and found.unread == ()
    found = reading(tmp_path, row, columns="text=review", template="{{ text }} = {{ review }}", turns=False)
    assert found.documents[0].text == "Fine. = Fine."
    found = reading(tmp_path, row, columns="prompt=review, completion=stars")
    assert found.documents[0].turns == (Turn("user", "Fine."), Turn("assistant", "good"))
    chat = {"talk": [USER, ASSISTANT], "text": "else"}
    assert reading(tmp_path, chat, columns="messages=talk").documents[0].turns == PAIR


def test_a_table_without_known_names_has_its_header_read_where_columns_name_it(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text("review\tstars\nfine film\tgood\nbad film\tbad\n")
    found = read(str(path), None, roles_of("text=review,label=stars"))
    assert [(document.text, document.label) for document in found.documents] == [("fine film", 1), ("bad film", 0)]


def test_candidates_are_a_cell_or_several_and_the_right_one_has_a_number_a_text_or_a_letter(tmp_path: Path) -> None:
    for cell in (["a cat", "a dog"], '["a cat", "a dog"]'):
        rows = [{"text": "It is", "choices": cell, "label": label} for label in (1, "a dog", "B")]
        found = reading(tmp_path, *rows, columns="candidates=choices", turns=False)
        assert [document.candidates for document in found.documents] == [("a cat", "a dog")] * 3
        assert [document.label for document in found.documents] == [1, 1, 1]
    row = {"premise": "It fell", "choice1": "it broke", "choice2": "it flew", "label": 0}
    how: dict[str, Any] = {"columns": "candidates=choice1+choice2", "template": "{{ premise }} so", "turns": False}
    assert reading(tmp_path, row, **how).documents[0].candidates == ("it broke", "it flew")
    assert "line 1 of" in (told := refused(tmp_path, row | {"label": 2}, **how)) and "2 candidates" in told
    assert "all different" in refused(tmp_path, row | {"choice2": "it broke"}, **how)
    assert "no list of candidates" in refused(tmp_path, row | {"choice2": ""}, **how)


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("text", "no ROLE=COLUMN"),
        ("text=", "no ROLE=COLUMN"),
        ("words=a", "'words' is no role; use text, label"),
        ("text=a, text=b", "gives text twice"),
    ],
)
def test_a_wrong_setting_is_refused_with_what_there_is(setting: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        roles_of(setting)


def test_a_column_that_is_not_there_is_named_with_those_that_are(tmp_path: Path) -> None:
    told = refused(tmp_path, {"review": "a", "stars": 1}, columns="text=reviews", turns=False)
    assert "line 1 of" in told and "'reviews'" in told and "'review', 'stars'" in told
    assert "no column 'stars'" in refused(
        tmp_path, {"review": "a", "stars": 1}, {"review": "b"}, columns="text=review,label=stars", turns=False
    )


def chat(*roles: str) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": f"said by {role}"} for role in roles]}


@pytest.mark.parametrize(
    ("row", "told"),
    [
        (chat("user", "tool", "assistant"), "'tool', which is not read"),
        ({"messages": [{"from": "function_call", "value": "f"}]}, "'function_call', which is not read"),
        (chat("user", "moderator"), "'moderator': use system, user and assistant"),
        (chat("user", "assistant", "assistant"), "two turns of the assistant in a row (2, 3)"),
        (chat("user", "user", "assistant"), "two turns of the user in a row (1, 2)"),
        (chat("user", "system", "assistant"), "a system turn as number 2"),
        ({"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [{}]}]}, "calls a tool"),
        ({"messages": [USER, ASSISTANT], "tools": [{"name": "f"}]}, "gives tools"),
        ({"messages": [USER, ASSISTANT | {"content": [{"type": "image"}]}]}, "not all text"),
        ({"messages": [USER, ASSISTANT | {"weight": 0}]}, "weight 0"),
        ({"messages": "[{"}, "no JSON list"),
        ({"messages": ["a", "b"]}, "no list of turns"),
        ({"prompt": "a", "completion": 0.5}, "completion of type float"),
        ({"prompt": "a", "answer": "b"}, "holds no conversation: it has columns 'prompt', 'answer'"),
        ({"text": "a"}, "prompt=NAME, completion=NAME"),
        ({"instruction": "a", "output": "b"}, "Alpaca, but line 1 of"),
        ({"prompt": "a", "completion": "b\ud800"}, "unpaired surrogate"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_what_is_no_conversation_is_refused_with_its_row(tmp_path: Path, row: dict[str, Any], told: str) -> None:
    good = {"prompt": "a", "completion": "b"} if "completion" in row else {"messages": [USER, ASSISTANT]}
    message = refused(tmp_path, good, row)
    assert told in message and "line 2 of" in message


def test_rows_without_what_trains_are_left_out_counted_and_told(tmp_path: Path) -> None:
    pair = {"prompt": "a", "completion": "b"}
    found = reading(tmp_path, pair, pair | {"completion": " "}, pair | {"completion": None}, pair | {"prompt": ""})
    assert len(found.documents) == 1
    assert found.left_out == ("2 rows with an empty response left out", "1 rows with an empty prompt left out")
    assert all(part in found.told() for part in found.left_out) and found.facts()["left_out"] == list(found.left_out)
    found = reading(tmp_path, chat("system", "user"), chat("user", "assistant", "user"), chat("assistant"))
    assert [len(document.turns) for document in found.documents] == [2, 1]
    assert "1 rows without a turn of the assistant left out" in found.told()
    assert "1 rows whose last turn is the user's lost it" in found.told()
    assert "2 rows with an empty response left out" in refused(tmp_path, *[pair | {"completion": ""}] * 2)


def test_a_template_whose_column_one_row_lacks_names_that_row(tmp_path: Path) -> None:
    told = refused(tmp_path, {"a": "x", "output": "y"}, {"b": "x", "output": "y"}, template="{{ a }}")
    assert "line 2 of" in told and "no column 'a'" in told
    assert "no response to the template's prompt" in refused(tmp_path, {"a": "x"}, template="{{ a }}")


def test_a_language_model_reads_a_conversation_as_one_text(tmp_path: Path) -> None:
    found = reading(tmp_path, {"prompt": "What is it?", "completion": "It is red."}, turns=False)
    assert [(document.text, document.turns) for document in found.documents] == [("What is it?\nIt is red.", ())]
    assert "read from prompt and completion: prompt, completion" in found.told()
    assert reading(tmp_path, {"prompt": "A: ", "completion": "b"}, turns=False).documents[0].text == "A: b"
    both = {"instruction": "a", "output": "b", "text": "whole"}
    assert reading(tmp_path, both, turns=False).documents[0].text == "whole"


def test_dollys_category_and_natural_instructions_task_are_topics(tmp_path: Path) -> None:
    dolly = {"instruction": "a", "context": "", "response": "b", "category": "open_qa"}
    assert reading(tmp_path, dolly).documents[0].topic == "open_qa"
    assert reading(tmp_path, {"input": "a", "output": "b", "task": "task001"}).documents[0].topic == "task001"
    labelled = reading(tmp_path, {"text": "a", "category": "x"}, columns="label=category", turns=False).documents[0]
    assert (labelled.label, labelled.topic) == (0, "")


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.json", "a.parquet"])
def test_labels_in_words_are_numbered_by_their_letters_in_every_format(tmp_path: Path, name: str) -> None:
    rows = [{"text": f"text {label}", "label": label} for label in ("positive", "negative", "positive")]
    found = read(written(tmp_path / name, rows))
    assert [document.label for document in found.documents] == [1, 0, 1]
    assert found.names == ("negative", "positive") and not found.is_ordered


def test_true_and_false_are_labels_with_an_order(tmp_path: Path) -> None:
    for no, yes in ((False, True), ("false", "True")):
        rows = ({"text": "a", "label": yes}, {"text": "b", "label": no}, {"text": "c", "label": None})
        found = reading(tmp_path, *rows, turns=False)
        assert [document.label for document in found.documents] == [1, 0, None]
        assert found.names == ("false", "true") and found.is_ordered


def test_numbers_and_words_in_one_file_are_refused_with_a_row_of_each(tmp_path: Path) -> None:
    rows = ({"text": "a", "label": 1}, {"text": "b", "label": "good"})
    told = refused(tmp_path, *rows, turns=False)
    assert "line 1 of" in told and "line 2 of" in told and "not both" in told
    for wrong in (0.5, -2, "1.5", [1]):
        assert "line 1 of" in refused(tmp_path, {"text": "a", "label": wrong}, turns=False)


def test_a_column_labels_of_words_counts_where_they_recur(tmp_path: Path) -> None:
    twice = [{"text": "a", "labels": word} for word in ("good", "bad", "good", "bad")]
    assert [document.label for document in reading(tmp_path, *twice, turns=False).documents] == [1, 0, 1, 0]
    once = [{"text": "a", "labels": word} for word in ("a,b", "c", "d")]
    assert [document.label for document in reading(tmp_path, *once, turns=False).documents] == [None] * 3
