"""Which columns of a file are read, whoever wrote it; what would be lost in silence is told or refused."""

import json
from pathlib import Path

import pytest

from zofed import config
from zofed.base.errors import UserError
from zofed.data.documents import Reading, load_documents, read

PAIRS = (("what colour is it ?", "it is red", 1), ("is it far ?", "it is near", 0))


def reading(path: Path, content: str | bytes) -> Reading:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return read(str(path))


def refused(path: Path, content: str | bytes) -> str:
    with pytest.raises(UserError) as raised:
        reading(path, content)
    assert "\n" not in str(raised.value) and path.name in str(raised.value)
    return str(raised.value)


def texts_and_labels(found: Reading) -> list[tuple[str, int | None]]:
    return [(document.text, document.label) for document in found.documents]


def as_parquet(path: Path) -> None:
    from datasets import Dataset

    rows = [{"index": n, "question": q, "sentence": s, "label": label} for n, (q, s, label) in enumerate(PAIRS)]
    if path.suffix:
        Dataset.from_list(rows).to_parquet(str(path))
    else:
        Dataset.from_list(rows).save_to_disk(str(path))


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.json", "a.jsonl", "a.parquet", "folder"])
def test_half_of_a_pair_that_is_not_read_is_told(tmp_path: Path, name: str) -> None:
    rows = [{"index": n, "question": q, "sentence": s, "label": label} for n, (q, s, label) in enumerate(PAIRS)]
    separator = "," if name == "a.csv" else "\t"
    table = "\n".join(separator.join(map(str, line)) for line in [rows[0], *(row.values() for row in rows)])
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    content = {"a.json": json.dumps(rows), "a.jsonl": lines, "a.csv": table, "a.tsv": table}
    if name in content:
        (tmp_path / name).write_text(content[name])
    else:
        as_parquet(tmp_path / name)
    found = read(str(tmp_path / name))
    assert found.read == ("sentence", "label") and found.unread == ("question",)
    assert texts_and_labels(found) == [("it is red", 1), ("it is near", 0)]
    assert "text that was NOT read: question" in found.told() and "read from sentence, label" in found.told()
    assert found.facts()["text_columns_not_read"] == ["question"]


def test_columns_that_hold_no_text_are_not_called_so(tmp_path: Path) -> None:
    found = reading(tmp_path / "a.csv", "text,id,url,when\na b,x7,http://a.b/c-d,2020-01-01 10:00\n")
    assert found.unread == () and found.blank == 0
    assert reading(tmp_path / "a.csv", "text,question\na,这是什么颜色的房子\n").unread == ("question",)
    assert reading(tmp_path / "a.csv", 'text\na\n" "\n').told().endswith("1 rows without text left out")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "text,labels\ngood,1\nbad,0\n"),
        ("a.csv", "text, label\ngood, 1\nbad, 0\n"),
        ("a.csv", "\ufeff\ufeffText ,LABEL\ngood,1.0\nbad,0\n"),
        ("a.csv", "text,label,,\ngood,1,,\nbad,0,,\n"),
        ("a.tsv", " Sentence\tLabels\r\ngood\t1\r\nbad\t0\r\n"),
        ("a.json", '{"text": "good", "label": 1}\n\n{"text": "bad", "label": 0}\n'),
        ("a.jsonl", '[{"Text": "good", "label": true},\n {"Text": "bad", "label": false}]'),
        ("a.jsonl", '{"text": "good", "labels": 1}\n{"text": "bad", "labels": "0"}\n{"text": NaN, "labels": 0}\n'),
    ],
)
def test_columns_are_found_however_they_are_spelt(tmp_path: Path, name: str, content: str) -> None:
    assert texts_and_labels(reading(tmp_path / name, content)) == [("good", 1), ("bad", 0)]


def test_one_line_of_json_is_a_row_under_either_suffix(tmp_path: Path) -> None:
    for name in ("a.json", "a.jsonl"):
        assert texts_and_labels(reading(tmp_path / name, '{"text": "good", "label": 1}\n')) == [("good", 1)]


def test_a_column_called_labels_may_hold_something_else(tmp_path: Path) -> None:
    found = reading(
        tmp_path / "a.jsonl", '{"text": "good", "labels": ["B-PER", "O"]}\n{"text": "bad", "labels": "x"}\n'
    )
    assert texts_and_labels(found) == [("good", None), ("bad", None)]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.csv", "text,text,label\na,b,1\n", "two columns named 'text'"),
        ("a.csv", "text,id, id\na,b,1\n", "two columns named 'id'"),
        ("a.tsv", "label\ttext\tlabel\n1\ta\t0\n", "two columns named 'label'"),
        ("a.csv", "text,label\na,1\ntext,label\nb,0\n", "line 3 of"),
        ("a.tsv", "text\tlabel\na\t1\ntext\tlabel\n", "is the header again"),
        ("a.jsonl", '{"text": "a", "text": "b"}\n', "two keys 'text'"),
        ("a.json", '[{"text": "a", "label": 0, "label": 1}]', "two keys 'label'"),
        ("a.csv", "Text,TEXT\na,b\n", "'Text' and 'TEXT'"),
        ("a.csv", "text;label\na;1\n", "separate the columns by commas, not by ';'"),
        ("a.csv", 'text,label\n"a\nb",1\nc\n', "line 4 of"),
        ("a.csv", "text,label\na,1.5\n", "'1.5'"),
        ("a.csv", "text,label\na,-2\n", "'-2'"),
        ("a.csv", "text,label\na,good\nb,1\n", "use numbers or words, not both"),
        ("a.jsonl", '{"text": ["a", "b"]}\n', "write the column as strings"),
        ("a.csv", "text,label\na,1\n".encode("utf-16"), "save it as UTF-8"),
        ("a.label", "pos good\nneg bad\n".encode("utf-16-le"), "save it as UTF-8"),
        ("a.txt", "pos good\nneg bad\n".encode("utf-16-be"), "save it as UTF-8"),
    ],
)
def test_what_would_be_lost_or_misread_is_refused(tmp_path: Path, name: str, content: str | bytes, told: str) -> None:
    assert told in refused(tmp_path / name, content)


def test_parquet_of_two_equal_columns_or_another_type_is_refused(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    for columns, names, told in (
        (([" a "], ["b"]), ["text", "text"], "two columns named 'text'"),
        (([b"a"], [1]), ["text", "label"], "write the column as strings"),
        (([["a"]], [1]), ["text", "label"], "write the column as strings"),
    ):
        table = pyarrow.Table.from_arrays([pyarrow.array(column) for column in columns], names=names)
        pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
        with pytest.raises(UserError, match=told):
            read(str(tmp_path / "a.parquet"))
    table = pyarrow.table({"text": pyarrow.array([float("nan")] * 3), "label": [0, 1, 0]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match="0 rows hold text"):
        read(str(tmp_path / "a.parquet"))


def test_more_rows_of_parquet_than_are_sampled_come_once_and_in_order(tmp_path: Path) -> None:
    from datasets import Dataset

    rows = [{"text": f"text {n}", "other": f"more of {n}", "label": n % 3} for n in range(200)]
    Dataset.from_list(rows).to_parquet(str(tmp_path / "a.parquet"))
    found = read(str(tmp_path / "a.parquet"))
    assert texts_and_labels(found) == [(row["text"], row["label"]) for row in rows] and found.unread == ("other",)


def test_a_settings_file_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_bytes(b"\xef\xbb\xbfsteps = 2\n")
    assert config.read_toml(tmp_path / "a.toml") == {"steps": 2}
    (tmp_path / "a.toml").write_bytes("steps = 2\n".encode("utf-16"))
    with pytest.raises(UserError, match="save it as UTF-8"):
        config.read_toml(tmp_path / "a.toml")


@pytest.mark.parametrize("name", ["label", "Label", " label"])
def test_words_in_a_label_column_are_labels_however_it_is_spelt(tmp_path: Path, name: str) -> None:
    path = tmp_path / "words.csv"
    path.write_text(f"text,{name}\ngood film,pos\nbad film,neg\n")
    assert [document.label for document in load_documents(str(path))] == [1, 0]


def test_a_text_like_the_header_of_its_one_column_is_a_text(tmp_path: Path) -> None:
    (tmp_path / "one.tsv").write_text("first doc\ntext\nlast doc\n")
    assert [d.text for d in load_documents(str(tmp_path / "one.tsv"))] == ["first doc", "text", "last doc"]


def test_names_of_classes_and_columns_are_printable(tmp_path: Path) -> None:
    path = tmp_path / "a.label"
    path.write_text("\x1b[31mred good film\nblue bad film\n" * 4)
    found = read(str(path))
    assert set(found.names) == {"\\x1b[31mred", "blue"}
    (tmp_path / "b.csv").write_text('text,"\x1b[2J"\na text,some other words\n')
    assert read(str(tmp_path / "b.csv")).told().isprintable()
