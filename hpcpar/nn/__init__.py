"""Modules that are trained by many ranks together."""

from hpcpar.nn.batch_norm import SyncBatchNorm, convert_sync_batchnorm
from hpcpar.nn.data_parallel import DataParallel
from hpcpar.nn.data_parallel_multi_gpu import DataParallelMultiGPU
from hpcpar.nn.experts.backend import ExpertBackend
from hpcpar.nn.experts.client import RemoteExpert
from hpcpar.nn.experts.clipping import clip_grad_norm_
from hpcpar.nn.experts.descriptor import BatchTensorDescriptor
from hpcpar.nn.experts.gate import TopKGate
from hpcpar.nn.experts.layer import MixtureOfExperts
from hpcpar.nn.experts.layer_experts import layer_experts, shared_state
from hpcpar.nn.experts.overflow import agree_on_overflow
from hpcpar.nn.experts.remote_mixture import RemoteMixtureOfExperts, RemoteSwitchMixtureOfExperts
from hpcpar.nn.experts.server import ExpertServer
from hpcpar.nn.experts.task_pool import TaskPool
from hpcpar.nn.pipeline import Pipeline

__all__ = [
    "BatchTensorDescriptor",
    "DataParallel",
    "DataParallelMultiGPU",
    "ExpertBackend",
    "ExpertServer",
    "MixtureOfExperts",
    "Pipeline",
    "RemoteExpert",
    "RemoteMixtureOfExperts",
    "RemoteSwitchMixtureOfExperts",
    "SyncBatchNorm",
    "TaskPool",
    "TopKGate",
    "agree_on_overflow",
    "clip_grad_norm_",
    "convert_sync_batchnorm",
    "layer_experts",
    "shared_state",
]
