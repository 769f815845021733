"""Rounds are shared fairly, and the statistics are what they say."""

from contextlib import contextmanager, nullcontext

import pytest

from inhibitor.bench.timing import SAMPLE, Contestant, calls_for, in_turn, median_and_spread, pairs


def contestant(name, rounds, log, calls=1):
    return Contestant(name, lambda: log.append(name), nullcontext, rounds, calls)


def test_every_round_runs_each_once_and_nobody_always_first():
    log: list[str] = []
    seen: list[int] = []
    times = in_turn([contestant(name, 3, log) for name in "abc"], seen.append)
    assert ["".join(log[i : i + 3]) for i in (0, 3, 6)] == ["abc", "bca", "cab"]
    assert {name: sorted(found) for name, found in times.items()} == {"a": [0, 1, 2], "b": [0, 1, 2], "c": [0, 1, 2]}
    assert seen == [3, 3, 3]


def test_who_has_fewer_rounds_sits_out_evenly():
    log: list[str] = []
    times = in_turn([contestant("fast", 9, log), contestant("slow", 3, log)], lambda total: None)
    assert sorted(times["fast"]) == list(range(9))
    assert sorted(times["slow"]) == [2, 5, 8]
    assert in_turn([], lambda total: None) == {}


def test_a_short_call_is_repeated_in_its_setting():
    entered = []

    @contextmanager
    def setting():
        entered.append(True)
        yield

    log: list[str] = []
    seconds = Contestant("a", lambda: log.append("a"), setting, rounds=1, calls=4).sample()
    assert (len(log), len(entered)) == (4, 1)
    assert seconds > 0
    assert (calls_for(SAMPLE / 10), calls_for(5.0), calls_for(0.0) > 1) == (10, 1, True)


def test_median_and_spread():
    assert median_and_spread([4.0, 1.0, 3.0, 2.0, 100.0]) == (3.0, 2.0)
    assert median_and_spread([7.0]) == (7.0, 0.0)


def test_only_rounds_that_both_ran_in_are_paired():
    assert pairs({0: 1.0, 2: 3.0, 5: 4.0}, {5: 8.0, 1: 9.0, 2: 6.0}) == [(3.0, 6.0), (4.0, 8.0)]


def test_collection_is_switched_on_again_after_an_error():
    import gc

    def fail():
        raise RuntimeError

    with pytest.raises(RuntimeError):
        in_turn([Contestant("a", fail, nullcontext, 1, 1)], lambda total: None)
    assert gc.isenabled()
