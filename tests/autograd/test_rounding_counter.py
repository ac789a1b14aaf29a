"""The counter of stochastic rounding in a loop that does not tell it the iteration, and without any."""

from __future__ import annotations

import pytest

from agoq_megatron.autograd.rounding import RoundingCounter


def test_it_follows_the_clock_of_a_foreign_loop(seed):
    """The keys are those that a loop which tells the iteration gets."""
    now = 3
    told, follows = RoundingCounter(), RoundingCounter()
    for counter in (told, follows):
        counter.seed(seed, 1)
    follows.follow(lambda: now)
    keys = []
    for now in (3, 3, 4, 9):
        told.begin_iteration(now)
        for layer, site in ((1, "a"), (1, "a"), (2, "a"), (1, "b")):
            key = follows.key(layer, site)
            assert key == told.key(layer, site)
            keys.append(key)
    assert len(set(keys)) == len(keys)


def test_keys_in_pairs(seed):
    """An even key and the next one, in turn; another pair after that, and in every iteration and site."""
    counter = RoundingCounter()
    counter.seed(seed)
    pairs = []
    for iteration in (0, 1):
        counter.begin_iteration(iteration)
        for site in ("a", "b"):
            keys = [counter.paired_key(0, site) for _ in range(5)]
            assert [key - keys[0] for key in keys[:2]] == [0, 1] and keys[3] == keys[2] + 1
            pairs += keys[::2]
    assert all(key % 2 == 0 for key in pairs) and len(set(pairs)) == len(pairs)
    again = RoundingCounter()  # resumed in the second iteration
    again.seed(seed)
    again.begin_iteration(1)
    assert [again.paired_key(0, "a") for _ in range(5)][::2] == pairs[6:9]


def test_without_megatrons_arguments_there_is_no_clock(monkeypatch):
    from megatron.training import global_vars

    from agoq_megatron import stock
    from agoq_megatron.refusals import UsageError

    monkeypatch.setattr(global_vars, "_GLOBAL_ARGS", None)
    with pytest.raises(UsageError, match="--spec agoq_megatron.specs agoq_layer_spec.*megatron.training"):
        stock.arguments()
