"""Training as a job of a batch system: to stop in time, and to go on later."""

from hpcpar.jobs.preemption import REQUEUE_STATUS, Preemption

__all__ = ["REQUEUE_STATUS", "Preemption"]
