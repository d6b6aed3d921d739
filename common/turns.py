"""Threads that take turns: one runs at a time, until a place that all have to come to."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from threading import Semaphore, Thread

Pause = Callable[[], None]


class Stopped(Exception):
    """Raised by a pause, in every thread, once the work of one has failed."""


def in_turns(work: Callable[[int, Pause], None], number: int) -> None:
    """Call `work(0, pause)` to `work(number - 1, pause)`, each in a thread of its own.

    `pause()` gives the turn to the next thread, and returns when it has gone round. So thread 0 is
    the first to go on, after all others have come to the same pause. Every thread must pause
    equally often. As only one runs at a time, they need no locks, and the order is always the same.
    The first error is raised here.
    """
    turns, errors = [Semaphore(0) for _ in range(number)], list[BaseException]()

    def pause(i: int) -> None:
        turns[(i + 1) % number].release()
        turns[i].acquire()
        if errors:
            raise Stopped

    def run(i: int) -> None:
        turns[i].acquire()
        try:
            if not errors:
                work(i, partial(pause, i))
        except BaseException as error:
            errors.append(error)
        finally:
            turns[(i + 1) % number].release()

    threads = [Thread(target=run, args=(i,), daemon=True) for i in range(number)]
    for thread in threads:
        thread.start()
    turns[0].release()
    try:
        for thread in threads:
            thread.join()
    except BaseException as error:  # Ctrl-C: they stop at their next pause
        errors.append(error)
    if errors:
        raise errors[0]
