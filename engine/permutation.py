"""A random order of any number of things that is computed place by place and never stored."""

import math

import numpy as np

ROUNDS = 6
Key = list[int]  # seeds: the same key is the same order


def mixed(x: np.ndarray) -> np.ndarray:
    """uint64 -> uint64 in which every bit depends on all bits of x (the finalizer of SplitMix64)."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return x ^ (x >> np.uint64(31))


def permute(count: int, key: Key, places: np.ndarray) -> np.ndarray:
    """The things, 0 to count - 1, at the given places of a random order.

    A Feistel network over a grid of about sqrt(count) x sqrt(count): each round shifts one coordinate by a hash of the
    other, which can be undone, so no two places share a thing. The few that land behind the last thing go on.
    """
    rows = math.isqrt(count - 1) + 1
    columns = -(-count // rows)
    keys = np.random.default_rng(key).integers(2**64, size=ROUNDS, dtype=np.uint64)
    sides = np.uint64(rows), np.uint64(columns)
    found = np.asarray(places, np.uint64)
    outside = np.ones(found.shape, bool)
    while outside.any():
        row, column = np.divmod(found[outside], sides[1])
        for number, own in enumerate(keys):
            if number % 2:
                column = (column + mixed(row ^ own) % sides[1]) % sides[1]
            else:
                row = (row + mixed(column ^ own) % sides[0]) % sides[0]
        found[outside] = row * sides[1] + column
        outside = found >= np.uint64(count)
    return found.astype(np.int64)


def permute_blocks(bounds: np.ndarray, together: int, key: Key, places: np.ndarray) -> np.ndarray:
    """As `permute`, over things that lie in blocks, from bounds[b] to bounds[b + 1]: `together` random blocks are gone
    through in a random order before the next ones are touched; 0: all blocks."""
    blocks, count = len(bounds) - 1, int(bounds[-1] - bounds[0])
    if not 0 < together < blocks:
        return bounds[0] + permute(count, key, places)
    order = permute(blocks, [*key, 0], np.arange(blocks))
    ends = np.cumsum(np.diff(bounds)[order])
    starts = np.concatenate(([0], ends))
    edges = np.append(starts[:-1:together], count)  # of the groups of blocks
    group, within = np.searchsorted(edges, places, side="right") - 1, np.empty(len(places), np.int64)
    for number in np.unique(group):
        inside, first = group == number, edges[number]
        within[inside] = first + permute(edges[number + 1] - first, [*key, 1, number], places[inside] - first)
    block = np.searchsorted(ends, within, side="right")
    return bounds[order[block]] + within - starts[block]
