"""Conversations as text and tokens by a chat template, equally for training and for use."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from zofed.base.errors import UserError
from zofed.base.texts import said_by
from zofed.data.conversations import Turn
from zofed.data.documents import Document

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NONE = "none"  # of the setting chat-template: the turns as they are, the stop token after each of the assistant's
PLAIN = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}"
    "{% elif message['role'] == 'system' %}{{ '\\n\\n' }}{% endif %}{% endfor %}"
)
_BEGUN = "{{ bos_token }}"
# Templates that write today's date would make other tokens tomorrow.
_ONE_DAY = "{%- macro strftime_now(format) -%}26 Jul 2024{%- endmacro -%}"
_PROBE = "Qxzv"


def is_text(setting: str) -> bool:
    """Whether a setting is a template itself, not the name of a file."""
    return "{{" in setting or "{%" in setting


def template_text(setting: str) -> str:
    """What the setting chat-template says: '', 'none', a template's text, or the text of the file that it names.

    Raises UserError for a file that cannot be read.
    """
    if setting in ("", NONE) or is_text(setting):
        return setting
    try:
        text = Path(setting).expanduser().read_text(encoding="utf-8").replace("\r\n", "\n")
    except (OSError, ValueError) as error:
        raise UserError(
            f"chat-template = {setting!r} is no file that can be read ({said_by(error)}): give its path"
        ) from error
    if not is_text(text):
        raise UserError(f"chat-template = {setting!r} holds no Jinja template: write {{{{ ... }}}} for what changes")
    if "\t" in text:
        raise UserError(f"chat-template = {setting!r} holds a tab: write {{{{ '\\t' }}}} or spaces")
    return text


def with_template(tokenizer: "PreTrainedTokenizerBase", setting: str) -> "PreTrainedTokenizerBase":
    """The tokenizer with the chat template that a run writes conversations by, which is saved with its model.

    setting: as `template_text`; '' leaves a tokenizer its own, and is plain where it has none. A template that is not
    the tokenizer's own begins with the token that the tokenizer begins its texts with, once. Raises UserError for a
    template that cannot be used, and where nothing would end a response.
    """
    setting = template_text(setting)
    made = copy.copy(tokenizer)
    if setting or not tokenizer.chat_template:
        text = PLAIN if setting in ("", NONE) else setting
        made.chat_template = text
        begin = tokenizer.bos_token
        if (
            isinstance(begin, str)
            and _writes_beginning(tokenizer)
            and not _render(made, [Turn("user", _PROBE)]).startswith(begin)
        ):
            made.chat_template = _BEGUN + text
    Writer(made)
    return made


def is_plain(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether turns are written as they are."""
    return tokenizer.chat_template in (PLAIN, _BEGUN + PLAIN)


def _writes_beginning(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether the tokenizer puts its beginning of sequence before a text."""
    begin = [tokenizer.bos_token_id]
    return (
        tokenizer("a")["input_ids"][:1] == begin and tokenizer("a", add_special_tokens=False)["input_ids"][:1] != begin
    )


@dataclass(frozen=True, slots=True)
class Written:
    """A conversation's tokens; spans: from where to where each response goes, with the token that ends it.

    is_rewritten: the template writes earlier turns otherwise once others follow, so that only the last response counts.
    """

    ids: list[int]
    spans: list[tuple[int, int]]
    is_rewritten: bool = False


class _Rewritten(Exception):  # noqa: N818
    """A longer conversation does not begin as the shorter one."""


class Writer:
    """Writes conversations by the tokenizer's chat template, equally for training and for use.

    A response's tokens are those that the conversation with it has more than the prompt without it, so that what a
    model is asked to continue is what it was trained to continue. Raises UserError for a template that cannot be used.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._tokenizer = tokenizer
        question, answer = Turn("user", _PROBE), Turn("assistant", _PROBE)
        whole, prompt = _render(tokenizer, [question, answer]), _render(tokenizer, [question])
        before, found, self._tail = whole.rpartition(_PROBE)
        if not found or before.count(_PROBE) == 0:
            raise UserError(f"{_shown(tokenizer)} leaves turns out: give another chat-template, or none")
        # A template that knows no prompt for the answer: what stands before each answer is the prompt's.
        asked, is_deaf = _render(tokenizer, [question], ask=True), False
        if asked == prompt and before.startswith(prompt):
            is_deaf = bool(before[len(prompt) :].strip())
        self._header = before[len(prompt) :] if is_deaf else ""
        self._stop = self._find_stop()
        self.merges_system = not self._takes_system()

    def _find_stop(self) -> int:
        """The token that ends a response, and cuts what the template writes behind it off the tail."""
        special = set(self._tokenizer.all_special_ids)
        for token in self._ids(self._tail):
            text = self._tokenizer.convert_ids_to_tokens(token)
            if token in special and isinstance(text, str) and (at := self._tail.find(text)) >= 0:
                self._behind = self._tail[at + len(text) :]
                self._adds_stop = False
                return token
        end = self._tokenizer.eos_token_id
        if not isinstance(end, int):
            raise UserError(
                f"{_shown(self._tokenizer)} ends no response by a special token, and the tokenizer has no "
                "end-of-sequence token: add one to its config"
            )
        self._behind, self._adds_stop = self._tail, True
        return end

    def _takes_system(self) -> bool:
        turns = [Turn("system", f"{_PROBE}s"), Turn("user", _PROBE), Turn("assistant", _PROBE)]
        try:
            return f"{_PROBE}s" in _render(self._tokenizer, turns)
        except UserError:
            return False

    @property
    def stops(self) -> tuple[int, ...]:
        """Ids at which an answer ends: what ends a response in training, and the end of sequence."""
        end = self._tokenizer.eos_token_id
        return tuple(dict.fromkeys([self._stop, *([end] if isinstance(end, int) else [])]))

    def prompt(self, turns: Sequence[Turn]) -> list[int]:
        """The tokens that a model continues with its answer to the last turn, which is the user's."""
        turns = self._turns(turns)
        try:
            return self._written(turns, ask=True).ids
        except _Rewritten:
            return self._ids(self._asked(turns))

    def conversation(self, turns: Sequence[Turn]) -> Written:
        """The tokens of turns that end with the assistant's. Raises UserError where the template cannot write them."""
        turns = self._turns(turns)
        try:
            return self._written(turns)
        except _Rewritten:
            return self._last(turns)

    def _written(self, turns: Sequence[Turn], *, ask: bool = False) -> Written:
        text, ids, spans = "", [], []
        for number, turn in enumerate(turns):
            if turn.role == "assistant":
                text, ids = self._longer(text, ids, self._asked(turns[:number]))
                start = len(ids)
                text, ids = self._longer(text, ids, self._answered(turns[: number + 1]))
                ids = [*ids, self._stop] if self._adds_stop else ids
                spans.append((start, len(ids)))
        return Written(self._longer(text, ids, self._asked(turns))[1] if ask else ids, spans)

    def _last(self, turns: Sequence[Turn]) -> Written:
        """The last response alone, behind all that stands before it."""
        prompt = self._asked(turns[:-1])
        try:
            ids = self._longer(prompt, self._ids(prompt), self._answered(turns))[1]
        except _Rewritten:
            raise UserError(
                f"{_shown(self._tokenizer)} begins the assistant's turn otherwise when asking for it than when it is "
                "there, so that no prompt is found: give another chat-template, or none"
            ) from None
        ids = [*ids, self._stop] if self._adds_stop else ids
        return Written(ids, [(len(self._ids(prompt)), len(ids))], is_rewritten=len(turns) > 2)

    def _longer(self, text: str, ids: list[int], longer: str) -> tuple[str, list[int]]:
        """The tokens of a text that continues one with these tokens, which it keeps."""
        if not longer.startswith(text):
            raise _Rewritten
        whole = self._ids(longer)
        # Where a token would reach over the border (or a stop token was added) the rest is read for itself.
        return longer, whole if whole[: len(ids)] == ids else [*ids, *self._ids(longer[len(text) :])]

    def _asked(self, turns: Sequence[Turn]) -> str:
        if not turns:  # the assistant begins
            return _render(self._tokenizer, [Turn("assistant", _PROBE)]).rpartition(_PROBE)[0]
        return _render(self._tokenizer, turns, ask=True) + self._header

    def _answered(self, turns: Sequence[Turn]) -> str:
        """Up to the end of the last response, with the token that the template ends it by."""
        whole = _render(self._tokenizer, turns)
        if not whole.endswith(self._tail):
            raise _Rewritten
        return whole[: len(whole) - len(self._behind)]

    def _turns(self, turns: Sequence[Turn]) -> Sequence[Turn]:
        """A system turn goes before the user's text where the template has no place for it."""
        if not self.merges_system or not turns or turns[0].role != "system":
            return turns
        if len(turns) > 1 and turns[1].role == "user":
            return [Turn("user", f"{turns[0].text}\n\n{turns[1].text}"), *turns[2:]]
        return [Turn("user", turns[0].text), *turns[1:]]

    def _ids(self, text: str) -> list[int]:
        """The template writes special tokens itself: the tokenizer must not add them again."""
        return self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] if text else []


def prompt_tokens(
    conversation: Document | Sequence[Turn], tokenizer: "PreTrainedTokenizerBase", limit: int = 0
) -> list[int]:
    """The tokens of a conversation up to its last response, which they ask for: as in training.

    limit: tokens at most, of which the beginning of sequence and the last stay; 0: all.
    """
    turns = list(conversation.turns if isinstance(conversation, Document) else conversation)
    ids = Writer(tokenizer).prompt(turns[:-1] if turns and turns[-1].role == "assistant" else turns)
    return cut_left(ids, limit, beginning_of(ids, tokenizer)) if limit else ids


def stop_tokens(tokenizer: "PreTrainedTokenizerBase") -> tuple[int, ...]:
    """Ids at which an answer ends."""
    return Writer(tokenizer).stops


def cut_left(ids: list[int], limit: int, begin: int) -> list[int]:
    """The last tokens, and of the first `begin`: `limit` at most."""
    return ids if len(ids) <= limit else [*ids[:begin], *ids[len(ids) - limit + begin :]]


def beginning_of(ids: Sequence[int], tokenizer: "PreTrainedTokenizerBase") -> int:
    """How many tokens at the start are the beginning of sequence: one or none."""
    return int(len(ids) > 1 and ids[0] == tokenizer.bos_token_id)


def _render(tokenizer: "PreTrainedTokenizerBase", turns: Sequence[Turn], *, ask: bool = False) -> str:
    """The text of a conversation by the tokenizer's template. Raises UserError where the template fails."""
    try:
        template = tokenizer.get_chat_template()
        text = tokenizer.apply_chat_template(
            [{"role": turn.role, "content": turn.text} for turn in turns],
            chat_template=f"{_ONE_DAY}{template}" if "strftime_now" in template else template,
            tokenize=False,
            add_generation_prompt=ask,
        )
    except Exception as error:  # whatever a template raises by itself, and Jinja by what it cannot read
        raise UserError(f"{_shown(tokenizer)} fails ({said_by(error)}): give another chat-template, or none") from error
    assert isinstance(text, str)
    return text


def _shown(tokenizer: "PreTrainedTokenizerBase") -> str:
    text = tokenizer.chat_template
    return f"the chat template {text[:40] if isinstance(text, str) else 'of the tokenizer'!r}..."
