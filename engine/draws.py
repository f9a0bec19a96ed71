"""The random numbers of training samples: a generator for one of them, or the first choices of many at once."""

from collections.abc import Callable, Iterator

import numpy as np


def sample_rng(seed: int, position: int) -> np.random.Generator:
    """The randomness of one sample; its first use chooses the caption or the answer."""
    return np.random.default_rng([seed, position])


class SampleRngs:
    """The generators of the samples at some positions."""

    def __init__(self, seed: int, positions: np.ndarray):
        self.seed, self.positions = seed, positions

    def __iter__(self) -> Iterator[np.random.Generator]:
        return (sample_rng(self.seed, position) for position in self.positions.tolist())

    def choose(self, counts: np.ndarray) -> np.ndarray:
        """`integers(count)` of each generator, in a tenth of the time: PCG64's first number, as NumPy seeds it, times
        count / 2^32. (NumPy draws again where that would be unfair, one time in a billion.)"""
        words = [word.astype(object) for word in seed_words(self.seed, self.positions)]  # Python's ints: 128 bits
        state, step = (words[k + 2] | words[k + 3] << 32 | words[k] << 64 | words[k + 1] << 96 for k in (0, 4))
        factor, step = 0x2360ED051FC65DA44385DF649FCCF645, step << 1 | 1
        state = (((state + step) * factor + step) * factor + step) % 2**128
        mixed, turn = (state >> 64 ^ state) % 2**64, state >> 122
        return ((mixed >> turn | mixed << (64 - turn)) % 2**32 * counts >> 32).astype(np.int64)


def hashing(constant: int, factor: int) -> Callable[[np.ndarray], np.ndarray]:
    """SeedSequence's hash of 32-bit words, at each call with another constant."""

    def hashed(words: np.ndarray) -> np.ndarray:
        nonlocal constant
        words = words ^ np.uint32(constant)
        constant = constant * factor % 2**32
        words *= np.uint32(constant)
        return words ^ words >> np.uint32(16)

    return hashed


def seed_words(seed: int, positions: np.ndarray) -> list[np.ndarray]:
    """`SeedSequence([seed, position]).generate_state(8)` of each position: eight arrays of uint32."""
    seeds = [seed] if seed < 2**32 else [seed % 2**32, seed >> 32]
    words = [*(np.full(positions.shape, part) for part in seeds), positions % 2**32, positions >> 32, 0 * positions]
    hashed = hashing(0x43B0D7E5, 0x931E8875)
    pool = [hashed(word.astype(np.uint32)) for word in words[:4]]
    for source in range(4):
        for target in (other for other in range(4) if other != source):
            word = pool[target] * np.uint32(0xCA01F9DD) - hashed(pool[source]) * np.uint32(0x4973F715)
            pool[target] = word ^ word >> np.uint32(16)
    return list(map(hashing(0x8B51F9DD, 0x58F38DED), pool * 2))
