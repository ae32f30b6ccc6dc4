"""What a job says while it runs: one logger, with the rank in each line, and progress fit for a log."""

from hpcpar.logs.progress import Progress, track
from hpcpar.logs.records import RankFilter, configure, configure_by_default

__all__ = ["Progress", "RankFilter", "configure", "configure_by_default", "track"]
