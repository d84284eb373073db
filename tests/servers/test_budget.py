"""The time that a read may spend before only the primary is tried."""

from __future__ import annotations

from pinning_middleware.servers.budget import READ_BUDGET, RENEWED_AFTER, read_budget


def test_wait_inside_a_block_that_is_measured_is_subtracted_once() -> None:
    read_budget.renew()
    with read_budget.spending():
        read_budget.spend(READ_BUDGET)
    assert read_budget.left > 0


def test_wait_outside_of_any_block_is_subtracted() -> None:
    read_budget.renew()
    read_budget.spend(READ_BUDGET)
    assert read_budget.left == 0
    read_budget.renew()


def test_thread_that_only_connects_gets_a_new_budget_after_a_while() -> None:
    read_budget.renew()
    read_budget.spend(READ_BUDGET)
    read_budget._spent_at -= RENEWED_AFTER
    read_budget.spend(0.1)
    assert read_budget.left == READ_BUDGET
