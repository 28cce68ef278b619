"""Random numbers in plain ints: slow, and independent of the package."""

from __future__ import annotations

import hashlib

M32 = 0xFFFFFFFF
CLOSURE, DIRECTION, COORDINATES, ROWS, COLUMNS, LAYERS, ROUND, ROUND_STATE = range(8)


def philox_ints(key: tuple[int, int], counter: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """Philox-4x32-10 in plain ints, from the paper."""
    k0, k1 = key
    c = list(counter)
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k0, b & M32, (a >> 32) ^ c[3] ^ k1, a & M32]
        k0, k1 = (k0 + 0x9E3779B9) & M32, (k1 + 0xBB67AE85) & M32
    return c[0], c[1], c[2], c[3]


def step_key_ints(seed: int, step: int, direction: int, purpose: int) -> tuple[int, int]:
    return philox_ints((seed & M32, seed >> 32), (step & M32, direction, purpose, step >> 32))[:2]


def words_ints(key: tuple[int, int], group: int, stream: int, purpose: int) -> tuple[int, int, int, int]:
    return philox_ints(key, (group & M32, group >> 32, stream, purpose))


def stream_ints(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "little")


def sign_at(key: tuple[int, int], stream: int, i: int) -> float:
    word = words_ints(key, i // 128, stream, DIRECTION)[i % 128 // 32]
    return -1.0 if word >> (i % 32) & 1 else 1.0


def noise_at(key: tuple[int, int], stream: int, i: int, purpose: int) -> int:
    return words_ints(key, i // 8, stream, purpose)[i % 8 // 2] >> (16 * (i % 2)) & 0xFFFF


def stratum_ints(key: tuple[int, int], j: int, stream: int, size: int, purpose: int = COORDINATES) -> tuple[int, float]:
    """(place in [0, size), sign) of stratum j."""
    w0, w1, w2, _ = words_ints(key, j, stream, purpose)
    return ((w1 << 32 | w0) * size) >> 64, -1.0 if w2 >> 31 else 1.0


def fraction_ints(seed: int, step: int, stream: int, total: int, size: int, direction: int = 0) -> dict[int, float]:
    """{logical index: sign} of the sampled coordinates of one tensor, strata of `size` elements."""
    key = step_key_ints(seed, step, direction, COORDINATES)
    places = {}
    for j in range(-(-total // size)):
        place, sign = stratum_ints(key, j, stream, size)
        if j * size + place < total:
            places[j * size + place] = sign
    return places


VECTORS = [  # Random123 1.14, kat_vectors, philox4x32 10
    ("0", "0", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff " * 2, "ffffffff " * 4, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("a4093822 299f31d0", "243f6a88 85a308d3 13198a2e 03707344", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def numbers(text: str, n: int) -> tuple[int, ...]:
    values = [int(w, 16) for w in text.split()]
    return tuple(values * n if len(values) == 1 else values)


BOUNDS = [1, 2, 3, 10, 100, 2**31 + 1, 2**32 - 1, 2**32, 2**32 + 1, 10**12 + 7, 2**62 + 3, 2**63 - 1]
