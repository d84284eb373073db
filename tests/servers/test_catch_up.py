"""CatchUp: when a server that is behind may be probed again."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from freezegun.api import FrozenDateTimeFactory

from pinning_middleware.pins import Position
from pinning_middleware.servers.catch_up import FIRST_PAUSE, MAX_PAUSE, CatchUp


def at(point: int) -> Position:
    return Position({"ff-1": point})


def replayed(end: int) -> Callable[[Position], bool]:
    """Return whether a server that has replayed so much has reached a position."""
    return lambda position: position.points["ff-1"] <= end


def test_server_not_known_to_be_behind_may_be_probed_by_every_caller() -> None:
    catch_up = CatchUp()
    assert [catch_up.claim_probe() for _ in range(3)] == [True] * 3
    catch_up.record_probe(at(5), replayed(5))
    assert [catch_up.claim_probe() for _ in range(3)] == [True] * 3


def test_server_that_is_behind_is_probed_once_after_each_doubled_pause(
    clock: FrozenDateTimeFactory,
) -> None:
    catch_up, pause = CatchUp(), FIRST_PAUSE
    catch_up.record_probe(at(5), replayed(4))
    for _ in range(10):
        clock.tick(pause * 0.9)
        assert not catch_up.claim_probe()
        clock.tick(pause * 0.2)
        assert [catch_up.claim_probe() for _ in range(3)] == [True, False, False]
        catch_up.record_probe(at(9), replayed(4))
        pause = min(2 * pause, MAX_PAUSE)


def test_probes_of_monitors_do_not_postpone_those_of_reads(clock: FrozenDateTimeFactory) -> None:
    catch_up = CatchUp()
    catch_up.record_probe(at(5), replayed(4))
    for _ in range(10):
        catch_up.record_probe(None, replayed(4))
    clock.tick(FIRST_PAUSE * 1.1)
    assert catch_up.claim_probe()


def test_pauses_end_when_the_first_awaited_position_is_reached() -> None:
    catch_up = CatchUp()
    catch_up.record_probe(at(5), replayed(4))
    catch_up.record_probe(None, replayed(5))
    assert [catch_up.claim_probe() for _ in range(3)] == [True] * 3


def test_pauses_begin_anew_for_a_later_position(clock: FrozenDateTimeFactory) -> None:
    catch_up = CatchUp()
    catch_up.record_probe(at(5), replayed(4))
    for _ in range(10):
        clock.tick(MAX_PAUSE * 1.1)
        assert catch_up.claim_probe()
    catch_up.record_probe(at(9), replayed(5))
    assert not catch_up.claim_probe()
    clock.tick(FIRST_PAUSE * 1.1)
    assert catch_up.claim_probe()


@pytest.mark.parametrize("end", [4, 6])
def test_progress_alone_does_not_end_the_pauses(clock: FrozenDateTimeFactory, end: int) -> None:
    """A server that replays the log of the last hour makes progress all the time."""
    catch_up = CatchUp()
    catch_up.record_probe(at(7), replayed(3))
    catch_up.record_probe(at(9), replayed(end))
    assert not catch_up.claim_probe()
