"""Modules that are trained by many ranks together."""

from hpcpar.nn.batch_norm import SyncBatchNorm, convert_sync_batchnorm
from hpcpar.nn.data_parallel import DataParallel
from hpcpar.nn.pipeline import Pipeline

__all__ = ["DataParallel", "Pipeline", "SyncBatchNorm", "convert_sync_batchnorm"]
