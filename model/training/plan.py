"""Which clips make up which step: a pure function of the seed and the step's number, so that a run resumes exactly from a number.

Every bucket has an infinite *stream*: one permutation of its clips after the other. A global batch is the next part of it, so an
epoch's leftovers begin the next epoch's first batch, and every clip comes once per epoch. Steps go in *rounds*: in a round every
bucket has its share of batches, about as many as its clips fill, in random order. With n clips and global batches of G, round r
holds the batches floor(r n / G) up to, without, floor((r + 1) n / G) of a bucket: what comes before a round is a sum of quotients,
and the round of a step is found by bisection.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np


def draws(count: int, *key: int | str) -> np.ndarray:
    """`count` numbers, float64 in [0, 1), that `key` alone decides, in every process and with every version of NumPy."""
    return (_raw(count, key) >> np.uint64(11)) * 2.0**-53


def shuffled(count: int, *key: int | str) -> np.ndarray:
    """A permutation of 0 to `count` - 1, int64, that `key` alone decides."""
    return np.argsort(_raw(count, key), kind="stable")


def _raw(count: int, key: tuple[int | str, ...]) -> np.ndarray:
    # NumPy promises that seed sequences and bit generators never change; of its distributions and shuffles it does not.
    entropy = hashlib.sha256("/".join(map(str, key)).encode()).digest()[:16]
    raw: np.ndarray = np.random.PCG64(int.from_bytes(entropy, "big")).random_raw(count)
    return raw


class _Recent:
    """The last two of a sequence of costly arrays: the current one, and the next (or the one before)."""

    def __init__(self) -> None:
        self._held: OrderedDict[int, tuple[np.ndarray, ...]] = OrderedDict()
        self.made = 0

    def get(self, number: int) -> tuple[np.ndarray, ...] | None:
        if number in self._held:
            self._held.move_to_end(number)
        return self._held.get(number)

    def put(self, number: int, arrays: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
        self._held[number] = arrays
        self.made += 1
        while len(self._held) > 2:
            self._held.popitem(last=False)
        return arrays


class Stream:
    """A bucket's clips, one permutation after the other.

    Args:
        size: number of clips, at least 1.
        seed: of the permutations.
        name: of the bucket; buckets of other names have other permutations.
        shards: the number of the shard of every clip, integers `[size]`. With it, shards come in random order and clips are
            shuffled only within `window` consecutive shards, so that few files are read at a time. `None`: clips in any order.
        window: shards that are shuffled together, at least 1.

    Raises:
        ValueError: the size or the window is below 1, or `shards` has another length.
    """

    def __init__(self, size: int, seed: int, name: str, shards: np.ndarray | None = None, window: int = 8) -> None:
        if size < 1 or window < 1:
            raise ValueError(f"a stream needs at least one clip and a window of at least one shard; it has {size} and {window}")
        if shards is not None and len(shards) != size:
            raise ValueError(f"{len(shards)} shard numbers for {size} clips; one each is wanted")
        self.size = size
        self._seed, self._name, self._window = seed, name, window
        self._shards = None if shards is None else np.unique(shards, return_inverse=True)[1]
        self._recent = _Recent()

    @property
    def permutations_made(self) -> int:
        """How many permutations were computed so far; each is kept while the stream is read onwards."""
        return self._recent.made

    def take(self, first: int, count: int) -> np.ndarray:
        """Clip numbers at the places `first` to `first + count - 1` of the stream, int64 `[count]`, each below `size`."""
        parts = []
        while count > 0:
            epoch, place = divmod(first, self.size)
            parts.append(self._permutation(epoch)[place : place + count])
            first, count = first + len(parts[-1]), count - len(parts[-1])
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def _permutation(self, epoch: int) -> np.ndarray:
        held = self._recent.get(epoch)
        return held[0] if held else self._recent.put(epoch, (self._computed(epoch),))[0]

    def _computed(self, epoch: int) -> np.ndarray:
        order = shuffled(self.size, self._seed, "epoch", self._name, epoch)
        if self._shards is None:
            return order
        turn = np.argsort(shuffled(int(self._shards.max()) + 1, self._seed, "shards", self._name, epoch), kind="stable")
        windows = turn[self._shards[order]] // self._window
        return order[np.argsort(windows, kind="stable")]


class Rounds:
    """The order in which the batches of several buckets come.

    Args:
        sizes: clips of each bucket.
        batches: samples of a global batch of each bucket.
        seed: of the order.
        name: rounds of other names have other orders.
    """

    def __init__(self, sizes: Sequence[int], batches: Sequence[int], seed: int, name: str) -> None:
        self._buckets = list(zip(sizes, batches, strict=True))
        if not self._buckets or any(size < 1 or batch < 1 for size, batch in self._buckets):
            raise ValueError(f"every bucket needs at least one clip and a batch of at least one; they have {self._buckets}")
        self._seed, self._name = seed, name
        self._recent = _Recent()

    def before(self, number: int) -> int:
        """How many batches come before round `number`."""
        return sum(number * size // batch for size, batch in self._buckets)

    def round_of(self, place: int) -> int:
        """The round of the batch number `place` (over all buckets, from 0)."""
        low, high = 0, 1
        while self.before(high) <= place:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.before(middle) <= place else (low, middle)
        return low

    def at(self, place: int) -> tuple[int, int]:
        """The bucket whose turn it is at `place`, and which of its batches comes (each counted from 0)."""
        number = self.round_of(place)
        buckets, batches = self._recent.get(number) or self._recent.put(number, self._order(number))
        inside = place - self.before(number)
        return int(buckets[inside]), int(batches[inside])

    def _order(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        begins = [number * size // batch for size, batch in self._buckets]
        counts = [(number + 1) * size // batch - begin for (size, batch), begin in zip(self._buckets, begins, strict=True)]
        turns = np.repeat(np.arange(len(counts)), counts)
        turns = turns[shuffled(len(turns), self._seed, "round", self._name, number)]
        batches = np.empty(len(turns), np.int64)
        for bucket, (begin, count) in enumerate(zip(begins, counts, strict=True)):
            # Its batches come in the stream's order, so that no clip returns before the others of its epoch have come.
            batches[turns == bucket] = begin + np.arange(count)
        return turns, batches


@dataclass(frozen=True)
class Turn:
    """One step.

    Attributes:
        step: its number.
        bucket: number of the bucket whose turn it is.
        members: clip numbers in the bucket, int64 `[global batch]`, equal for every split of the batch over processes.
    """

    step: int
    bucket: int
    members: np.ndarray


class Plan:
    """The clips of every step.

    Args:
        streams: of each bucket.
        batches: samples of a global batch of each bucket: those of all processes together.
        images: whether each bucket is one of images.
        image_share: the share of steps that go to buckets of images where there are both kinds, 0 to 1, evenly spread.
        seed: of the order.

    Raises:
        ValueError: the share leaves one of the kinds without a step, or asks for a kind that is not there.
    """

    def __init__(
        self, streams: Sequence[Stream], batches: Sequence[int], images: Sequence[bool], image_share: float, seed: int
    ) -> None:
        self._streams, self._batches = list(streams), list(batches)
        self._share = _share(images, image_share)
        self._kinds = [[number for number, image in enumerate(images) if image == kind] for kind in (False, True)]
        self._rounds = [
            Rounds([self._streams[b].size for b in kind], [self._batches[b] for b in kind], seed, name) if kind else None
            for kind, name in zip(self._kinds, ("videos", "images"), strict=True)
        ]

    def at(self, step: int) -> Turn:
        """What step `step` (from 0) consists of."""
        if step < 0:
            raise ValueError(f"step {step} is negative; steps are counted from 0")
        before = self._images_before(step)
        image = self._images_before(step + 1) > before
        rounds = self._rounds[image]
        assert rounds is not None  # _share has seen to it
        number, batch = rounds.at(before if image else step - before)
        bucket = self._kinds[image][number]
        size = self._batches[bucket]
        return Turn(step, bucket, self._streams[bucket].take(batch * size, size))

    def _images_before(self, step: int) -> int:
        return step * self._share.numerator // self._share.denominator


def _share(images: Sequence[bool], image_share: float) -> Fraction:
    if all(images):
        return Fraction(1)
    if not any(images) and image_share:
        raise ValueError(f"image_share = {image_share} and no bucket of images; add one with frames = 1, or set it to 0")
    if any(images) and not 0 < image_share < 1:
        raise ValueError(f"image_share = {image_share} with buckets of images and of videos; above 0 and below 1 is wanted")
    # The shortest decimal that gives the number: 0.1 is one step in ten, not 3602879701896397 in 36028797018963968.
    return Fraction(repr(float(image_share)))
