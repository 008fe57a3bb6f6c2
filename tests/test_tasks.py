"""Tasks on threads: results in order, the first error ends all."""

from __future__ import annotations

import threading

import pytest

from lors.tasks import run_all


def test_results_are_in_the_order_of_the_tasks() -> None:
    turn = threading.Event()

    def second() -> int:
        turn.set()
        return 2

    assert run_all([lambda: int(turn.wait(60)), second, lambda: 3], 2, "lors") == [1, 2, 3]
    assert run_all([], 1, "lors") == []


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_stops_what_runs_and_what_waits(error: type[BaseException]) -> None:
    stop, began, ended, late = threading.Event(), threading.Event(), threading.Event(), threading.Event()

    def long() -> None:
        began.set()
        assert stop.wait(60), "told to stop"
        ended.set()

    def wrong() -> None:
        assert began.wait(60)
        raise error("wrong")

    with pytest.raises(error, match="wrong"):
        run_all([long, wrong, long, *[late.set] * 100], 2, "lors-test", stop)
    assert ended.is_set(), "it waits for what runs"
    assert not late.is_set(), "what waits is not begun"
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("lors-test")]
