"""Shares, the stream and the options of the text example's `--xla`; whole runs are in tests/launched."""

from __future__ import annotations

import sys

import pytest
import torch

import common
import hpcpar
import text_corpus
import train_text
import xla_trainer
from trainer import Options

pytestmark = pytest.mark.local

TEXT = torch.arange(1000, dtype=torch.int64).to(torch.uint8)


def parse(*arguments: str) -> Options:
    return Options(**vars(train_text.build_parser().parse_args(["--xla", *arguments])))


@pytest.mark.parametrize("devices", [[1], [2, 2], [4, 1, 3]])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_shares_make_up_the_batch(devices: list[int], accumulate: int) -> None:
    batch_size = 2 * sum(devices) * accumulate
    options = parse("--batch-size", str(batch_size), "--accumulate", str(accumulate))
    shares = [xla_trainer.share_batch(options, devices, rank) for rank in range(len(devices))]
    assert {share.batch_size_per_device for share in shares} == {2}
    assert [index for share in shares for index in range(batch_size)[share.windows]] == [*range(batch_size)]
    lengths = [len(range(batch_size)[share.windows]) for share in shares]
    assert lengths == [2 * count * accumulate for count in devices]


@pytest.mark.parametrize(("batch_size", "accumulate", "passes"), [(6, 1, 4), (2, 1, 4), (12, 2, 8)])
def test_batch_that_cannot_be_cut_is_a_mistake(batch_size: int, accumulate: int, passes: int) -> None:
    options = parse("--batch-size", str(batch_size), "--accumulate", str(accumulate))
    with pytest.raises(common.UserError, match=f"--batch-size {batch_size} must be a multiple of {passes}"):
        xla_trainer.share_batch(options, [2, 2], 0)


def test_stream_has_the_windows_of_one_step_after_the_other() -> None:
    options = parse("--steps", "5", "--batch-size", "4", "--context", "16")
    stream = xla_trainer.WindowStream(TEXT, options, slice(2, 4), first_step=3)
    offsets = [text_corpus.windows_of_step(0, step, 4, 1000, 16)[2:4] for step in (3, 4)]
    expected = [text_corpus.cut_windows(TEXT, each, 16) for each in offsets]
    inputs, targets = (torch.stack(column) for column in zip(*stream, strict=True))
    assert torch.equal(inputs, torch.cat([each for each, _ in expected]))
    assert torch.equal(targets, torch.cat([each for _, each in expected]))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--pipeline", "2"], "--pipeline"),
        (["--experts", "4"], "--experts"),
        (["--forward-overlap"], "--forward-overlap"),
        (["--blocking", "--bf16"], "--blocking, --bf16"),
        (["--device", "cuda"], "--device cuda"),
    ],
)
def test_options_that_do_not_go_together_are_named(arguments: list[str], named: str) -> None:
    with pytest.raises(common.UserError, match=f"leave {named} out"):
        xla_trainer.check_options(parse(*arguments))


def test_missing_torch_xla_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "torch_xla"]:
        monkeypatch.delitem(sys.modules, name)
    for name in [name for name in sys.modules if name.startswith("hpcpar.xla")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(vars(hpcpar), "xla", raising=False)
    monkeypatch.setitem(sys.modules, "torch_xla", None)
    with pytest.raises(common.UserError, match=r"pip install 'hpcpar\[xla\]'") as caught:
        xla_trainer.check_options(parse())
    assert "\n" not in str(caught.value)
