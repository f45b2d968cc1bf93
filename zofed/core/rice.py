"""Integers of like size in as few bits as their spread needs: Golomb-Rice codes.

An integer's zigzag is cut into its lowest k bits and the rest, which is small where k fits: the rest as so many zeros
and a one, those of all integers first, then all the lowest bits, highest first; zeros fill the last byte. k stands
before them and is the bit length of the zigzags' mean less one, so that integers have one way to be written. Slopes of
b bits, of which the largest is three times their root mean square, take b + 0.4 bits each from some hundred on, 0.1 to
0.4 above their entropy (benchmarks/RESULTS.md 36).

Golomb, "Run-length encodings", 1966; Rice & Plaunt, "Adaptive variable-length coding for efficient compression of
spacecraft television data", 1971.
"""

from collections.abc import Sequence

BITS = 64
LONGEST = 9  # bytes of an integer's code at most, as a mean, beside the byte of k


def packed(values: Sequence[int]) -> bytes:
    """k as a byte and the codes of the integers; nothing for none. Raises OverflowError for more than 64 bits."""
    if not values:
        return b""
    rests = [value << 1 if value >= 0 else ~(value << 1) for value in values]
    if max(rests) >> BITS:
        raise OverflowError(f"an integer of more than {BITS} bits")
    k = _k_of(rests)
    ones = "".join("0" * (rest >> k) + "1" for rest in rests)
    lowest = "".join(format(rest & (1 << k) - 1, f"0{k}b") for rest in rests) if k else ""
    bits = ones + lowest
    size = -(-len(bits) // 8)
    return bytes([k]) + (int(bits, 2) << 8 * size - len(bits)).to_bytes(size, "big")


def unpacked(raw: bytes, at: int, count: int) -> tuple[tuple[int, ...], int]:
    """`count` integers from offset `at` on, and the offset behind them.

    Raises ValueError where the bytes end before them, or are not as `packed` writes them.
    """
    if not count:
        return (), at
    left = len(raw) - at - 1
    if not 0 < count <= 8 * left:
        raise ValueError(f"{count} integers where {left + 1} bytes are left")
    k = raw[at]
    if k >= BITS:
        raise ValueError(f"integers of more than {BITS} bits")
    window = raw[at + 1 : at + 1 + -(-count * (k + 3) // 8)]  # no codes are longer, as k is of their mean
    bits = format(int.from_bytes(window, "big"), f"0{8 * len(window)}b")
    zeros = bits.split("1", count)
    start = sum(map(len, zeros[:count])) + count
    stop = start + count * k
    size = -(-stop // 8)
    if len(zeros) <= count or stop > len(bits):
        raise ValueError(f"the last of {count} integers is cut")
    rests = [len(run) << k for run in zeros[:count]]
    del zeros  # as large as what is found
    if k:
        rests = [
            rest | int(bits[place : place + k], 2) for rest, place in zip(rests, range(start, stop, k), strict=True)
        ]
    if max(rests) >> BITS:
        raise ValueError(f"an integer of more than {BITS} bits")
    if k != _k_of(rests) or "1" in bits[stop : 8 * size]:
        raise ValueError("integers in more bits than they need")
    return tuple(rest >> 1 if not rest & 1 else ~(rest >> 1) for rest in rests), at + 1 + size


def _k_of(rests: Sequence[int]) -> int:
    """The bit length of the mean less one: nearly the best, and codes take less than k + 3 bits each as a mean."""
    return max(0, (sum(rests) // len(rests)).bit_length() - 1)
