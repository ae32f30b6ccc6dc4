"""States on disk: files that are written whole or not at all, and read without executing anything."""

from hpcpar.checkpoint.experts import load_experts, save_experts
from hpcpar.checkpoint.state_file import read_state, write_state

__all__ = ["load_experts", "read_state", "save_experts", "write_state"]
