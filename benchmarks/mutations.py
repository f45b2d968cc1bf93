"""Bytes changed as disks, networks and people change them: edits that can be drawn, told, and made fewer.

An edit is a tuple of small integers, so that hypothesis can draw it and shrink it, and a loop can draw it from a seed.
"""

import random
from collections.abc import Callable, Sequence

Edit = tuple[int, int, int]  # what is done, where (taken modulo the length), and with what

MOST_EDITS = 6
LARGEST = 2**16  # of each number of an edit
LONGEST = 2**16  # bytes of what edits make
# What readers stumble on: ends of ranges of integers, separators, spellings of numbers that are none, odd characters.
WORDS: tuple[bytes, ...] = (
    *b"\" ' , : = { } [ ] {} [] [{}] {{ }} {% %} / .. ~ ~nobody/ %s None null true 1_0 0x10 \\ud800 \\u0000".split(),
    *b"0 1 2 -1 0.5 nan -nan NaN inf -inf Infinity 1e999 1e-320 9223372036854775808 18446744073709551616".split(),
    *(b"\0", b"\0" * 16, b"\xff", b"\xff" * 8, b"\x7f", b"\x80", b"\x80" * 9 + b"\x01", b"\xff" * 9 + b"\x01"),
    *(b"\x00\x00\x00\x80", b"\xff\xff\xff\x7f", b"\n", b"\r\n", b"\t", b" ", b'""', b"\x1b[2J"),
    *(b"9" * 5000, b"1" + b"0" * 400, b"[" * 2000, b'{"a":' * 2000, b"(" * 300),
    *(b"\xef\xbb\xbf", b"\xff\xfe", b"\xed\xa0\x80", *(odd.encode() for odd in "\u0663\xb2\xe9\u2028\u202e")),
)


def edited(raw: bytes, edits: Sequence[Edit], others: Sequence[bytes] = (), words: Sequence[bytes] = ()) -> bytes:
    """`raw` after some edits. others: of which a part may be put in; words: of the format, beside the usual ones."""
    for what, where, how in edits:
        at = where % (len(raw) + 1)
        raw = _KINDS[what % len(_KINDS)](raw, at, how, (others or (raw,)), (*words, *WORDS))[:LONGEST]
    return raw


def drawn(chance: random.Random) -> list[Edit]:
    """Some edits, mostly few."""
    count = min(MOST_EDITS, 1 + int(chance.expovariate(0.7)))
    return [(chance.randrange(LARGEST), chance.randrange(LARGEST), chance.randrange(LARGEST)) for _ in range(count)]


def smallest(raw: bytes, fails: Callable[[bytes], bool], tries: int = 2000) -> bytes:
    """A shorter input that still fails, by taking parts out, halves first."""
    size = max(1, len(raw) // 2)
    while size and tries > 0:
        at, is_shorter = 0, False
        while at < len(raw) and tries > 0:
            tries -= 1
            less = raw[:at] + raw[at + size :]
            if less != raw and fails(less):
                raw, is_shorter = less, True
            else:
                at += size
        size = size if is_shorter and size == 1 else size // 2
    return raw


def _flipped(raw: bytes, at: int, how: int, _others: Sequence[bytes], _words: Sequence[bytes]) -> bytes:
    if at == len(raw):
        return raw
    return raw[:at] + bytes([raw[at] ^ (1 << how % 8)]) + raw[at + 1 :]


def _set(raw: bytes, at: int, how: int, _others: Sequence[bytes], _words: Sequence[bytes]) -> bytes:
    return raw[:at] + bytes([how % 256]) + raw[at + 1 :]


def _cut(raw: bytes, at: int, how: int, _others: Sequence[bytes], _words: Sequence[bytes]) -> bytes:
    return raw[:at] + raw[at + 1 + how % 32 :]


def _ended(raw: bytes, at: int, _how: int, _others: Sequence[bytes], _words: Sequence[bytes]) -> bytes:
    return raw[:at]


def _doubled(raw: bytes, at: int, how: int, _others: Sequence[bytes], _words: Sequence[bytes]) -> bytes:
    return raw[: at + 1 + how % 64] + raw[at:]


def _zeroed(raw: bytes, at: int, how: int, _others: Sequence[bytes], _words: Sequence[bytes]) -> bytes:
    return raw[:at] + bytes(min(1 + how % 64, len(raw) - at)) + raw[at + 1 + how % 64 :]


def _with_word(raw: bytes, at: int, how: int, _others: Sequence[bytes], words: Sequence[bytes]) -> bytes:
    return raw[:at] + words[how % len(words)] + raw[at:]


def _replaced(raw: bytes, at: int, how: int, _others: Sequence[bytes], words: Sequence[bytes]) -> bytes:
    """A word in the place of what stands between two marks: one value of a text for another."""
    marks = b' ,=:"[]{}\n\t'
    start, stop = at, at
    while start and raw[start - 1] not in marks:
        start -= 1
    while stop < len(raw) and raw[stop] not in marks:
        stop += 1
    return raw[:start] + words[how % len(words)] + raw[stop:]


def _spliced(raw: bytes, at: int, how: int, others: Sequence[bytes], _words: Sequence[bytes]) -> bytes:
    other = others[how % len(others)]
    begin = how * 7919 % (len(other) + 1)
    return raw[:at] + other[begin : begin + 1 + how % 200] + raw[at + how // 7 % 64 :]


_KINDS = (_flipped, _set, _cut, _ended, _doubled, _zeroed, _with_word, _replaced, _replaced, _with_word, _spliced)
