"""Which tokens of a conversation train under the chat templates people have: the assistant's and its stop tokens."""

from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing

from zofed.base.errors import UserError
from zofed.data import chat_templates
from zofed.data.chat_templates import Writer, prompt_tokens, stop_tokens, with_template
from zofed.data.conversations import Turn
from zofed.data.documents import Document
from zofed.data.encoding import load_tokenizer
from zofed.data.instructions import instruction_examples

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
QWEN25 = (
    "{%- if messages[0]['role'] == 'system' %}\n"
    "    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}\n"
    "{%- else %}\n"
    "    {{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud.<|im_end|>\\n' }}\n"
    "{%- endif %}\n{%- for message in messages %}\n"
    "    {%- if (message.role == 'user') or (message.role == 'system' and not loop.first) "
    "or (message.role == 'assistant' and not message.tool_calls) %}\n"
    "        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}\n    {%- endif %}\n"
    "{%- endfor %}\n{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n{%- endif %}\n"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}{% if (message['role'] == 'assistant') %}"
    "{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
# Neither marks of what is generated, nor a prompt for it, nor a system role.
BARE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ 'Question: ' + message['content'] + '\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'Answer: ' + message['content'] + '\n' }}{% endif %}{% endfor %}"
)
QWEN3 = (
    "{%- set ns = namespace(last=0) %}{%- for message in messages %}{%- if message.role == 'user' %}"
    "{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}{%- for message in messages %}"
    "{%- if message.role == 'assistant' %}{{- '<|im_start|>assistant\n' }}{%- if loop.index0 > ns.last %}"
    "{{- '<think>\n\n</think>\n\n' }}{%- endif %}{{- message.content + '<|im_end|>\n' }}{%- else %}"
    "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
PHI3 = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
R1 = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ '<|User|>' + message['content'] }}{% else %}"
    "{{ '<|Assistant|>' + message['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"
)
KINDS: dict[str, tuple[str, dict[str, Any], bool, str]] = {
    # template, special tokens, whether the tokenizer begins every text with bos, what ends a response
    "SmolLM2": (SMOLLM2, {"bos": "<|im_start|>", "eos": "<|im_end|>", "pad": "<|im_end|>"}, False, "<|im_end|>"),
    "Llama 3": (
        LLAMA3,
        {"bos": "<|begin_of_text|>", "eos": "<|eot_id|>", "more": ["<|start_header_id|>", "<|end_header_id|>"]},
        True,
        "<|eot_id|>",
    ),
    "Qwen 2.5": (QWEN25, {"eos": "<|im_end|>", "pad": "<|endoftext|>", "more": ["<|im_start|>"]}, False, "<|im_end|>"),
    "Mistral": (MISTRAL, {"bos": "<s>", "eos": "</s>"}, True, "</s>"),
    "Gemma": (
        GEMMA,
        {"bos": "<bos>", "eos": "<eos>", "pad": "<pad>", "more": ["<start_of_turn>", "<end_of_turn>"]},
        True,
        "<end_of_turn>",
    ),
    "bare": (BARE, {"eos": "<|endoftext|>"}, False, "<|endoftext|>"),
    "Phi 3": (PHI3, {"eos": "<|endoftext|>", "more": ["<|user|>", "<|assistant|>", "<|end|>"]}, False, "<|end|>"),
    "ChatML": (CHATML, {"eos": "<|endoftext|>", "more": ["<|im_start|>", "<|im_end|>"]}, False, "<|im_end|>"),
}
CHAT = (
    Turn("user", "What is it?"),
    Turn("assistant", "It is red."),
    Turn("user", "And that?"),
    Turn("assistant", "That is blue, I say."),
)


def tokenizer_of(kind: str, template: str = "") -> Any:
    """A small tokenizer with the special tokens and template of a model."""
    own, special, begins, _ = KINDS[kind]
    made = load_tokenizer("shipped")
    names = {f"{name}_token": special.get(name, special["eos"]) for name in ("bos", "eos", "pad")}
    made.add_special_tokens(names)
    made.add_special_tokens({"additional_special_tokens": special.get("more", [])})
    if begins:
        begin = special["bos"]
        made.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{begin} $A", special_tokens=[(begin, made.convert_tokens_to_ids(begin))]
        )
        assert made("a")["input_ids"][0] == made.bos_token_id
    made.chat_template = template or own
    return made


def trained(tokenizer: Any, turns: tuple[Turn, ...], **how: Any) -> list[str]:
    """The texts of the runs of tokens that train."""
    found = instruction_examples([Document("", "chats", turns=turns)], tokenizer, 200, **how)
    runs: list[list[int]] = []
    before = False
    for token, label in zip(found["input_ids"][0].tolist(), found["labels"][0].tolist(), strict=True):
        assert label in (-100, token)
        if label != -100:
            runs[-1:] = [[*runs[-1], token]] if before else [*runs[-1:], [token]]
        before = label != -100
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize("kind", KINDS)
def test_exactly_the_assistants_tokens_and_stop_tokens_train(kind: str) -> None:
    tokenizer, stop = with_template(tokenizer_of(kind), ""), KINDS[kind][3]
    begin = " " if kind == "Mistral" else ""
    wanted = [f"{begin}{turn.text}{stop}" for turn in CHAT if turn.role == "assistant"]
    assert trained(tokenizer, CHAT) == wanted
    assert stop_tokens(tokenizer)[0] == tokenizer.convert_tokens_to_ids(stop)
    assert tokenizer.eos_token_id in stop_tokens(tokenizer)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_asked_for_in_use_is_what_training_continued(kind: str) -> None:
    tokenizer = with_template(tokenizer_of(kind), "")
    written = Writer(tokenizer).conversation(CHAT)
    assert len(written.spans) == 2 and not written.is_rewritten
    for number, (start, _) in zip((1, 3), written.spans, strict=True):
        assert prompt_tokens(CHAT[:number], tokenizer) == written.ids[:start]
    assert prompt_tokens(Document("", "chats", turns=CHAT), tokenizer) == written.ids[: written.spans[1][0]]


@pytest.mark.parametrize("kind", ["SmolLM2", "Llama 3", "Qwen 2.5", "Mistral", "Gemma"])
def test_the_tokens_are_those_of_the_library(kind: str) -> None:
    tokenizer = with_template(tokenizer_of(kind), "")
    turns = [{"role": turn.role, "content": turn.text} for turn in CHAT]
    whole = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)
    ids = Writer(tokenizer).conversation(CHAT).ids
    assert ids == whole[: len(ids)]
    assert not tokenizer.decode(whole[len(ids) :]).strip()
    asked = tokenizer.apply_chat_template(turns[:3], tokenize=True, add_generation_prompt=True, return_dict=False)
    assert prompt_tokens(CHAT[:3], tokenizer) == asked


@pytest.mark.parametrize("kind", ["Llama 3", "Mistral", "Gemma"])
@pytest.mark.parametrize("setting", ["", "none", CHATML])
def test_there_is_one_beginning_of_sequence(kind: str, setting: str) -> None:
    tokenizer = with_template(tokenizer_of(kind), setting)
    ids = Writer(tokenizer).conversation(CHAT).ids
    assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_plain_is_prompt_and_response_and_the_end_of_sequence(kind: str) -> None:
    tokenizer = with_template(tokenizer_of(kind), "none")
    pair = (Turn("system", "Be brief."), Turn("user", "The sky is"), Turn("assistant", " blue"))
    ids = Writer(tokenizer).conversation(pair).ids
    begin = tokenizer.bos_token if KINDS[kind][2] else ""
    assert tokenizer.decode(ids) == f"{begin}Be brief.\n\nThe sky is blue{tokenizer.eos_token}"
    assert trained(tokenizer, pair) == [f" blue{tokenizer.eos_token}"]
    # What is saved with the model writes the same.
    turns = [{"role": turn.role, "content": turn.text} for turn in pair]
    assert tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False) == ids


def test_a_template_without_a_system_role_has_it_before_the_users_text() -> None:
    for kind in ("Gemma", "Mistral", "bare"):
        tokenizer = with_template(tokenizer_of(kind), "")
        with pytest.warns(UserWarning, match="1 of 1 conversations have a system turn, which goes before the user's"):
            found = instruction_examples(
                [Document("", "chats", turns=(Turn("system", "Be brief."), *CHAT))], tokenizer, 200
            )
        assert "Be brief.\n\nWhat is it?" in tokenizer.decode(found["input_ids"][0])
    assert not Writer(tokenizer_of("Qwen 2.5")).merges_system


def test_a_template_that_rewrites_earlier_turns_trains_the_last_alone_and_that_is_told() -> None:
    tokenizer = with_template(tokenizer_of("ChatML", QWEN3), "")
    with pytest.warns(UserWarning, match="1 of 1 conversations train on their last response alone"):
        assert trained(tokenizer, CHAT) == ["<think>\n\n</think>\n\nThat is blue, I say.<|im_end|>"]
    written = Writer(tokenizer).conversation(CHAT)
    assert prompt_tokens(CHAT[:3], tokenizer) == written.ids[: written.spans[-1][0]]
    assert trained(tokenizer, CHAT[:2]) == ["<think>\n\n</think>\n\nIt is red.<|im_end|>"]


def test_a_template_that_asks_otherwise_than_it_answers_is_refused_with_a_remedy() -> None:
    tokenizer = tokenizer_of("ChatML", R1)
    with pytest.raises(UserError, match=r"conversation 1 of 1 \('What is it\?'\): .*asking for it.*or none"):
        trained(tokenizer, CHAT[:2])


def test_a_response_that_melts_into_the_prompt_is_read_from_the_prompt_on() -> None:
    """The tokens of a prompt never hang on what answers it: here the border lies within a word."""
    tokenizer = with_template(load_tokenizer("gpt2"), "none")
    border = (Turn("user", "It is un"), Turn("assistant", "likely"))
    whole = tokenizer("It is unlikely")["input_ids"]
    written = Writer(tokenizer).conversation(border)
    asked = prompt_tokens(border[:1], tokenizer)
    assert whole[: len(asked)] != asked  # or the example is none
    assert written.ids[: written.spans[0][0]] == asked
    assert tokenizer.decode(written.ids[written.spans[0][0] :]) == "likely<|endoftext|>"


def test_today_is_the_same_day_in_every_run(monkeypatch: pytest.MonkeyPatch) -> None:
    template = "{%- set date = strftime_now('%d %b %Y') -%}{{ date }}\n" + CHATML
    ids = Writer(tokenizer_of("ChatML", template)).prompt(CHAT[:1])
    assert tokenizer_of("ChatML").decode(ids).startswith("26 Jul 2024")


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{{ messages[0]['content'] }", "fails"),
        ("{{ messages[0]['content'] }}", "leaves turns out"),
        ("{{ raise_exception('no') }}", "fails"),
        ("{% for message in messages %}{{ message.content.x }}{% endfor %}", "leaves turns out"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused_in_a_line(template: str, told: str) -> None:
    with pytest.raises(UserError) as raised:
        with_template(tokenizer_of("ChatML"), template)
    assert told in str(raised.value) and "\n" not in str(raised.value) and "chat-template" in str(raised.value)


def test_a_tokenizer_without_an_end_and_a_template_without_one_are_refused() -> None:
    tokenizer = tokenizer_of("bare")
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no end-of-sequence token"):
        with_template(tokenizer, "")


def test_a_file_is_read_and_what_is_none_is_refused(tmp_path: Any) -> None:
    path = tmp_path / "chat.jinja"
    path.write_bytes(CHATML.replace("\n", "\r\n").encode())
    assert chat_templates.template_text(str(path)) == CHATML
    assert with_template(tokenizer_of("ChatML", BARE), str(path)).chat_template == CHATML
    path.write_text("no template")
    for name, told in ((path, "no Jinja template"), (tmp_path / "away.jinja", "no file that can be read")):
        with pytest.raises(UserError, match=told):
            chat_templates.template_text(str(name))
