"""States of replicas: all of an expert's replicas are equal, but for what each has accumulated since.

A checkpoint has one file for an expert, not one for each replica. So what the replicas wait to add up for the
next update is added up in the file, and one replica takes all of it back::

    replica 0   model, 10 examples pending ──┐                              ┌── replica 0   40 pending
    replica 1   model, 30 examples pending ──┴── file  model, 40 pending ──┴── replica 1    0 pending
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["joined_state", "own_part", "state_with_pending", "state_without_part"]


def own_part(state: Mapping[str, Any]) -> dict[str, Any]:
    """What a replica's full state has of its own. Local."""
    return {"pending": state["pending"]}


def joined_state(state: Mapping[str, Any], parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A full state with the parts of other replicas added to its own. Local."""
    gradients = dict(state["pending"]["gradients"])
    samples = state["pending"]["samples"]
    for part in parts:
        samples += part["pending"]["samples"]
        for name, gradient in part["pending"]["gradients"].items():
            gradients[name] = gradients[name] + gradient if name in gradients else gradient
    return state_with_pending(state, {"gradients": gradients, "samples": samples})


def state_without_part(state: Mapping[str, Any]) -> dict[str, Any]:
    """A full state with nothing pending, for all replicas but one. Local."""
    return state_with_pending(state, {"gradients": {}, "samples": 0})


def state_with_pending(state: Mapping[str, Any], pending: Mapping[str, Any]) -> dict[str, Any]:
    """A full state with something else that waits for an update, and counts that agree with it. Local."""
    stats = dict(state["stats"])
    stats["examples_processed"] += pending["samples"] - state["pending"]["samples"]
    return {**state, "stats": stats, "pending": dict(pending)}
