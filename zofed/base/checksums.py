"""CRC-32 of many parts of one byte string, from those of its beginnings: in linear time however the parts overlap."""

import zlib
from functools import cache

import numpy as np
from numpy.typing import NDArray

_POLYNOMIAL = 0xEDB88320  # CRC-32's, lowest power in the highest bit
_X8 = 1 << 23  # x^8 in that order: what a byte behind multiplies by

Words = NDArray[np.uint32]


def crc32_of_parts(raw: bytes, starts: NDArray[np.int64], stops: NDArray[np.int64], before: Words) -> Words:
    """CRC-32 of each part raw[start:stop], continued from `before`, as zlib.crc32(raw[start:stop], before) gives it.

    The CRC of a whole is that of its beginning, multiplied by x to the bits that follow, plus that of the rest. So each
    part takes a number of steps that grows with the logarithm of its length, not with the length.
    """
    places = np.sort(np.concatenate([starts, stops]))
    sums, crc, at = np.empty(len(places), np.uint32), 0, 0
    view = memoryview(raw)
    for index, place in enumerate(places.tolist()):
        sums[index] = crc = zlib.crc32(view[at:place], crc)
        at = place
    upto_start, upto_stop = (sums[np.searchsorted(places, some)] for some in (starts, stops))
    return upto_stop ^ _followed_by(upto_start ^ before, stops - starts)


def _followed_by(crcs: Words, lengths: NDArray[np.int64]) -> Words:
    """The CRCs times x^(8 length)."""
    found = crcs
    for bit in range(int(lengths.max(initial=0)).bit_length()):
        low, second, third, high = _times_power(bit)
        times = low[found & 255] ^ second[found >> 8 & 255] ^ third[found >> 16 & 255] ^ high[found >> 24]
        found = np.where(lengths >> bit & 1 == 1, times, found)
    return found


@cache
def _power(bit: int) -> int:
    """x^(8 * 2^bit)."""
    return int(_times(np.array([_power(bit - 1)], np.uint32), _power(bit - 1))[0]) if bit else _X8


@cache
def _times_power(bit: int) -> tuple[Words, ...]:
    """The product of each byte, in each of the four places of a CRC, with x^(8 * 2^bit): it is linear in the bytes."""
    return tuple(_times(np.arange(256, dtype=np.uint32) << np.uint32(shift), _power(bit)) for shift in (0, 8, 16, 24))


def _times(some: Words, factor: int) -> Words:
    """Products of polynomials over GF(2), modulo CRC-32's."""
    product = np.zeros_like(some)
    for bit in range(31, -1, -1):
        if factor >> bit & 1:
            product ^= some
        some = (some >> np.uint32(1)) ^ ((some & np.uint32(1)) * np.uint32(_POLYNOMIAL))
    return product
