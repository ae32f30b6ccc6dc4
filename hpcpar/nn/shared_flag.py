"""A bit that travels with the gradients: has any rank something to say before the next step?

A training loop sometimes needs a decision of all ranks that one of them has cause for: the batch system has
sent it a signal, its clock says that the job's time is nearly up. To ask in a collective of its own costs a
round of messages in every step, for a question whose answer is nearly always no. The reduction of gradients
makes such a round anyway, so the answer goes along, as one more number of its tail.

Invariant: :attr:`SharedFlag.seen` changes at the same point of the program on all ranks. Where the reduction
has ended with ``backward()`` it is that reduction's; where it overlaps the next forward, some ranks may know
its result earlier than others, and so what is seen is the reduction's before.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["SharedFlag"]


@dataclass
class SharedFlag:
    """Whether this rank has raised its flag, and whether any rank had. Local to set and to read.

    Attributes
    ----------
    raised : bool
        This rank's; goes out with every reduction until it is set to false again.
    seen : bool
        Whether any rank's was raised when gradients were reduced last; the same on all ranks.
    """

    raised: bool = False
    seen: bool = False
