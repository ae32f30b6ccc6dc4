"""Checkpoints: states on disk that are whole or not there, and read without executing anything."""

from hpcpar.checkpoint.experts import load_experts, save_experts
from hpcpar.checkpoint.inspection import CheckpointInfo, Entry, export, info, verify
from hpcpar.checkpoint.loading import load
from hpcpar.checkpoint.randomness import load_rng_state, rng_state
from hpcpar.checkpoint.retention import latest
from hpcpar.checkpoint.saving import Saving, save
from hpcpar.checkpoint.state_file import read_state, write_state
from hpcpar.checkpoint.tree import PerRank

__all__ = [
    "CheckpointInfo",
    "Entry",
    "PerRank",
    "Saving",
    "export",
    "info",
    "latest",
    "load",
    "load_experts",
    "load_rng_state",
    "read_state",
    "rng_state",
    "save",
    "save_experts",
    "verify",
    "write_state",
]
