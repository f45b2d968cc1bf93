"""Conversations as examples: what trains, what is cut and counted, how they are packed; bugs that others had.

The bugs are numbered as people report them of other tools: 1 a response's marker that tokenises otherwise in context,
2 no stop token or a masked one, 3 two beginnings, 4 packing that leaks, 5 no generation prompt, 6 an empty mask, 7 cut
responses, 8 turns' ends that never train, 9 the last turn alone, 10 another template in use, 11 a masked first token.
"""

import os
import warnings
from typing import Any

import pytest
import torch
from test_chat_templates import CHAT, KINDS, tokenizer_of, trained

from zofed.base.errors import UserError
from zofed.core import packed
from zofed.data.chat_templates import Writer, prompt_tokens, with_template
from zofed.data.conversations import Turn
from zofed.data.documents import Document
from zofed.data.encoding import load_tokenizer
from zofed.data.instructions import instruction_examples

PAIR = (Turn("user", "What is it, and why?"), Turn("assistant", "It is red because it is."))


def documents(*turns: tuple[Turn, ...]) -> list[Document]:
    return [Document("", "chats", turns=one) for one in turns]


def prepared(kind: str = "SmolLM2", setting: str = "") -> Any:
    return with_template(tokenizer_of(kind), setting)


def test_examples_are_padded_on_the_right_and_only_their_own_tokens_are_read() -> None:
    tokenizer = prepared()
    found = instruction_examples(documents(PAIR, CHAT), tokenizer, 160)
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in found.items()} == dict.fromkeys(
        ("input_ids", "attention_mask", "labels"), ((2, 160), torch.int64)
    )
    for turns, ids, mask, labels in zip((PAIR, CHAT), *found.values(), strict=True):
        length = len(Writer(tokenizer).conversation(turns).ids)
        assert mask.tolist() == [1] * length + [0] * (160 - length)
        assert (labels[length:] == -100).all() and (ids[length:] == tokenizer.pad_token_id).all()


def test_the_stop_token_trains_though_it_also_pads() -> None:
    """Bug 2."""
    for kind, setting in (("SmolLM2", ""), ("bare", ""), ("SmolLM2", "none"), ("Llama 3", "none")):
        tokenizer = prepared(kind, setting)
        tokenizer.pad_token = tokenizer.eos_token
        found = instruction_examples(documents(PAIR), tokenizer, 160)
        labels = found["labels"][0]
        assert labels[labels != -100][-1] == tokenizer.eos_token_id
        assert int((labels == tokenizer.eos_token_id).sum()) == 1


def test_all_tokens_train_where_that_is_asked_for() -> None:
    found = instruction_examples(documents(PAIR), prepared(), 160, "all")
    there = found["attention_mask"].bool()
    assert torch.equal(found["labels"][there], found["input_ids"][there]) and (found["labels"][~there] == -100).all()


@pytest.mark.parametrize("kind", ["Llama 3", "Mistral", "Gemma", "bare"])
def test_a_long_prompt_loses_its_beginning_and_the_response_stays_whole(kind: str) -> None:
    """Bug 7."""
    tokenizer = prepared(kind)
    long = (Turn("user", " ".join(["word"] * 80) + " end"), PAIR[1])
    whole = Writer(tokenizer).conversation(long)
    with pytest.warns(UserWarning, match=rf"1 of 2 conversations are longer than .* 60 .*{len(whole.ids)}"):
        found = instruction_examples(documents(long, PAIR), tokenizer, 60)
    ids, labels = found["input_ids"][0].tolist(), found["labels"][0].tolist()
    start, end = whole.spans[0]
    assert [label for label in labels if label != -100] == whole.ids[start:end]
    begin = int(KINDS[kind][2])
    assert ids == [*whole.ids[:begin], *whole.ids[len(whole.ids) - 60 + begin :]]


def test_a_response_that_does_not_fit_loses_its_end_and_that_is_told() -> None:
    tokenizer = prepared("Llama 3")
    long = (PAIR[0], Turn("assistant", " ".join(["word"] * 80)))
    whole = Writer(tokenizer).conversation(long)
    with pytest.warns(UserWarning, match="1 of 1 conversations have a last response longer than block-size = 20"):
        found = instruction_examples(documents(long), tokenizer, 20)
    start, _ = whole.spans[0]
    assert found["input_ids"][0].tolist() == [whole.ids[0], *whole.ids[start - 1 : start + 18]]
    assert found["labels"][0].tolist() == [-100, -100, *whole.ids[start : start + 18]]


def test_an_earlier_response_without_its_beginning_does_not_train() -> None:
    tokenizer = prepared("Llama 3")
    whole = Writer(tokenizer).conversation(CHAT)
    size = len(whole.ids) - whole.spans[0][0]  # the cut goes through the first response
    with pytest.warns(UserWarning, match="lost their beginnings"):
        found = instruction_examples(documents(CHAT), tokenizer, size)
    start, end = whole.spans[1]
    labels = found["labels"][0]
    assert labels[labels != -100].tolist() == whole.ids[start:end]


def test_conversations_without_a_token_that_trains_are_counted_and_none_left_is_refused() -> None:
    """Bugs 6 and 7: an empty mask is never silent."""
    tokenizer, nothing = prepared("SmolLM2", "none"), (Turn("assistant", ""),)  # a stop token that nothing precedes
    with pytest.warns(UserWarning, match="1 of 2 conversations have no token that trains and are left out"):
        assert len(instruction_examples(documents(PAIR, nothing), tokenizer, 60)["labels"]) == 1
    with pytest.raises(UserError, match="none of 1 conversations has a token that trains"):
        instruction_examples(documents(nothing), tokenizer, 60)


def test_what_holds_the_text_of_a_special_token_or_runs_on_is_told() -> None:
    told = documents((Turn("user", "What is <|im_end|>?"), Turn("assistant", "An end.")))
    with pytest.warns(UserWarning, match="1 of 1 conversations hold the text of a special token"):
        instruction_examples(told, prepared(), 160)
    runs_on = documents((Turn("user", "Say a word"), Turn("assistant", "Word")))
    with pytest.warns(UserWarning, match="1 of 1 conversations have a prompt that runs into its response"):
        instruction_examples(runs_on, prepared("bare", "none"), 160)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        instruction_examples(
            documents((Turn("user", "Say:\n"), Turn("assistant", "Word"))), prepared("bare", "none"), 160
        )
        instruction_examples(runs_on, prepared(), 160)


def test_prompts_that_are_all_the_same_are_told() -> None:
    """As where the template names a column that is empty in every row."""
    rows = [(Turn("user", "### Instruction:\n\n"), Turn("assistant", f"Answer {number}.")) for number in range(20)]
    with pytest.warns(UserWarning, match="20 of 20 conversations have one and the same prompt"):
        instruction_examples(documents(*rows), prepared(), 160)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        instruction_examples(documents(*rows[:19]), prepared(), 160)
        instruction_examples(documents(*rows, PAIR), prepared(), 160)


def test_bad_input_is_refused_in_a_line() -> None:
    tokenizer = prepared()
    for bad, size, told in (
        ([], 60, "0 documents"),
        (documents(PAIR), 1, "block-size = 1"),
        ([Document("text", "a")], 60, "is text, no conversation"),
    ):
        with pytest.raises(UserError, match=told):
            instruction_examples(bad, tokenizer, size)


def test_packed_examples_are_those_of_before_one_behind_the_other() -> None:
    """Bug 4, of the data; what a model makes of it, tests/core/test_packed.py holds."""
    tokenizer = prepared("Llama 3")
    many = documents(
        *[(Turn("user", "a " * number), Turn("assistant", "b " * (20 - number))) for number in range(1, 20)]
    )
    plain = instruction_examples(many, tokenizer, 120)
    tight = instruction_examples(many, tokenizer, 120, packing=True)
    assert len(tight["labels"]) < len(plain["labels"]) and set(tight) == {"input_ids", packed.KEY, "labels"}
    found = []
    for ids, segments, labels in zip(*tight.values(), strict=True):
        assert (labels[segments == 0] == -100).all()
        for segment in range(1, int(segments.max()) + 1):
            place = (segments == segment).nonzero().flatten()
            assert torch.equal(place, torch.arange(int(place[0]), int(place[-1]) + 1))
            assert labels[place[0]] == -100
            found.append((ids[place].tolist(), labels[place].tolist()))
    wanted = [
        (ids[mask.bool()].tolist(), labels[mask.bool()].tolist())
        for ids, mask, labels in zip(*plain.values(), strict=True)
    ]
    assert sorted(found) == sorted(wanted)


def test_a_conversation_that_the_assistant_begins_has_the_prompt_of_any_other() -> None:
    greeting = (Turn("assistant", "Hello."), *CHAT)
    assert trained(prepared("ChatML"), greeting)[0] == "Hello.<|im_end|>"
    with pytest.raises(UserError, match="roles must alternate"):
        trained(prepared("Mistral"), greeting)


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_and_every_token_of_each_response_trains(kind: str) -> None:
    """Bugs 1, 5, 8, 9 and 11: of every turn all, from the first token to the one that ends it; never a header."""
    for text in ("Yes", "\nYes", "yes", "### Response: yes", "1"):
        chat = (Turn("user", "### Response:"), Turn("assistant", text), Turn("user", "And?"), Turn("assistant", text))
        runs = trained(prepared(kind), chat)
        assert len(runs) == 2
        for run in runs:
            assert run.removesuffix(KINDS[kind][3]).strip() == text.strip() and run.endswith(KINDS[kind][3])


@pytest.mark.parametrize(
    "setting", ["", "none", "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_with_the_model_writes_what_was_trained(kind: str, setting: str, tmp_path: Any) -> None:
    """Bug 10."""
    tokenizer = prepared(kind, setting)
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(str(tmp_path))
    assert again.chat_template == tokenizer.chat_template
    assert prompt_tokens(CHAT, again) == prompt_tokens(CHAT, tokenizer)


@pytest.mark.slow
@pytest.mark.skipif("ZOFED_REAL_MODELS" not in os.environ, reason="needs ZOFED_REAL_MODELS, a folder with smollm2")
def test_a_real_tokenizer_with_its_own_template() -> None:
    tokenizer = with_template(load_tokenizer(os.path.join(os.environ["ZOFED_REAL_MODELS"], "smollm2")), "")
    assert trained(tokenizer, CHAT) == ["It is red.<|im_end|>", "That is blue, I say.<|im_end|>"]
    assert tokenizer.decode(prompt_tokens(CHAT, tokenizer)).endswith("And that?<|im_end|>\n<|im_start|>assistant\n")
