"""A wait ends when it is told to, by whatever tells it."""

import os
import signal
import threading

from worker.wakeup import Wakeup

LONG_SECONDS = 3600


def test_signal_handler_ends_a_long_wait() -> None:
    wakeup = Wakeup()
    before = signal.signal(signal.SIGUSR1, lambda _number, _frame: wakeup.set())
    threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGUSR1)).start()

    assert wakeup.wait(LONG_SECONDS)
    signal.signal(signal.SIGUSR1, before)
    wakeup.close()


def test_once_set_it_stays_set_and_no_wait_waits() -> None:
    wakeup = Wakeup()
    wakeup.set()
    wakeup.set()
    assert [wakeup.wait(LONG_SECONDS), wakeup.wait(LONG_SECONDS), wakeup.is_set] == [True, True, True]
    wakeup.close()


def test_descriptor_ends_a_wait_without_setting_it() -> None:
    wakeup = Wakeup()
    readable, writable = os.pipe()
    os.write(writable, b"x")
    assert not wakeup.wait(LONG_SECONDS, descriptors=[readable])
    for descriptor in (readable, writable):
        os.close(descriptor)
    wakeup.close()


def test_wait_ends_by_itself() -> None:
    wakeup = Wakeup()
    assert not wakeup.wait(0.01)
    wakeup.close()
