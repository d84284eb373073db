"""The judge of the soak finds every kind of planted fault, and none in a correct history."""

from __future__ import annotations

import io
import random
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar
from xml.etree import ElementTree as ET

import pytest

from tests.soak import clients
from tests.soak.clock import Clock, follow
from tests.soak.history import Error, Fault, History, Operation, Promise, Recorder, parse
from tests.soak.judge import AFTERMATH, MAX_SECONDS_WITHOUT_FAULT, judge, problems
from tests.soak.picture import picture
from tests.soak.shrink import Schedule, schedule_of, shrunk

USERS = {"ada": ("ada/1", "ada/2"), "bob": ("bob/1", "bob/2")}
PEERS = {"ada": "bob", "bob": "ada"}
ALL = frozenset(Promise)
BUDGET, WRITE_BUDGET = 1.5, 5.0
SVG = "{http://www.w3.org/2000/svg}"


def correct(seed: int, promises: frozenset[Promise] = ALL) -> History:
    """Return a history of servers without any lag."""
    draw = random.Random(seed)
    written: dict[str, int] = defaultdict(int)
    operations = []
    for number in range(200):
        user = draw.choice(list(USERS))
        session = draw.choice(USERS[user])
        if draw.random() < 0.3:
            written[session] += 1
            extra = {"wrote": written[session]}
        else:
            asked = (*USERS[user], *USERS[PEERS[user]])
            extra = {
                "asked": list(asked),
                "saw": {each: written[each] for each in asked},
                "rows": {each: written[each] for each in asked},
                "numbers": {each: written[each] for each in asked},
                "owners": {each: [each] for each in asked},
            }
        operations.append(Operation(user, session, "orm", number, number + 0.5, 200, **extra))
    return recorded(operations, promises=promises)


def recorded(
    operations: list[Operation], *faults: Fault, promises: frozenset[Promise] = ALL
) -> History:
    return History(promises, BUDGET, WRITE_BUDGET, operations, list(faults), [])


def replaced(history: History, old: Operation, **changes: object) -> History:
    operations = [each._replace(**changes) if each is old else each for each in history.operations]
    return history._replace(operations=operations)


def last_read(history: History, is_wanted: Callable[[Operation], bool]) -> Operation:
    return [each for each in history.operations if each.saw and is_wanted(each)][-1]


def lose_own_write(history: History) -> History:
    old = last_read(history, lambda each: each.saw[each.session] > 0)
    return replaced(history, old, saw={**old.saw, old.session: old.saw[old.session] - 1})


def lose_write_of_the_same_request(history: History) -> History:
    operation = Operation("ada", "ada/1", "task", 900, 901, 200, wrote=999, saw={"ada/1": 998})
    return history._replace(operations=[*history.operations, operation])


def other_device(operation: Operation) -> str:
    return next(each for each in USERS[operation.user] if each != operation.session)


def lose_write_of_other_device(history: History) -> History:
    old = last_read(history, lambda each: each.saw[other_device(each)] > 0)
    other = other_device(old)
    return replaced(history, old, saw={**old.saw, other: old.saw[other] - 1})


def lose_write_of_a_task(history: History) -> History:
    """Show a session of another user less than a task wrote that pinned the key of its list."""
    operations = [
        Operation("ada", "ada/1", "by-task", 900, 901, 200, wrote=9),
        Operation("bob", "bob/1", "read", 902, 903, 200, saw={"ada/1": 8}),
    ]
    return history._replace(operations=[*history.operations, *operations])


def lose_write_after_a_response(history: History) -> History:
    operations = [
        Operation("ada", "ada/1", "after", 900, 901, 200, wrote=9),
        Operation("ada", "ada/1", "read", 902, 903, 200, saw={"ada/1": 8}),
    ]
    return history._replace(operations=[*history.operations, *operations])


def go_back(history: History) -> History:
    """Show an older state of another user than the same session has seen."""
    peer = "bob/1"
    old = last_read(history, lambda each: each.user == "ada" and each.saw[peer] > 1)
    return replaced(history, old, saw={**old.saw, peer: 0})


def show_an_answer_without_its_question(history: History) -> History:
    """Ada reads Bob's first row and writes; a third user sees what Ada wrote, but not the row."""
    operations = [
        Operation("bob", "bob/1", "orm", 0, 0.1, 200, wrote=1),
        Operation("ada", "ada/1", "orm", 1, 1.1, 200, saw={"bob/1": 1}),
        Operation("ada", "ada/1", "orm", 2, 2.1, 200, wrote=1),
        Operation("eve", "eve/1", "orm", 3, 3.1, 200, saw={"ada/1": 1, "bob/1": 0}),
    ]
    return history._replace(operations=operations)


def show_a_foreign_row(history: History) -> History:
    old = last_read(history, lambda each: True)
    return replaced(history, old, owners={**old.owners, old.session: ["eve/1"]})


def show_a_number_that_nobody_wrote(history: History) -> History:
    old = last_read(history, lambda each: True)
    return replaced(history, old, saw={**old.saw, old.session: 10_000})


def show_a_write_before_it_began(history: History) -> History:
    write = [each for each in history.operations if each.wrote][-1]
    early = write._replace(wrote=None, began=0.1, ended=0.2, saw={write.session: write.wrote or 0})
    return history._replace(operations=[early, *history.operations])


def fail_a_read(history: History) -> History:
    return replaced(history, last_read(history, lambda each: True), status=500)


def give_no_answer(history: History) -> History:
    return replaced(history, last_read(history, lambda each: True), status=0)


def fail_a_write(history: History) -> History:
    return replaced(history, [each for each in history.operations if each.wrote][-1], status=503)


def be_slow(history: History) -> History:
    old = last_read(history, lambda each: True)
    return replaced(history, old, ended=old.began + BUDGET + 0.1)


def write_slowly(history: History) -> History:
    old = [each for each in history.operations if each.wrote][-1]
    return replaced(history, old, ended=old.began + WRITE_BUDGET + 0.1)


def answer_nothing(history: History) -> History:
    old = last_read(history, lambda each: True)
    return replaced(history, old, saw={}, rows={}, numbers={}, owners={})


def leave_out_a_list(history: History) -> History:
    old = last_read(history, lambda each: True)
    saw = {owner: number for owner, number in old.saw.items() if owner != old.session}
    return replaced(history, old, saw=saw)


def leave_out_the_counts(history: History) -> History:
    return replaced(history, last_read(history, lambda each: True), rows={}, numbers={})


def lose_a_write_before_the_last(history: History) -> History:
    old = last_read(history, lambda each: each.saw["ada/1"] > 1)
    fewer = {**old.numbers, "ada/1": old.numbers["ada/1"] - 1}
    return replaced(history, old, rows=fewer, numbers=fewer)


def apply_a_write_twice(history: History) -> History:
    old = last_read(history, lambda each: each.saw["ada/1"] > 0)
    return replaced(history, old, rows={**old.rows, "ada/1": old.rows["ada/1"] + 1})


def lose_one_write_and_apply_another_twice(history: History) -> History:
    old = last_read(history, lambda each: each.saw["ada/1"] > 1)
    return replaced(history, old, numbers={**old.numbers, "ada/1": old.numbers["ada/1"] - 1})


PLANTED = {
    lose_own_write: "read your writes",
    lose_write_of_the_same_request: "read your writes",
    lose_write_of_other_device: "read your writes",
    lose_write_of_a_task: "followed keys",
    lose_write_after_a_response: "read your writes",
    go_back: "monotonic reads",
    show_an_answer_without_its_question: "writes follow reads",
    show_a_foreign_row: "foreign row",
    show_a_number_that_nobody_wrote: "foreign row",
    show_a_write_before_it_began: "foreign row",
    fail_a_read: "availability",
    give_no_answer: "availability",
    fail_a_write: "availability",
    be_slow: "budget",
    write_slowly: "budget",
    answer_nothing: "incomplete answer",
    leave_out_a_list: "incomplete answer",
    leave_out_the_counts: "incomplete answer",
    lose_a_write_before_the_last: "lost write",
    apply_a_write_twice: "duplicate write",
    lose_one_write_and_apply_another_twice: "lost write",
}


def guarantees(history: History) -> set[str]:
    return {violation.guarantee for violation in judge(history)}


@pytest.mark.parametrize("seed", range(5))
def test_correct_history_has_no_violation(seed: int) -> None:
    assert judge(correct(seed)) == []


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__name__)
def test_planted_fault_is_found(plant: Callable[[History], History], seed: int) -> None:
    assert PLANTED[plant] in guarantees(plant(correct(seed)))


@pytest.mark.parametrize(
    ("plant", "promise"),
    [
        (lose_write_of_other_device, Promise.EVERY_DEVICE),
        (go_back, Promise.MONOTONIC_READS),
    ],
    ids=lambda each: getattr(each, "__name__", str(each)),
)
def test_what_was_not_promised_is_no_violation(
    plant: Callable[[History], History], promise: Promise
) -> None:
    found = guarantees(plant(correct(1, ALL - {promise})))
    assert PLANTED[plant] not in found


def test_read_that_overlaps_the_write_need_not_show_it() -> None:
    operations = [
        Operation("ada", "ada/1", "orm", 0, 2, 200, wrote=1),
        Operation("ada", "ada/2", "orm", 1, 1.5, 200, saw={"ada/1": 0}),
    ]
    assert judge(recorded(operations)) == []


@pytest.mark.parametrize("number", [0, 1])
def test_write_without_an_answer_may_have_happened_or_not(number: int) -> None:
    operations = [
        Operation("ada", "ada/1", "orm", 0, 1, 0, wrote=1),
        Operation("ada", "ada/1", "orm", 2, 3, 200, saw={"ada/1": number}),
    ]
    assert judge(recorded(operations, Fault("primary killed", 0, 1, ["writes"]))) == []


@pytest.mark.parametrize(("numbers", "found"), [(1, {"lost write"}), (2, set()), (3, set())])
def test_write_without_an_answer_may_be_missing_among_those_acknowledged(
    numbers: int, found: set[str]
) -> None:
    count = {"ada/1": numbers}
    operations = [
        Operation("ada", "ada/1", "orm", 0, 1, 200, wrote=1),
        Operation("ada", "ada/1", "orm", 2, 3, 0, wrote=2),
        Operation("ada", "ada/1", "orm", 4, 5, 200, wrote=3),
        Operation("ada", "ada/1", "read", 6, 7, 200, saw={"ada/1": 3}, rows=count, numbers=count),
    ]
    killed = Fault("primary killed", 2, 3, ["writes"])
    assert guarantees(recorded(operations, killed)) == found


@pytest.mark.parametrize(
    ("kind", "excuses", "found"),
    [
        ("orm", [], {"read your writes"}),
        ("orm", ["pins"], {"read your writes"}),
        ("stream", [], {"read your writes"}),
        ("stream", ["pins"], set()),
    ],
)
def test_fault_of_the_cache_excuses_pins_that_no_cookie_carries(
    kind: str, excuses: list[str], found: set[str]
) -> None:
    operations = [
        Operation("ada", "ada/1", kind, 0, 1, 200, wrote=1),
        Operation("ada", "ada/1", "read", 2, 3, 200, saw={"ada/1": 0}),
    ]
    assert guarantees(recorded(operations, Fault("cache frozen", 0.5, 1.5, excuses))) == found


@pytest.mark.parametrize(
    ("began", "ended", "found"),
    [
        (0.5, 0.6, set()),
        (1 + AFTERMATH - 0.1, 5, set()),
        (10, 20, {"read your writes"}),
        (10, 50 - AFTERMATH + 0.1, set()),
        (50.5, 60, set()),
        (52, 60, {"read your writes"}),
    ],
)
def test_fault_of_the_cache_excuses_pins_only_during_the_write_or_the_read(
    began: float, ended: float, found: set[str]
) -> None:
    operations = [
        Operation("ada", "ada/1", "orm", 0, 1, 200, wrote=1),
        Operation("ada", "ada/2", "read", 50, 51, 200, saw={"ada/1": 0}),
    ]
    assert guarantees(recorded(operations, Fault("frozen", began, ended, ["pins"]))) == found


@pytest.mark.parametrize(
    ("began", "ended", "found"),
    [
        (10, 20, set()),
        (52, 60, {"read your writes", "followed keys", "monotonic reads"}),
    ],
)
@pytest.mark.parametrize("again", [False, True], ids=["written before", "written again"])
def test_cache_that_lost_its_pins_excuses_reads_until_they_are_saved_again(
    began: float, ended: float, found: set[str], again: bool
) -> None:
    """It was emptied at some time between the write and the read."""
    operations = [
        Operation("ada", "ada/1", "by-task", 0, 1, 200, wrote=1),
        Operation("ada", "ada/2", "stream", 2, 3, 200, wrote=1, saw={"ada/1": 1, "ada/2": 1}),
        Operation("ada", "ada/2", "read", 50, 51, 200, saw={"ada/1": 0}),
    ]
    if again:
        saw = {"ada/1": 1, "ada/2": 2}
        operations[2:2] = [
            Operation("ada", "ada/1", "by-task", 30, 31, 200, wrote=2),
            Operation("ada", "ada/2", "stream", 32, 33, 200, wrote=2, saw=saw),
        ]
        found = {"read your writes", "followed keys", "monotonic reads"}
    killed = Fault("killed", began, ended, ["pins", "stored pins"])
    assert guarantees(recorded(operations, killed)) == found


@pytest.mark.parametrize(
    ("kind", "began", "ended", "found"),
    [
        ("stream", 0.5, 1.5, set()),
        ("stream", 50.5, 51, set()),
        ("stream", 10, 20, {"monotonic reads"}),
        ("orm", 0.5, 1.5, {"monotonic reads"}),
        ("orm", 50.5, 51, {"monotonic reads"}),
    ],
)
def test_fault_of_the_cache_excuses_monotonic_reads_that_no_cookie_carries(
    kind: str, began: float, ended: float, found: set[str]
) -> None:
    operations = [
        Operation("ada", "ada/1", kind, 0, 1, 200, wrote=1, saw={"ada/1": 1, "bob/1": 1}),
        Operation("bob", "bob/1", "orm", 0, 1, 200, wrote=1),
        Operation("ada", "ada/1", "read", 50, 51, 200, saw={"bob/1": 0}),
    ]
    assert guarantees(recorded(operations, Fault("frozen", began, ended, ["pins"]))) == found


@pytest.mark.parametrize(("kind", "found"), [("read", {"monotonic reads"}), ("task", set())])
def test_what_a_task_saw_binds_no_later_read_of_its_session(kind: str, found: set[str]) -> None:
    operations = [
        Operation("bob", "bob/1", "orm", 0, 1, 200, wrote=1),
        Operation("ada", "ada/1", kind, 2, 3, 200, saw={"bob/1": 1}),
        Operation("ada", "ada/1", "read", 4, 5, 200, saw={"bob/1": 0}),
    ]
    assert guarantees(recorded(operations)) == found


@pytest.mark.parametrize(
    ("acknowledged", "found"), [(3.5, {"monotonic reads", "writes follow reads"}), (4.9, set())]
)
def test_write_that_a_standby_has_shown_binds_once_it_is_acknowledged(
    acknowledged: float, found: set[str]
) -> None:
    operations = [
        Operation("bob", "bob/1", "orm", 0, acknowledged, 200, wrote=1),
        Operation("ada", "ada/1", "read", 2, 3, 200, saw={"bob/1": 1}),
        Operation("ada", "ada/1", "orm", 4, 5, 200, wrote=1, saw={"bob/1": 0, "ada/1": 1}),
    ]
    assert guarantees(recorded(operations)) == found


def test_task_that_shows_less_than_its_session_has_seen_breaks_monotonic_reads() -> None:
    operations = [
        Operation("bob", "bob/1", "orm", 0, 1, 200, wrote=1),
        Operation("ada", "ada/1", "read", 2, 3, 200, saw={"bob/1": 1}),
        Operation("ada", "ada/1", "task", 4, 5, 200, saw={"bob/1": 0}),
    ]
    assert guarantees(recorded(operations)) == {"monotonic reads"}


@pytest.mark.parametrize(
    ("excuses", "at", "found"),
    [
        (["reads"], 0.0, set()),
        (["reads"], 2 + AFTERMATH - 0.1, set()),
        (["reads"], 2 + AFTERMATH + 0.1, {"availability", "budget"}),
        (["writes"], 0.0, {"availability", "budget"}),
        ([], 0.0, {"availability", "budget"}),
    ],
)
def test_fault_excuses_what_it_names_while_it_lasts(
    excuses: list[str], at: float, found: set[str]
) -> None:
    operations = [Operation("ada", "ada/1", "orm", at, at + BUDGET + 0.1, 503, saw={})]
    assert guarantees(recorded(operations, Fault("frozen", 0, 2, excuses))) == found


@pytest.mark.parametrize(("wrote", "budget"), [(None, BUDGET), (1, WRITE_BUDGET)])
@pytest.mark.parametrize(
    ("late", "status", "found"),
    [
        (-0.1, 200, set()),
        (-0.1, 0, set()),
        (0.1, 200, {"budget"}),
        (0.1, 0, {"availability", "budget"}),
    ],
)
def test_fault_excuses_nothing_that_ends_later_than_its_budget_after_the_fault(
    wrote: int | None, budget: float, late: float, status: int, found: set[str]
) -> None:
    ended = 2 + AFTERMATH + budget + late
    operations = [Operation("ada", "ada/1", "orm", 1, ended, status, wrote=wrote)]
    faults = [Fault("frozen", 0, 2, ["reads", "writes"])]
    assert guarantees(recorded(operations, *faults)) == found


def lost(*operations: Operation, began: float = 1, ended: float = 3) -> History:
    """Return a record of Ada's first four writes, each a second, of which a fault may lose some."""
    writes = [
        Operation("ada", "ada/1", "orm", number - 1, number - 0.5, 200, wrote=number)
        for number in (1, 2, 3, 4)
    ]
    fault = Fault("writes lost", began, ended, ["lost writes"])
    return recorded([*writes, *operations], fault)


@pytest.mark.parametrize(
    ("seen", "began", "ended", "found"),
    [
        (4, 2.6, 3.7, set()),
        (3, 2.6, 3.7, set()),
        (2, 2.6, 3.7, {"read your writes"}),
        (2, 1.6, 3.7, set()),
        # It ended before anything was lost.
        (3, 2.6, 60, {"read your writes"}),
        # Whatever was acknowledged before, or begun afterwards, is kept: there is no aftermath.
        (3, 3.6, 3.8, {"read your writes"}),
        (3, 2.6, 2.9, {"read your writes"}),
        (0, 3.1, 3.7, {"read your writes"}),
    ],
)
def test_promotion_excuses_the_loss_of_writes_of_its_time(
    seen: int, began: float, ended: float, found: set[str]
) -> None:
    read = Operation("ada", "ada/1", "read", 4, 5, 200, saw={"ada/1": seen})
    assert guarantees(lost(read, began=began, ended=ended)) == found


@pytest.mark.parametrize(
    ("seen", "found"), [(3, set()), (2, set()), (1, {"read your writes", "monotonic reads"})]
)
def test_lost_write_that_was_seen_binds_later_reads_to_those_before_it(
    seen: int, found: set[str]
) -> None:
    """Bob has seen the third write, which is lost, and so is the fourth."""
    before = Operation("ada", "ada/2", "read", 2.6, 2.7, 200, saw={"ada/1": 3})
    later = Operation("ada", "ada/2", "read", 4, 5, 200, saw={"ada/1": seen})
    assert guarantees(lost(before, later, began=2.1, ended=3.6)) == found


@pytest.mark.parametrize(("seen", "found"), [(2, set()), (1, {"writes follow reads"})])
def test_write_that_followed_a_lost_one_may_be_shown_without_it(seen: int, found: set[str]) -> None:
    operations = [
        Operation("bob", "bob/1", "read", 2.6, 2.7, 200, saw={"ada/1": 3}),
        Operation("bob", "bob/1", "orm", 4, 5, 200, wrote=1),
        Operation("eve", "eve/1", "read", 6, 7, 200, saw={"bob/1": 1, "ada/1": seen}),
    ]
    assert guarantees(lost(*operations, began=2.1, ended=3.6)) == found


@pytest.mark.parametrize(
    ("numbers", "rows", "found"),
    [
        (2, 2, set()),
        (3, 3, set()),
        (1, 1, {"lost write"}),
        (2, 3, {"duplicate write"}),
    ],
)
def test_lost_write_may_be_missing_below_a_later_one(
    numbers: int, rows: int, found: set[str]
) -> None:
    """The third write may be lost; the fourth was made after the promotion."""
    operations = [
        Operation("ada", "ada/1", "orm", 10, 11, 200, wrote=5),
        Operation(
            *("ada", "ada/1", "read", 12, 13, 200),
            saw={"ada/1": 5},
            rows={"ada/1": rows + 2},
            numbers={"ada/1": numbers + 2},
        ),
    ]
    assert guarantees(lost(*operations, began=2.1, ended=2.8)) == found


def test_fault_that_never_ended_excuses_until_the_end_of_the_record() -> None:
    operations = [Operation("ada", "ada/1", "read", 100, 120, 0)]
    assert guarantees(recorded(operations, Fault("frozen", 90, None, ["reads"]))) == set()


def record_of(history: History) -> tuple[io.StringIO, Recorder]:
    file = io.StringIO()
    return file, Recorder(file, history.promises, history.budget, history.write_budget)


def test_recorded_history_is_the_same_when_it_is_read() -> None:
    faults = [Fault("lag", 1.0, 2.0, []), Fault("lag", 3.0, None, [])]
    history = correct(1)._replace(faults=faults, errors=[Error("a fault", "AssertionError")])
    file, recorder = record_of(history)
    for entry in (*history.operations, *history.faults, *history.errors):
        recorder.add(entry)
    assert parse(file.getvalue().splitlines()) == history


@pytest.mark.parametrize(
    ("seconds", "faults", "errors", "is_wrong"),
    [
        (MAX_SECONDS_WITHOUT_FAULT - 1, [], [], False),
        (MAX_SECONDS_WITHOUT_FAULT + 1, [], [], True),
        (MAX_SECONDS_WITHOUT_FAULT + 1, [Fault("lag", 1, 2)], [], False),
        (MAX_SECONDS_WITHOUT_FAULT + 1, [Fault("lag", 1, 2, [], failed=True)], [], True),
        (
            MAX_SECONDS_WITHOUT_FAULT + 1,
            [Fault("lag", 1, 2)],
            [Error("a fault", "AssertionError")],
            True,
        ),
    ],
)
def test_run_with_an_error_or_without_faults_proves_nothing(
    seconds: float, faults: list[Fault], errors: list[Error], is_wrong: bool
) -> None:
    operations = [Operation("ada", "ada/1", "read", at, at + 1, 200) for at in (0, seconds - 1)]
    history = recorded(operations, *faults)._replace(errors=errors)
    assert bool(problems(history)) is is_wrong
    soak = pytest.importorskip("tests.soak.__main__")
    assert soak.report(history) == (soak.INVALID if is_wrong else 0)


def test_run_without_operations_proves_nothing() -> None:
    assert problems(recorded([]))


def test_error_of_a_client_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clients.Device, "act", fail)
    file, recorder = record_of(recorded([]))
    for thread in clients.run(1, 1, 1, recorder, lambda: False):
        thread.join()
    errors = parse(file.getvalue().splitlines()).errors
    assert {error.where for error in errors} == {"user0-1", "user0-2"}


def test_write_without_an_answer_is_not_missed_among_those_that_were_lost() -> None:
    """The first two may be lost, of which the second was never acknowledged; the third is kept."""
    count = {"ada/1": 0}
    operations = [
        Operation("ada", "ada/1", "orm", 0, 1, 200, wrote=1),
        Operation("ada", "ada/1", "orm", 1, 2, 0, wrote=2),
        Operation("ada", "ada/1", "orm", 4, 5, 200, wrote=3),
        Operation("ada", "ada/1", "read", 6, 7, 200, saw={"ada/1": 3}, rows=count, numbers=count),
    ]
    promoted = Fault("promoted", 0, 3, ["writes", "lost writes"])
    assert guarantees(recorded(operations, promoted)) == {"lost write"}


# The clock


def test_stepped_clock_is_that_of_the_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(time, "time", time.time)
    clock = Clock(tmp_path / "clock")
    follow(str(clock.path))
    before = time.time()
    clock.step(3600)
    ahead = time.time() - before
    clock.step(-3600)
    behind = time.time() - before
    assert ahead > 3000
    assert behind < -3000


# The faults


def fail(*args: object) -> None:
    raise AssertionError("planted")


@pytest.fixture
def faults() -> Any:
    for driver in ("psycopg", "MySQLdb", "redis"):
        pytest.importorskip(driver)
    from tests.soak import faults

    return faults


def run_of(servers: object) -> Any:
    return SimpleNamespace(rig=SimpleNamespace(servers=servers, links={}), cache=0)


def scheduled(
    faults: Any, monkeypatch: pytest.MonkeyPatch, *causes: Callable[..., None]
) -> tuple[History, threading.Event]:
    """Return the record of faults on no servers, and whether the run is over."""
    known = {cause: (["reads"], 1) for cause in causes}
    monkeypatch.setattr(faults, "FAULTS", {object: known})
    file, recorder = record_of(recorded([]))
    over = threading.Event()
    faults.schedule(run_of(object()), 1, recorder, over)
    return parse(file.getvalue().splitlines()), over


def test_unexpected_error_of_a_fault_is_recorded_and_ends_the_run(
    faults: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    history, over = scheduled(faults, monkeypatch, fail)
    assert "planted" in history.errors[0].text
    assert over.is_set()
    (fault,) = history.faults
    assert fault.failed
    assert fault.ended is not None


def test_error_of_a_server_that_still_starts_is_a_failed_fault(
    faults: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(context: Any) -> None:
        context.over.set()
        raise faults.psycopg.OperationalError

    monkeypatch.setattr(faults, "_errors_of", lambda servers: faults.psycopg.Error)
    history, _ = scheduled(faults, monkeypatch, refuse)
    assert not history.errors
    assert [fault.failed for fault in history.faults] == [True]


def test_fault_is_recorded_before_it_ends(faults: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = []

    def look(context: Any) -> None:
        lines.extend(file.getvalue().splitlines())
        context.over.set()

    monkeypatch.setattr(faults, "FAULTS", {object: {look: (["reads"], 1)}})
    file, recorder = record_of(recorded([]))
    faults.schedule(run_of(object()), 1, recorder, threading.Event())
    (before,) = parse(lines).faults
    (after,) = parse(file.getvalue().splitlines()).faults
    assert (before.ended, before.excuses) == (None, ["reads"])
    assert after.ended is not None
    assert after.began == before.began


class Disturbed:
    """Takes every order to servers, and keeps those that were not undone."""

    UNDOES: ClassVar = {
        "resume": {"pause"},
        "start": {"stop", "terminate"},
        "repair": {"stop"},
        "thaw": {"freeze"},
    }

    def __init__(self, fails: bool) -> None:
        self.fails = fails
        self.orders: set[str] = set()

    def __getitem__(self, alias: object) -> Disturbed:
        return self

    def __getattr__(self, name: str) -> Callable[..., None]:
        def order(*args: object) -> None:
            if name in self.UNDOES:
                self.orders -= self.UNDOES[name]
                return
            self.orders.add(name)
            if self.fails:
                fail()

        return order


class Moved:
    """An address, and the server that it resolves to."""

    delay, resets = 0.0, False

    def __init__(self, place: object) -> None:
        self.place = place

    def point_to(self, place: object, cut: bool = True) -> None:
        self.place = place


class Stepped:
    ahead = 0.0

    def step(self, seconds: float) -> None:
        self.ahead = seconds


@pytest.mark.parametrize(
    "name",
    [
        *("lag", "lag_of_all", "kill_replica", "kill_both_replicas", "kill_primary"),
        *("freeze_replica", "freeze_primary", "gtid_lag", "gtid_kill_replica"),
        *("gtid_kill_primary", "kill_cache"),
        *("move_address", "swap_addresses", "black_hole_replica", "delay_replica"),
        *("reset_results", "step_clock"),
    ],
)
@pytest.mark.parametrize("fails", [True, False], ids=["order fails", "wait fails"])
def test_fault_that_fails_undoes_itself(faults: Any, name: str, fails: bool) -> None:
    primary, one, two, gtid, cache = servers = [Disturbed(fails) for _ in range(5)]
    nodes = {"primary": primary, "replica1": one, "replica2": two}
    links = {"default": Moved(primary), "replica1": Moved(one), "replica2": Moved(two)}
    clock = Stepped()
    context = SimpleNamespace(
        primary=primary,
        replica=one,
        cluster=SimpleNamespace(nodes=nodes, replicas=[one, two]),
        gtid=gtid,
        links=links,
        running=SimpleNamespace(clock=clock, cache=cache),
        rng=random.Random(1),
        wait=fail,
    )
    with pytest.raises(AssertionError, match="planted"):
        cause_named(faults, name)(context)
    assert [server.orders for server in servers] == [set()] * 5
    assert [link.place for link in links.values()] == list(nodes.values())
    assert {(link.delay, link.resets) for link in links.values()} == {(0.0, False)}
    assert clock.ahead == 0


def cause_named(faults: Any, name: str) -> Callable[[Any], None]:
    every = [*faults.ADDRESS_FAULTS, *(each for known in faults.FAULTS.values() for each in known)]
    return next(each for each in every if each.__name__ == name)


def test_result_is_reset_in_its_middle() -> None:
    pytest.importorskip("psycopg")
    from tests.soak.network import Link

    def answer() -> None:
        with server.accept()[0] as near:
            near.sendall(near.recv(100).upper())
            near.recv(100)

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=answer, daemon=True).start()
        host, port = server.getsockname()
        with Link(SimpleNamespace(host=host, port=port)) as link:
            link.resets = True
            with socket.create_connection((link.host, link.port), timeout=20) as client:
                client.sendall(b"what")
                assert client.recv(100, socket.MSG_WAITALL) == b"WH"
                with pytest.raises(ConnectionResetError):
                    client.recv(100)


# Smaller schedules


def test_schedule_of_a_record_ends_with_its_first_violation() -> None:
    operations = [
        Operation("ada", "ada/1", "orm", 0, 1, 200, wrote=1),
        Operation("bob", "bob/1", "read", 9, 10, 200, saw={"ada/1": 2}),
        Operation("ada", "ada/1", "read", 90, 91, 500),
    ]
    faults = [Fault(name, at, at + 1) for name, at in (("lag", 2), ("a part", 3), ("late", 11))]
    history = recorded(operations, *faults)
    assert schedule_of(history, {"lag", "late"}) == Schedule(["lag"], 2)


@pytest.mark.parametrize(
    ("needed", "users", "expected"),
    [
        (["kill"], 1, Schedule(["kill"], 1)),
        (["lag", "kill"], 2, Schedule(["lag", "kill"], 2)),
        (["lag", "swap", "kill"], 1, Schedule(["lag", "swap", "kill"], 1)),
        (["none of them"], 1, Schedule(["lag", "swap", "kill", "lag", "freeze"] * 4, 8)),
    ],
)
def test_schedule_is_shrunk_to_what_still_fails(
    needed: list[str], users: int, expected: Schedule
) -> None:
    whole = Schedule(["lag", "swap", "kill", "lag", "freeze"] * 4, 8)

    def fails(schedule: Schedule) -> bool:
        return set(needed) <= set(schedule.faults) and schedule.users >= users

    found = shrunk(whole, fails)
    assert (sorted(found.faults), found.users) == (sorted(expected.faults), expected.users)


def test_faults_that_recur_are_left_out_together() -> None:
    tried: list[Schedule] = []
    whole = Schedule(["lag", "swap"] * 50, 1)
    assert shrunk(whole, tried.append) == whole  # type: ignore[arg-type]
    assert tried == [Schedule(["lag", "swap"] * 25, 1)] * 2 + [Schedule(["lag", "swap"], 1)]


# The picture


def test_picture_shows_faults_servers_and_failures() -> None:
    operations = [
        Operation("ada", "ada/1", "orm", 0, 1, 200, wrote=1, server="15001"),
        Operation("ada", "ada/1", "read", 2, 3, 500, server=""),
    ]
    drawn = picture(recorded(operations, Fault("lag <1>", 1, None)))
    titles = [each.text for each in ET.fromstring(drawn).iter(f"{SVG}title")]
    assert titles == ["lag <1>", "read: status 500"]
    assert ">15001</text>" in drawn
