"""Work in its own thread: watched, stopped, in turn."""

import threading

import pytest

from apps.stopping import Stopped, Switch, Turn, reports


def test_reports_come_in_order_from_one_thread_and_errors_come_through():
    threads = []

    def work(report):
        threads.append(threading.get_ident())
        report(1)
        report(2)
        raise ValueError("no more")

    seen = []
    with pytest.raises(ValueError, match="no more"):
        for number in reports(work, Switch()):
            seen.append(number)
    assert seen == [1, 2] and threads != [threading.get_ident()]


def test_a_page_that_goes_away_stops_the_work():
    going, ended = Switch(), threading.Event()

    def work(report):
        try:
            while True:
                going.check()
                report(0)
        except Stopped:
            ended.set()
            raise

    news = reports(work, going)
    next(news)
    news.close()
    assert ended.wait(5) and not going
    going.start()
    assert going


def test_who_waits_for_a_turn_may_give_up():
    turn, asked = Turn(), []

    def give_up():
        asked.append(True)
        raise Stopped

    turn.take(lambda: None)
    with pytest.raises(Stopped):
        turn.take(give_up)
    turn.give_back()
    turn.take(give_up)
    assert asked == [True]
