"""How fast is this rank? An exponential moving average of seconds per sample, without time that it waits.

Averaged is the time of one sample, not the rate: after a batch that took twice as long the average is right
for batches of all sizes. Rounds and the loading of states are paused over, because they tell nothing about
how fast a rank computes. An average of the first few values is corrected for its start at zero, as in Adam.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["PerformanceEMA"]


class PerformanceEMA:
    """Samples per second of one rank. Local.

    Parameters
    ----------
    alpha
        Weight of the newest batch in the average, above 0 and at most 1.
    clock
        Seconds; monotonic.
    """

    def __init__(self, alpha: float = 0.1, *, clock: Callable[[], float] = time.perf_counter) -> None:
        self._alpha, self._clock = alpha, clock
        self._average_s = 0.0
        self._weight = 0.0
        self._since = clock()
        self._pauses = 0

    @property
    def samples_per_second(self) -> float:
        """The rate; zero before the first update."""
        return 0.0 if self._average_s <= 0.0 else self._weight / self._average_s

    def update(self, samples: int) -> float:
        """Count samples, at least one, that took the time since the last update; the new rate."""
        now = self._clock()
        seconds = max(now - self._since, 1e-9) / samples
        self._average_s += self._alpha * (seconds - self._average_s)
        self._weight += self._alpha * (1.0 - self._weight)
        self._since = now
        return self.samples_per_second

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Time inside the block does not count; blocks may be nested."""
        began = self._clock()
        self._pauses += 1
        try:
            yield
        finally:
            self._pauses -= 1
            if not self._pauses:
                self._since += self._clock() - began
