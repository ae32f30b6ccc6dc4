"""Work in several threads at once, whose results and errors reach the test."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

__all__ = ["in_threads"]


def in_threads(count: int, work: Callable[[int], Any]) -> list[Any]:
    """What ``work(i)`` returned for each thread; what one of them raised, raised here."""
    results: list[Any] = [None] * count

    def run(place: int) -> None:
        try:
            results[place] = work(place)
        except BaseException as error:
            results[place] = error

    threads = [threading.Thread(target=run, args=(place,)) for place in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results
