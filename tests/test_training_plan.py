"""The order of training: every clip once per epoch, the same for every number of processes, from any step on."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from videofactory.model.training.plan import Plan, Rounds, Stream, draws, shuffled

SEEDS = st.integers(0, 2**40)
SHUFFLED = [0, 5, 1, 2, 4, 3, 7, 6]
DRAWN = [0.5443168311544623, 0.2193152672117522]


@st.composite
def buckets(draw: st.DrawFn) -> list[tuple[int, int]]:
    """Clips and global batch of one to four buckets; batches are multiples of 12, so that 1 to 4 processes divide them."""
    found = []
    for _ in range(draw(st.integers(1, 4))):
        batch = draw(st.sampled_from([12, 24]))
        found.append((draw(st.integers(batch, 5 * batch + 7)), batch))
    return found


def plan_of(sizes: list[tuple[int, int]], seed: int, images: list[bool] | None = None, share: float = 0.0) -> Plan:
    streams = [Stream(size, seed, f"bucket {number}") for number, (size, _) in enumerate(sizes)]
    return Plan(streams, [batch for _, batch in sizes], images or [False] * len(sizes), share, seed)


@settings(max_examples=40, deadline=None)
@given(buckets(), SEEDS)
def test_every_epoch_has_every_clip_once(sizes: list[tuple[int, int]], seed: int) -> None:
    plan = plan_of(sizes, seed)
    seen: list[list[int]] = [[] for _ in sizes]
    epochs = 3
    while min(len(members) / size for members, (size, _) in zip(seen, sizes, strict=True)) < epochs:
        turn = plan.at(sum(len(members) // batch for members, (_, batch) in zip(seen, sizes, strict=True)))
        assert len(turn.members) == sizes[turn.bucket][1]
        seen[turn.bucket] += turn.members.tolist()
    for members, (size, _) in zip(seen, sizes, strict=True):
        orders = [members[epoch * size : (epoch + 1) * size] for epoch in range(epochs)]
        assert all(sorted(order) == list(range(size)) for order in orders)
        # Two epochs in the same order would be no shuffle; of a dozen clips that is no coincidence.
        assert len({tuple(order) for order in orders}) == epochs


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(12, 40), min_size=1, max_size=3), SEEDS, st.integers(0, 10**6))
def test_processes_divide_the_batch_that_one_would_have(clips: list[int], seed: int, step: int) -> None:
    def global_batch(world: int) -> list[int]:
        batch = 12 // world
        parts = []
        for rank in range(world):
            # Each process has a plan of its own, as it would on a machine of its own.
            plan = plan_of([(size, batch * world) for size in clips], seed)
            parts += plan.at(step).members[rank * batch : (rank + 1) * batch].tolist()
        return parts

    assert global_batch(1) == global_batch(2) == global_batch(3) == global_batch(4)


@settings(max_examples=20, deadline=None)
@given(buckets(), SEEDS, st.lists(st.integers(0, 500), min_size=1, max_size=20))
def test_a_step_follows_from_its_number_alone(sizes: list[tuple[int, int]], seed: int, steps: list[int]) -> None:
    read_on = plan_of(sizes, seed)
    turns = {step: read_on.at(step) for step in range(max(steps) + 1)}
    jumping = plan_of(sizes, seed)
    for step in steps:
        for found in (jumping.at(step), plan_of(sizes, seed).at(step)):
            assert found.bucket == turns[step].bucket and found.members.tolist() == turns[step].members.tolist()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 50), st.integers(1, 60)), min_size=1, max_size=4), SEEDS)
def test_rounds_give_every_batch_of_every_bucket_once_and_in_order(sizes: list[tuple[int, int]], seed: int) -> None:
    rounds = Rounds([size for size, _ in sizes], [batch for _, batch in sizes], seed, "test")
    end = rounds.before(12)
    given_: list[list[int]] = [[] for _ in sizes]
    for place in range(end):
        bucket, batch = rounds.at(place)
        number = rounds.round_of(place)
        assert rounds.before(number) <= place < rounds.before(number + 1)
        given_[bucket].append(batch)
    for batches, (size, batch) in zip(given_, sizes, strict=True):
        assert batches == list(range(12 * size // batch))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 400), SEEDS, st.integers(1, 5), st.integers(1, 12))
def test_shard_order_stays_within_a_window_of_shards(size: int, seed: int, window: int, per_shard: int) -> None:
    shards = np.arange(size) // per_shard + 7
    stream = Stream(size, seed, "bucket", shards, window)
    orders = [stream.take(epoch * size, size) for epoch in range(2)]
    for order in orders:
        assert sorted(order.tolist()) == list(range(size))
        visited = shards[order].tolist()
        first = {shard: visited.index(shard) for shard in set(visited)}
        last = {shard: size - 1 - visited[::-1].index(shard) for shard in set(visited)}
        for place in range(size):
            open_ = [shard for shard in first if first[shard] <= place <= last[shard]]
            assert len(open_) <= window


def test_shards_come_in_another_order_every_epoch() -> None:
    shards = np.repeat(np.arange(20), 3)
    stream = Stream(60, 1, "bucket", shards, window=1)
    visited = [shards[stream.take(epoch * 60, 60)][::3].tolist() for epoch in range(3)]
    assert len({tuple(order) for order in visited}) == 3 and all(sorted(order) == list(range(20)) for order in visited)


def test_images_have_their_share_of_the_steps_evenly() -> None:
    plan = plan_of([(30, 12), (40, 12), (50, 24)], 3, [False, False, True], 0.25)
    images = [plan.at(step).bucket == 2 for step in range(400)]
    assert all(sum(images[begin : begin + 4]) == 1 for begin in range(0, 400, 4))
    tenth = plan_of([(30, 12), (50, 24)], 3, [False, True], 0.1)
    assert sum(tenth.at(step).bucket for step in range(1000)) == 100
    seen = Counter(clip for step in range(1000) if (turn := tenth.at(step)).bucket for clip in turn.members.tolist())
    assert len(seen) == 50 and max(seen.values()) - min(seen.values()) <= 1


def test_all_images_need_no_share() -> None:
    assert {plan_of([(30, 12)], 3, [True], 0.0).at(step).bucket for step in range(9)} == {0}


@pytest.mark.parametrize(("images", "share"), [([False], 0.5), ([False, True], 0.0), ([False, True], 1.0)])
def test_a_share_that_leaves_a_bucket_without_steps_is_an_error(images: list[bool], share: float) -> None:
    with pytest.raises(ValueError, match=f"image_share = {share}"):
        plan_of([(30, 12)] * len(images), 0, images, share)


def test_a_permutation_is_computed_once_per_epoch() -> None:
    stream = Stream(1000, 5, "bucket")
    for place in range(0, 3000, 10):
        stream.take(place, 10)
    stream.take(2990, 20)
    stream.take(2000, 10)
    assert stream.permutations_made == 4


def test_far_steps_cost_no_more_than_near_ones() -> None:
    plan = plan_of([(1000, 24), (77, 12)], 5)
    turn = plan.at(10**12)
    assert len(turn.members) == (24, 12)[turn.bucket]
    with pytest.raises(ValueError, match="step -1"):
        plan.at(-1)


def test_chance_is_the_same_for_ever() -> None:
    # Written down: a run that is resumed after an upgrade must go on with the same samples.
    assert shuffled(8, 1, "epoch", "bucket", 0).tolist() == SHUFFLED
    assert draws(2, 1, "sample", 5).tolist() == pytest.approx(DRAWN, abs=1e-15)
    program = "from videofactory.model.training.plan import *; print(shuffled(8, 1, 'epoch', 'bucket', 0).tolist())"
    said = subprocess.run([sys.executable, "-c", program], check=True, timeout=120, capture_output=True, text=True).stdout
    assert said.strip() == str(SHUFFLED)


def test_draws_are_uniform_and_differ_by_key() -> None:
    values = np.concatenate([draws(4, 0, "sample", step, place) for step in range(50) for place in range(20)])
    assert len(np.unique(values)) == 4000 and values.min() >= 0 and values.max() < 1
    assert abs(values.mean() - 0.5) < 0.02 and abs(values.std() - 12**-0.5) < 0.02
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.05
