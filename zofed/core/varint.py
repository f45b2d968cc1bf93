"""Integers in as few bytes as they need: zigzag, then 7 bits a byte, lowest first, the high bit set but on the last.

-64 to 63 take one byte, -2^20 to 2^20 - 1 three. As in Protocol Buffers' sint64.
"""

from collections.abc import Iterable

BITS = 64
LONGEST = -(-BITS // 7)  # bytes of an integer


def packed(values: Iterable[int]) -> bytes:
    """The bytes of integers of up to 64 bits, one after the other."""
    found = bytearray()
    for value in values:
        rest = value << 1 if value >= 0 else ~(value << 1)
        while rest > 127:
            found.append(rest & 127 | 128)
            rest >>= 7
        found.append(rest)
    return bytes(found)


def unpacked(raw: bytes, at: int, count: int) -> tuple[tuple[int, ...], int]:
    """`count` integers from offset `at` on, and the offset behind them.

    Raises ValueError where the bytes end before them, or one has more than 64 bits or bytes than it needs.
    """
    if not 0 <= count <= len(raw) - at:
        raise ValueError(f"{count} integers where {len(raw) - at} bytes are left")
    values = []
    for _ in range(count):
        rest = shift = 0
        while True:
            if at >= len(raw) or shift >= BITS:
                raise ValueError("an integer is cut, or has more than 64 bits")
            byte = raw[at]
            rest |= (byte & 127) << shift
            at, shift = at + 1, shift + 7
            if byte < 128:
                break
        if rest >> BITS or (shift > 7 and not byte):
            raise ValueError("an integer has more than 64 bits, or more bytes than it needs")
        values.append(rest >> 1 if not rest & 1 else ~(rest >> 1))
    return tuple(values), at
