"""Catching up: how a rank that has missed rounds, or wants to begin where the others are, gets a state.

It asks; the secretary names a donor, in rotation among the ranks with the newest version; the state is drawn
from there. Meanwhile the rank answers others that ask it, so that all ranks may ask at once::

    rank 0 (version 100)   asks: you have the newest       gives it
    rank 1 (version 0)     asks: rank 0 .................. loads 100, gives it
    rank 2 (version 0)     asks: rank 0 or 1 ............. loads 100
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from hpcpar.comm import wait_for_peers
from hpcpar.optim.collaborative.membership import Membership
from hpcpar.optim.collaborative.replica import Packed
from hpcpar.optim.collaborative.state_exchange import Download, StateExchange

if TYPE_CHECKING:
    from hpcpar.comm import Communicator

__all__ = ["CatchUp"]

logger = logging.getLogger(__name__)

_LEAST_PATIENCE_S = 5.0


class CatchUp:
    """Gets newer states. Local to make.

    Parameters
    ----------
    comm
        The ranks.
    membership, exchange
        Of this rank.
    donor_timeout_s
        How long a donor may be silent before another one is asked for; ``None``: until the deadline.
    """

    def __init__(
        self,
        comm: Communicator,
        membership: Membership,
        exchange: StateExchange,
        donor_timeout_s: float | None,
    ) -> None:
        self._comm, self._membership, self._exchange = comm, membership, exchange
        self._patience_s = float("inf")
        if donor_timeout_s is not None:  # a donor answers once per batch, which may take longer than a round
            self._patience_s = max(_LEAST_PATIENCE_S, 4.0 * donor_timeout_s)

    def fetch(self, lowest_version: int, is_needed: Callable[[], bool]) -> Packed | None:
        """The newest state of another rank. Point-to-point.

        Parameters
        ----------
        lowest_version
            Older ones do not do.
        is_needed
            Asked while no donor is known.

        Returns
        -------
        Packed or None
            ``None`` when it turned out that this rank needs none.

        Raises
        ------
        StalledError
            When nothing came until the deadline.
        RankFailedError
            When the donor died.
        """
        membership = self._membership
        while True:
            request = membership.ask(lowest_version)
            self._wait(lambda: membership.donor() is not None or not is_needed())
            donor = membership.donor()
            if donor is None or donor == self._comm.rank:
                membership.need_nothing()
                return None
            packed = self._draw(self._exchange.download(donor, request))
            if packed is not None:
                return packed
            logger.warning(
                "%s got no state from rank %d within %g s and asks for another donor",
                self._comm._where,
                donor,
                self._patience_s,
            )

    def _draw(self, download: Download) -> Packed | None:
        """Wait for its chunks, each with a deadline; ``None`` when its donor is silent for too long."""
        try:
            while True:
                chunks, limit_s = download.chunks, time.monotonic() + self._patience_s
                self._wait(self._make_check(download, chunks, limit_s), (download.donor,))
                if download.advance():
                    return download.packed
                if download.chunks == chunks:
                    download.abandon()
                    return None
        except BaseException:
            download.abandon()
            raise

    def _make_check(self, download: Download, chunks: int, limit_s: float) -> Callable[[], bool]:
        return lambda: download.advance() or download.chunks > chunks or time.monotonic() > limit_s

    def _wait(self, done: Callable[[], bool], donors: tuple[int, ...] = ()) -> None:
        def look_and_ask() -> bool:
            self._membership.look()
            return done()

        wait_for_peers(look_and_ask, self._comm, lambda: ("loading the state of another rank", donors))
