"""What a rank has reported reaches the launcher before the job is ended."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hpcpar.comm.watchdog import wait_for_readers

pytestmark = pytest.mark.local

REPORT = b"rank 1 failed\n" * 100


@contextmanager
def reported() -> Iterator[int]:
    """Standard error is a pipe with a report in it; yields its reading end."""
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as stream, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stderr", stream)
        os.write(writer, REPORT)
        yield reader
    os.close(reader)


def test_report_is_read_before_the_job_ends() -> None:
    def read_late() -> None:
        time.sleep(0.1)
        read_since.set()
        os.read(reader, 2 * len(REPORT))

    read_since = threading.Event()
    with reported() as reader:
        launcher = threading.Thread(target=read_late)
        launcher.start()
        wait_for_readers()
        assert read_since.is_set()
        launcher.join()


def test_launcher_that_does_not_read_is_not_waited_for_long() -> None:
    """It ends by itself: the test's time limit is the check."""
    with reported() as reader:
        wait_for_readers()
        assert os.read(reader, 2 * len(REPORT)) == REPORT


def test_standard_error_may_be_a_file_or_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "log").open("w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        stream.write("rank 1 failed")
        wait_for_readers()
    wait_for_readers()
    monkeypatch.setattr(sys, "stderr", None)
    wait_for_readers()
