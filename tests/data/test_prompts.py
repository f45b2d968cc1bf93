"""Prompts as tensors: candidates of rows, demonstrations, masks, and what is refused."""

from collections import Counter

import pytest
import torch
from masked import masked_tokenizer

from zofed.base.errors import UserError
from zofed.core.candidates import NO_TOKEN
from zofed.data import prompts
from zofed.data.documents import Document
from zofed.data.prompts import Encoding
from zofed.data.tokenizers import load_tokenizer

WORDS = (" bad", " good")


def shipped(block_size: int = 60, words: tuple[str, ...] = WORDS) -> Encoding:
    return Encoding(load_tokenizer("shipped"), block_size, words)


def films(count: int) -> list[Document]:
    """Reviews, two of three of class 1."""
    return [Document(f"film {number} was", "films", int(number % 3 > 0)) for number in range(count)]


def test_rows_with_candidates_of_their_own_are_filled_up_with_absent_ones() -> None:
    encoding = shipped()
    documents = [
        Document("She ran, so", "copa", 1, candidates=(" it fell", " she was late")),
        Document("In the town of", "record", 2, candidates=(" a", " b c d e", " f")),
    ]
    found = prompts.prompt_examples(documents, encoding)
    longest = max(len(encoding.ids(text)) for document in documents for text in document.candidates)
    assert found["candidates"].shape == (2, 3, longest)
    for row, document in enumerate(documents):
        for number in range(3):
            kept = [token for token in found["candidates"][row, number].tolist() if token != NO_TOKEN]
            wanted = document.candidates[number] if number < len(document.candidates) else ""
            assert encoding.tokenizer.decode(kept) == wanted
    assert found["labels"].tolist() == [1, 2]


def test_a_prompt_leaves_room_for_its_longest_candidate() -> None:
    encoding = shipped(12)
    long = Document("word " * 40, "films", 0, candidates=(" a", " yes of course it is"))
    behind = len(encoding.ids(long.candidates[1])) - 1
    with pytest.warns(UserWarning, match="1 of 1 prompts are longer than block-size = 12"):
        found = prompts.prompt_examples([long], encoding)
    assert found["input_ids"].shape[1] + behind == 12
    with pytest.raises(UserError, match="holds no token of a prompt beside its candidates"):
        prompts.prompt_examples([long], shipped(behind))


def test_teacher_forcing_keeps_the_right_candidate_alone() -> None:
    documents = [
        Document("x", "s", 1, candidates=(" one of many words", " b")),
        Document("y", "s", 0, candidates=(" c", " d")),
    ]
    whole = prompts.prompt_examples(documents, shipped())
    found = prompts.right_alone(whole)
    assert found["labels"].tolist() == [0, 0] and found["candidates"].shape[:2] == (2, 1)
    decoded = [
        shipped().tokenizer.decode([token for token in row[0] if token != NO_TOKEN]) for row in found["candidates"]
    ]
    assert decoded == [" b", " c"] and found["candidates"].shape[2] < whole["candidates"].shape[2]


def test_demonstrations_are_drawn_by_the_seed_each_class_in_turn_and_leave_the_training_data() -> None:
    documents = films(30)
    others, chosen = prompts.drawn(documents, 6, 3)
    assert Counter(one.label for one in chosen) == {0: 3, 1: 3}
    assert sorted([*others, *chosen], key=documents.index) == documents
    assert prompts.drawn(documents, 6, 3)[1] == chosen != prompts.drawn(documents, 6, 4)[1]
    assert Counter(one.label for one in prompts.drawn(documents, 28, 3)[1]) == {0: 10, 1: 18}
    assert prompts.drawn(documents, 0, 3) == (documents, [])
    with pytest.raises(UserError, match="shots = 30 takes as many documents out of the training data"):
        prompts.drawn(documents, 30, 3)


def test_a_prompt_stands_behind_solved_ones_as_in_mezo_but_never_behind_itself() -> None:
    shots = [Document(" one It was", "s", 1), Document("two It was", "s", 0)]
    documents = [Document(" three It was", "s", 0), Document("two It was", "s", 1)]
    found = prompts.with_shots(documents, shots, shipped())
    assert found[0].text == "one It was good\n\ntwo It was bad\n\nthree It was"
    assert found[1].text == "one It was good\n\ntwo It was"
    assert [one.label for one in found] == [0, 1]


def test_of_a_long_prompt_demonstrations_are_left_out_from_the_front_and_that_is_said() -> None:
    shots = [Document("one It was", "s", 1), Document("two It was", "s", 0)]
    document = Document("three It was", "s", 0)
    size = len(shipped().ids("two It was bad\n\nthree It was"))
    behind = max(len(shipped().ids(word)) for word in WORDS) - 1
    for room, wanted in ((size, "two It was bad\n\nthree It was"), (size - 1, "three It was"), (2, "three It was")):
        with pytest.warns(UserWarning, match="1 of 1 prompts have fewer than 2 demonstrations"):
            (found,) = prompts.with_shots([document], shots, shipped(room + behind))
        assert found.text == wanted


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_a_mask_takes_the_place_of_the_word(kind: str) -> None:
    tokenizer = masked_tokenizer(kind)
    encoding = Encoding(tokenizer, 16, (" terrible", " great"), is_masked=True)
    documents = [Document("a fine film It was [MASK].", "s", 1), Document("good It was [MASK].", "s", 0)]
    found = prompts.prompt_examples(documents, encoding)
    assert (found["input_ids"][torch.arange(2), found["place"]] == tokenizer.mask_token_id).all()
    assert tokenizer.decode(found["input_ids"][0]).replace(" ", "").count("fine") == 1
    assert found["attention_mask"][0, 0] == 1 and found["attention_mask"][1, -1] == 0, "padded on the right"
    assert found["candidates"].shape == (2, 2, 1)
    assert int(found["input_ids"][0, 0]) == tokenizer.cls_token_id
    assert prompts.solved(documents[0], encoding) == "a fine film It was great."


@pytest.mark.parametrize("text", ["a " * 40 + "[MASK].", "[MASK] " + "a " * 40, "a " * 20 + "[MASK] " + "a " * 20])
def test_a_cut_keeps_the_mask(text: str) -> None:
    tokenizer = masked_tokenizer("bert")
    encoding = Encoding(tokenizer, 10, (" terrible", " great"), is_masked=True)
    with pytest.warns(UserWarning, match="parts far from the mask"):
        found = prompts.prompt_examples([Document(text, "s", 0)], encoding)
    ids = found["input_ids"][0]
    assert len(ids) == 10 and ids[found["place"][0]] == tokenizer.mask_token_id
    assert (int(ids[0]), int(ids[-1])) == (tokenizer.cls_token_id, tokenizer.sep_token_id)


@pytest.mark.parametrize(
    ("document", "words", "message"),
    [
        (Document("a", "s", 2), WORDS, "has the label 2, beyond the label-words: they have 2"),
        (Document("a", "s", None), WORDS, "has no label"),
        (Document("a", "s", 0), ("", " good"), "label words: '' has no token"),
        (Document("a", "s", 0), (" good", " good"), "' good' and ' good' are the same tokens"),
        (Document("a", "s", 0), (), "there are no label words"),
        (Document("a", "s", 3, candidates=(" x", " y")), (), "beyond the candidates of the prompt 'a'"),
        (Document("a", "s", 0, candidates=(" x", " x")), (), "candidates of the prompt 'a' .* are the same tokens"),
    ],
)  # fmt: skip
def test_what_cannot_be_chosen_among_is_refused(document: Document, words: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        prompts.prompt_examples([document], shipped(words=words))


@pytest.mark.parametrize(
    ("text", "words", "message"),
    [
        ("It was.", (" terrible", " great"), "has 0 mask tokens"),
        ("[MASK] was [MASK].", (" terrible", " great"), "has 2 mask tokens"),
        ("It was [MASK].", (" terrible", " great bad"), r"' great bad' is 2 tokens \('great', 'bad'\)"),
    ],
)
def test_what_a_mask_cannot_hold_is_refused(text: str, words: tuple[str, ...], message: str) -> None:
    encoding = Encoding(masked_tokenizer("bert"), 16, words, is_masked=True)
    with pytest.raises(UserError, match=message):
        prompts.prompt_examples([Document(text, "s", 0)], encoding)


def test_rows_with_and_without_candidates_do_not_mix() -> None:
    own, none = Document("a", "s", 0, candidates=(" x", " y")), Document("b", "s", 0)
    prompts.check_own([own], "dataset = 's'")
    prompts.check_none_own([none], "dataset = 's'")
    with pytest.raises(UserError, match="1 of 2 rows have no candidates of their own"):
        prompts.check_own([own, none], "dataset = 's'")
    with pytest.raises(UserError, match="has a single candidate"):
        prompts.check_own([Document("a", "s", 0, candidates=(" x",))], "dataset = 's'")
    with pytest.raises(UserError, match="1 of 2 rows have candidates of their own, and there are label-words"):
        prompts.check_none_own([own, none], "dataset = 's'")
