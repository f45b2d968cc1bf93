"""The shipped samples and tokenizer: remade to the byte, in the promised schemas, beyond counting words."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
import torch

from zofed.data.encoding import SHIPPED, load_documents, load_tokenizer
from zofed.data.sample_data import (
    END_OF_TEXT,
    TOKENIZER_VOCABULARY,
    film_reviews,
    instructions,
    make_shipped_files,
    trial_abstracts,
)
from zofed.data.tokenizers import SHIPPED_TOKENIZER


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (SHIPPED / name).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    root = tmp_path_factory.mktemp("made")
    return root, make_shipped_files(root)


@pytest.mark.slow
def test_remaking_gives_the_committed_bytes(made: tuple[Path, list[Path]]) -> None:
    root, files = made
    shipped = {path.relative_to(SHIPPED.parent) for folder in (SHIPPED, SHIPPED_TOKENIZER) for path in files_in(folder)}
    assert {file.relative_to(root) for file in files} == set(map(Path, shipped)) == set(relative_files(root))
    for file in files:
        assert file.read_bytes() == (SHIPPED.parent / file.relative_to(root)).read_bytes(), file.name


def files_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def relative_files(root: Path) -> list[Path]:
    return [path.relative_to(root) for path in files_in(root)]


def test_shipped_files_are_of_the_kinds_and_size_an_app_bundle_takes(made: tuple[Path, list[Path]]) -> None:
    _, files = made
    assert {file.suffix for file in files} == {".json", ".jsonl", ".md"}
    assert sum(file.stat().st_size for file in files) < 2_000_000
    assert all(file.read_bytes().endswith(b"\n") and b"\r" not in file.read_bytes() for file in files)


def test_another_seed_gives_other_samples() -> None:
    assert film_reviews(0) == film_reviews(0)
    assert film_reviews(0) != film_reviews(1)


def test_web_documents_show_their_topic_in_the_url() -> None:
    documents = rows("dclm/train.jsonl")
    assert len(documents) == 2000
    topics = Counter(document["url"].split("/")[3] for document in documents)
    assert len(topics) == 8 and set(topics.values()) == {250}
    assert not any("{" in document["text"] for document in documents)


def test_web_document_sums_add_up() -> None:
    texts = [document["text"] for document in rows("dclm/train.jsonl")]
    sums = [
        tuple(map(int, match.groups()))
        for text in texts
        for match in re.finditer(r"(\d+) of them and in the afternoon (\d+), which makes (\d+)", text)
    ]
    assert len(sums) > 300 and all(a + b == total for a, b, total in sums)


def test_trial_answers_follow_from_the_rates_in_the_last_context() -> None:
    trials = rows("pubmedqa/train.jsonl")
    assert trials == trial_abstracts(0) and len(trials) == 500
    for trial in trials:
        results = trial["context"]["contexts"][-1].split(". ")[1]
        counts = [tuple(map(int, pair)) for pair in re.findall(r"(\d+) of (\d+)", results)]
        (treated, size), (control, size2) = counts
        change = 100 * treated / size - 100 * control / size2
        asked = -change if " reduce " in trial["question"] else change
        assert trial["final_decision"] == ("yes" if asked >= 10 else "maybe" if asked > 0 else "no")


def test_instructions_ask_twice_for_what_is_answered_and_sums_add_up() -> None:
    asked = rows("alpaca/train.jsonl")
    assert asked == instructions(0) and len(asked) == 640
    assert {tuple(row) for row in asked} == {("instruction", "input", "output")}
    assert not any("{" in text or not text for row in asked for text in row.values())
    sums = [re.findall(r"\d+", text) for row in asked if row["instruction"].startswith("Add ") for text in row.values()]
    assert len(sums) == 3 * 160
    for said, again, (a, b, total) in zip(sums[::3], sums[1::3], sums[2::3], strict=True):
        assert said == again == [a, b] and int(a) + int(b) == int(total)


def test_reviews_never_repeat_and_carry_their_positions() -> None:
    train, validation = rows("sst2/train.jsonl"), rows("sst2/validation.jsonl")
    assert (len(train), len(validation)) == (2000, 400)
    assert len({row["sentence"] for row in train + validation}) == 2400
    assert [row["idx"] for row in train] == list(range(2000))
    assert not any("{" in row["sentence"] or "}" in row["sentence"] for row in train + validation)


def test_counting_words_reaches_the_figure_of_the_readme() -> None:
    train, validation = rows("sst2/train.jsonl"), rows("sst2/validation.jsonl")
    words = sorted({word for row in train for word in row["sentence"].split()})
    index = {word: number for number, word in enumerate(words)}

    def presence(reviews: list[dict]) -> tuple[torch.Tensor, torch.Tensor]:
        features = torch.zeros(len(reviews), len(words))
        for position, row in enumerate(reviews):
            features[position, [index[word] for word in row["sentence"].split() if word in index]] = 1
        return features, torch.tensor([float(row["label"]) for row in reviews])

    features, labels = presence(train)
    weights = torch.zeros(len(words) + 1, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=100)

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        logits = features @ weights[:-1] + weights[-1]
        value = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels)
        value = value + 1e-3 * (weights[:-1] ** 2).sum()
        value.backward()
        return value

    optimizer.step(loss)  # pyright: ignore[reportArgumentType]  # torch types the closure as returning float
    features, labels = presence(validation)
    accuracy = ((features @ weights[:-1] + weights[-1] > 0) == (labels > 0)).float().mean().item()
    majority = max(labels.mean().item(), 1 - labels.mean().item())
    readme = (SHIPPED / "README.md").read_text(encoding="utf-8")
    assert f"| {100 * majority:.1f} % |" in readme
    assert "| 84.5 % |" in readme
    assert abs(accuracy - 0.845) < 0.006  # two reviews, for another machine's rounding


def test_tokenizer_is_small_round_trips_and_puts_end_of_text_first() -> None:
    tokenizer = load_tokenizer("shipped")
    assert len(tokenizer) == TOKENIZER_VOCABULARY
    assert tokenizer.convert_tokens_to_ids(END_OF_TEXT) == 0
    roles = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id)
    assert roles == (0, 0, 0, 0)
    for text in ("Héllo wörld 漢字 🙂", " two  spaces\n\ttab", "the plot is dull"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_tokenizer_files_name_no_machine() -> None:
    config = json.loads((SHIPPED_TOKENIZER / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert not any("/" in str(value) for value in config.values())
    assert not {"is_local", "local_files_only", "transformers_version", "name_or_path"} & config.keys()


def test_samples_load_by_name() -> None:
    assert Counter(document.label for document in load_documents("sample-pubmedqa")).keys() == {0, 1, 2}
    assert len(load_documents("sample-sst2")) == 2400
    assert len(load_documents("sample-alpaca")) == 640
    assert {document.label for document in load_documents("sample-dclm")} == {None}
