"""Reading data by many ranks, each sample exactly once, and metrics that are exact over all of them."""

from hpcpar.data.h5_dataset import Batches, H5Dataset
from hpcpar.data.metrics import Mean, mean
from hpcpar.data.sampler import DistributedSampler

__all__ = ["Batches", "DistributedSampler", "H5Dataset", "Mean", "mean"]
