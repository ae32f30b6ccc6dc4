"""Staging: a bucket on a GPU and its copy in pinned host memory.

Gradients are written where the model lives, and summed on the host. A bucket on the host needs no copy:
its flat tensor *is* the transport's storage. On a GPU the flat tensor is device memory, the storage is
page-locked, and one asynchronous copy each way connects them.

Invariant: the copy out is ordered after the kernels that filled the bucket (same stream), and the storage
counts as filled only when its event has passed. The copy in is enqueued on that stream too, whoever makes
the progress: a thread has another current stream. The stream that is current where the program waits for the
bucket is made to wait for it, so that kernels enqueued later see the mean; the host need not wait.

A bucket that devices sum among themselves (:mod:`~hpcpar.comm.device_group`) *stays*: nothing is copied, and
only the event tells when it is filled.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

__all__ = ["Staging"]


class Staging:
    """Connects the flat tensor of a bucket to its storage on the host.

    Parameters
    ----------
    storage
        Flat host tensor that the transport reduces.
    device
        Where the bucket's own flat tensor lives; the host itself means no copy.
    separate
        Copy even on the host; for tests of the staged path.

    Attributes
    ----------
    flat : torch.Tensor
        The bucket's tensor, on ``device``.
    copies : bool
        Whether that is another tensor than the storage.
    stays : callable
        Asked when the bucket is published: is it summed without the host this time?
    """

    def __init__(self, storage: torch.Tensor, device: torch.device, *, separate: bool = False) -> None:
        self._storage = storage
        self.copies = separate or device.type != "cpu"
        self._event: torch.cuda.Event | None = None
        self._stream: torch.cuda.Stream | None = None
        self._on_gpu = device.type == "cuda"
        self._stayed = False
        self.stays: Callable[[], bool] = lambda: False
        self.flat = torch.zeros_like(storage, device=device) if self.copies else storage

    def begin_out(self) -> None:
        """Start to copy the bucket to the host, after what fills it. Local."""
        if not self.copies:
            return
        self._stayed = self.stays()
        if not self._stayed:
            self._storage.copy_(self.flat, non_blocking=self._on_gpu)
        if self._on_gpu:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._stream = torch.cuda.current_stream(self.flat.device)
            event.record(self._stream)
            self._event = event

    def is_out(self) -> bool:
        """Whether the storage holds the bucket, or the bucket that stays its contents. Local."""
        return self._event is None or bool(self._event.query())  # type: ignore[no-untyped-call]

    def bring_in(self) -> None:
        """Start to copy the result to the bucket. Local."""
        if self._stayed:
            return
        if self._stream is not None:
            with torch.cuda.stream(self._stream):
                self.flat.copy_(self._storage, non_blocking=True)
        elif self.copies:
            self.flat.copy_(self._storage)

    def order(self) -> None:
        """Let what is enqueued from here on see the result. Local."""
        if self._stream is not None:
            torch.cuda.current_stream(self.flat.device).wait_stream(self._stream)
