"""Random numbers for stochastic rounding, from a counter.

The number an element gets depends on its index in the tensor and on a key, and on nothing else:
no generator state, no order of execution. The caller derives the key from (seed, step, tensor), so
a resumed run draws what the uninterrupted one drew, and a Triton kernel draws what torch draws.

Each 32-bit mix is "lowbias32" (C. Wellons, "Prospecting for hash functions", 2018), a bijection
with measured bias 0.17. Two rounds, with a word of the key before each, keep the streams of two
keys from being reorderings of each other.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_MUL_1, _MUL_2 = 0x7FEB352D, 0x846CA68B
_GOLDEN = 0x9E3779B9  # 2^32 / golden ratio: keeps key 0 away from the fixed point mix(0) = 0


def key_words(key: int) -> tuple[int, int]:
    """The two 32-bit words that a kernel mixes in, from a key in 0..2^63-1."""
    low, high = key & _WORD, key >> 32
    return _mix_int(low ^ _mix_int(high)), _mix_int(high ^ _mix_int(low ^ _GOLDEN))


def words(start: int, count: int, key: int, device: torch.device | str = "cpu") -> Tensor:
    """int32 [count]: 32 random bits for each of the elements start .. start+count-1.

    For element i = high * 2^32 + low and key words a, b:
        word = mix(mix(low ^ a) ^ b ^ mix(high))
    """
    first, second = key_words(key)
    if start >> 31 == (start + count) >> 31:  # one high word for all, no step over int32's range
        second ^= _mix_int(start >> 32)
        low = _signed(start & _WORD)
        bits = torch.arange(low, low + count, dtype=torch.int32, device=device)
        bits = _mix_(bits.bitwise_xor_(_signed(first))).bitwise_xor_(_signed(second))
    else:
        index = torch.arange(start, start + count, device=device)
        bits = _mix_(index.to(torch.int32).bitwise_xor_(_signed(first)))
        bits ^= _mix_((index >> 32).to(torch.int32))
        bits ^= _signed(second)
    return _mix_(bits)


def uniform(start: int, count: int, key: int, device: torch.device | str = "cpu") -> Tensor:
    """FP32 [count] in [0, 1): the numbers of elements start .. start+count-1, multiples of 2^-24, the upper
    24 bits of :func:`words`."""
    return (words(start, count, key, device) >> 8).bitwise_and_(0xFFFFFF).float().mul_(2.0**-24)


def halves(seeds: Tensor, count: int) -> Tensor:
    """int32 [blocks, count] of 0..65535: as many numbers (an even one) from each seed, int32 [blocks].

    A block's own word (:func:`words`) is its seed, and one mix of it gives two numbers:
        number 2i: the lower half of mix(seed ^ i), number 2i + 1: the upper half
    A fifth of the instructions of two rounds a number, where 16 bits are enough.
    """
    bits = _mix_(seeds[:, None] ^ torch.arange(count // 2, dtype=torch.int32, device=seeds.device))
    return torch.stack((bits & 0xFFFF, bits >> 16 & 0xFFFF), -1).flatten(1)


def _signed(word: int) -> int:
    """The int32 with the same 32 bits: torch computes modulo 2^32 in int32, not in uint32."""
    return word - (1 << 32) if word >> 31 else word


def _mix_int(x: int) -> int:
    x = ((x ^ (x >> 16)) * _MUL_1) & _WORD
    x = ((x ^ (x >> 15)) * _MUL_2) & _WORD
    return x ^ (x >> 16)


def _mix_(x: Tensor) -> Tensor:
    """_mix_int in place on an int32 tensor; the masks make its arithmetic shifts logical ones."""
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    x *= _MUL_1
    x ^= (x >> 15).bitwise_and_(0x1FFFF)
    x *= _signed(_MUL_2)
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    return x
