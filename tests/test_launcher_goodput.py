"""Accounts of ledgers made by hand: every second has one place, lost steps are found, kills leave gaps."""

import random

import pytest
from ledger_support import ACTIVITIES, Ledger

from launcher.goodput import Account, account_of
from launcher.jobs import jobs_of, json_lines


def account(ledger: Ledger) -> Account:
    found = account_of(jobs_of(ledger.lines))
    assert found is not None
    assert sum(found.seconds.values()) == pytest.approx(found.wall_seconds, rel=0.005)
    return found


def only(found: Account) -> dict[str, float]:
    """The parts that are not nothing."""
    return {name: round(value, 6) for name, value in found.seconds.items() if abs(value) > 1e-6}


def test_an_undisturbed_run_is_what_its_activities_say() -> None:
    ledger = Ledger().start(0).progress(startup=10)
    ledger.progress(50, step=50, data=5, log=1).progress(eval=4).progress(save=2)
    found = account(ledger.progress(100, step=50, data=5, log=1).progress(save=2).end("done"))
    assert only(found) == {
        "useful": 100, "data": 10, "startup": 10, "save": 4, "eval": 4, "log": 2,
    }  # fmt: skip
    assert found.goodput == pytest.approx(100 / 130)
    assert (found.num_steps, found.num_repeated, found.num_unplanned) == (100, 0, 0)


def test_steps_after_the_checkpoint_are_lost_with_their_data_and_the_gap_is_down_time() -> None:
    ledger = Ledger().start(0).progress(startup=10).progress(30, step=30, data=3).wait(60)
    found = account(
        ledger.start(20).progress(startup=10).progress(100, step=80, data=8).end("done")
    )
    assert only(found) == {
        "useful": 100, "repeated": 11, "data": 10, "startup": 20, "down": 60,
    }  # fmt: skip
    assert (found.num_steps, found.num_repeated, found.num_unplanned) == (100, 10, 1)


def test_what_is_lost_is_taken_from_the_steps_that_were_lost() -> None:
    """The first steps are slow here: a mean over the whole job would be wrong."""
    ledger = Ledger().start(0).progress(10, step=100).progress(20, step=10)
    found = account(ledger.start(10).progress(20, step=10).end("done"))
    assert only(found) == {"useful": 110, "repeated": 10}


def test_repeats_of_repeats() -> None:
    """0 -> 10, 5 -> 8, 5 -> 9, 3 -> 12, after the checkpoint at 5 was found damaged."""
    ledger = Ledger().start(0).progress(10, step=10).start(5).progress(8, step=3)
    ledger.start(5).progress(9, step=4).start(3).progress(12, step=9).end("preempted")
    found = account(ledger)
    assert only(found) == {"useful": 3 + 9, "repeated": 7 + 3 + 4}
    assert (found.num_steps, found.num_repeated) == (12, 14)


def test_a_job_that_dies_while_starting_costs_its_start() -> None:
    ledger = Ledger().start(0).progress(10, step=10).wait(5).start(10).progress(startup=7).wait(5)
    found = account(ledger.start(10).progress(startup=7).progress(20, step=10).end("done"))
    assert only(found) == {"useful": 20, "startup": 14, "down": 10}
    silent = Ledger().start(0).wait(5).start(0).progress(startup=7).progress(20, step=20)
    assert only(account(silent)) == {"useful": 20, "startup": 7, "down": 5}


def test_going_back_inside_a_job_loses_the_steps_since() -> None:
    ledger = Ledger().start(0).progress(20, step=20).event("rewind", "to step 15")
    found = account(ledger.progress(15, rewind=3).progress(40, step=25).end("done"))
    assert only(found) == {"useful": 40, "repeated": 5, "rewind": 3}
    assert (found.num_steps, found.num_repeated) == (40, 5)


def test_a_step_under_way_belongs_to_the_mark_that_completes_it() -> None:
    done = Ledger().start(0).progress(0, step=2).progress(0, step=2).progress(1, step=2).end("done")
    assert only(account(done)) == {"useful": 6}
    killed = Ledger().start(0).progress(1, step=6).progress(1, step=4)
    assert only(account(killed)) == {"useful": 6, "repeated": 4}


def test_time_that_no_activity_has_is_told_as_unknown() -> None:
    ledger = Ledger().start(0).progress(10, step=10).wait(4).event("straggler", "rank 1")
    assert only(account(ledger)) == {"useful": 10, "unknown": 4}


def test_jobs_that_overlap_are_not_counted_twice() -> None:
    ledger = Ledger().start(0).progress(10, step=10).end("preempted", 75).wait(-3)
    found = account(ledger.start(10).progress(startup=8).progress(20, step=10).end("done"))
    assert found.wall_seconds == 25 and only(found) == {"useful": 20, "startup": 5}


@pytest.mark.parametrize("seed", range(20))
def test_every_second_has_a_place_whatever_happened(seed: int) -> None:
    draw = random.Random(seed)
    ledger, reached = Ledger(), 0
    for _ in range(draw.randint(1, 12)):
        ledger.start(draw.randint(0, reached)).progress(startup=draw.uniform(1, 20))
        for _ in range(draw.randint(0, 6)):
            spent = {name: draw.uniform(0, 9) for name in ACTIVITIES[1:]}
            step = max(0, ledger.step + draw.choice((0, 1, 5, 30, -4)))
            ledger.progress(step, **spent)
            reached = max(reached, step)
        if draw.random() < 0.5:
            ledger.end(draw.choice(("preempted", "failed", "hung", "done")))
        ledger.wait(draw.uniform(0, 100))
    found = account(ledger)
    assert sum(found.seconds.values()) == pytest.approx(found.wall_seconds)
    assert min(found.seconds.values()) > -1e-6 and 0 <= found.goodput <= 1


def test_cut_lines_lose_nothing_but_themselves() -> None:
    """A killed job's cut last line has no newline: the next job's first line comes right after it."""
    first = Ledger().start(0).progress(10, step=10).progress(20, step=10).text()
    second = Ledger(1_000_050.0).start(10)
    second.num_jobs = 2
    for line in second.lines:
        line["job"] = "00000002"
    second.progress(startup=5)
    for cut in range(1, len(first.splitlines()[-1])):
        jobs = jobs_of(json_lines(first[:-cut] + second.text()))
        assert [job.name for job in jobs] == ["00000001", "00000002"]
        assert jobs[0].last_step in (10, 20) and jobs[1].marks[-1].seconds["startup"] == 5
    assert account_of(jobs_of(json_lines(first[:20]))) is None
    assert jobs_of(json_lines('\n[1]\n{"kind": "start"}\nnull\n')) == []
