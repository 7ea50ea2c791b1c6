"""Which requests enter vLLM's batch before a step: by tokens in flight, the furthest along first, several at once."""

from __future__ import annotations

import random

from ilr_fast.engines.admission import Admission


def filled(tokens: int, prompts: list[int], *, limit: int = 10, **options: int) -> Admission:
    admission = Admission(tokens, slots=options.pop("slots", 100), **options)
    for number, prompt in enumerate(prompts):
        admission.add(str(number), prompt=prompt, limit=limit)
    return admission


def test_tokens_in_flight_bound_what_runs_at_once() -> None:
    admission = filled(100, [20, 20, 20, 20])
    assert admission.enter() == ["0", "1", "2"] and admission.in_flight == 90
    admission.leave("1", sampled=10)
    assert admission.enter() == ["3"] and admission.in_flight == 90


def test_what_is_furthest_along_comes_first_and_is_not_overtaken() -> None:
    admission = filled(100, [10, 50, 30, 50])
    assert admission.enter() == ["1"], "the other of 50 does not fit, and what is smaller waits behind it"
    admission.leave("1", sampled=10)
    assert admission.enter() == ["3", "2"]


def test_a_later_turn_comes_before_a_longer_prompt() -> None:
    admission = filled(10**6, [5, 900], slots=1)
    admission.add("third turn", prompt=30, limit=10, turn=2)
    admission.add("second turn", prompt=300, limit=10, turn=1)
    entered = []
    while names := admission.enter():
        entered += names
        admission.leave(names[0], sampled=1)
    assert entered == ["third turn", "second turn", "1", "0"]


def test_a_request_larger_than_all_room_runs_alone() -> None:
    admission = filled(100, [500, 10])
    assert admission.enter() == ["0"] and admission.enter() == []
    admission.leave("0", sampled=1)
    assert admission.enter() == ["1"]


def test_a_request_counts_with_what_others_have_sampled() -> None:
    admission = filled(100, [0, 0], limit=100)
    assert admission.enter() == ["0"]
    admission.leave("0", sampled=20)
    assert admission.enter() == ["1"] and admission.in_flight == 20
    admission.add("2", prompt=0, limit=5)
    admission.leave("1")
    assert admission.enter() == ["2"] and admission.in_flight == 5, "no more than its limit"


def test_slots_bound_what_runs_at_once() -> None:
    admission = filled(10**6, [5] * 5, slots=2)
    assert admission.enter() == ["0", "1"]


def test_few_arrivals_wait_for_each_other_while_many_run() -> None:
    admission = filled(10**6, [5] * 40, every=4)
    assert len(admission.enter()) == 40
    admission.add("new", prompt=9, limit=10)
    assert [admission.enter() for _ in range(4)] == [[], [], [], ["new"]]
    for number in range(6):
        admission.add(f"more{number}", prompt=9, limit=10)
    assert len(admission.enter()) == 6, "one in eight of those that run does not wait"


def test_what_leaves_while_it_waits_never_enters() -> None:
    admission = filled(15, [5, 5, 5], every=1)
    assert admission.enter() == ["0"]
    admission.leave("1")
    admission.leave("0")
    assert admission.enter() == ["2"]
    admission.leave("2", sampled=3)
    assert admission.in_flight == 0 and admission.enter() == []


def test_all_enter_and_the_bound_holds_whatever_the_order() -> None:
    for seed in range(30):
        g = random.Random(seed)
        admission = Admission(tokens=200, slots=7, every=g.choice([1, 3]))
        sizes = {str(n): (g.randrange(1, 120), g.randrange(1, 60)) for n in range(40)}
        for name, (prompt, limit) in sizes.items():
            admission.add(name, prompt=prompt, limit=limit)
        running: list[str] = []
        seen: list[str] = []
        while len(seen) < len(sizes) or running:
            entered = admission.enter()
            running += entered
            seen += entered
            assert len(running) <= 7 and (admission.in_flight <= 200 or len(running) == 1)
            if running and g.random() < 0.7:
                name = running.pop(g.randrange(len(running)))
                admission.leave(name, sampled=g.randrange(1, sizes[name][1] + 1))
        assert sorted(seen) == sorted(sizes) and admission.in_flight == 0
