"""The judge of the soak finds every kind of planted fault, and none in a correct history."""

from __future__ import annotations

import io
import random
from collections import defaultdict
from collections.abc import Callable

import pytest

from tests.soak.history import Fault, History, Operation, Promise, Recorder, parse
from tests.soak.judge import AFTERMATH, judge

USERS = {"ada": ("ada/1", "ada/2"), "bob": ("bob/1", "bob/2")}
PEERS = {"ada": "bob", "bob": "ada"}
ALL = frozenset(Promise)


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
                "saw": {each: written[each] for each in asked},
                "owners": {each: [each] for each in asked},
            }
        operations.append(Operation(user, session, "orm", number, number + 0.5, 200, **extra))
    return History(promises, 1.5, operations, [])


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
    return replaced(history, old, ended=old.began + 1.6)


PLANTED = {
    lose_own_write: "read your writes",
    lose_write_of_the_same_request: "read your writes",
    lose_write_of_other_device: "read your writes",
    go_back: "monotonic reads",
    show_an_answer_without_its_question: "writes follow reads",
    show_a_foreign_row: "foreign row",
    show_a_number_that_nobody_wrote: "foreign row",
    show_a_write_before_it_began: "foreign row",
    fail_a_read: "availability",
    give_no_answer: "availability",
    fail_a_write: "availability",
    be_slow: "budget",
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
    assert judge(History(ALL, 1.5, operations, [])) == []


@pytest.mark.parametrize("number", [0, 1])
def test_write_without_an_answer_may_have_happened_or_not(number: int) -> None:
    operations = [
        Operation("ada", "ada/1", "orm", 0, 1, 0, wrote=1),
        Operation("ada", "ada/1", "orm", 2, 3, 200, saw={"ada/1": number}),
    ]
    faults = [Fault("primary killed", 0, 1, ["writes"])]
    assert judge(History(ALL, 1.5, operations, faults)) == []


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
    faults = [Fault("cache frozen", 0.5, 1.5, excuses)]
    assert guarantees(History(ALL, 1.5, operations, faults)) == found


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
    operations = [Operation("ada", "ada/1", "orm", at, at + 1.6, 503, saw={})]
    faults = [Fault("frozen", 0, 2, excuses)]
    assert guarantees(History(ALL, 1.5, operations, faults)) == found


def test_recorded_history_is_the_same_when_it_is_read() -> None:
    history = correct(1)._replace(faults=[Fault("lag", 1.0, 2.0, [])])
    file = io.StringIO()
    recorder = Recorder(file, history.promises, history.budget)
    for entry in (*history.operations, *history.faults):
        recorder.add(entry)
    assert parse(file.getvalue().splitlines()) == history
