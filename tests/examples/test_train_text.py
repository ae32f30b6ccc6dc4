"""Corpus, batches and model of the text example. Whole runs are in tests/launched/test_examples.py."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import common
import gpt
import text_corpus

TINY = gpt.GptConfig(layers=2, width=16, heads=2, context=12)


# ------------------------------------------------------------------------------------------- text


def test_standard_library_is_read_in_the_same_order_each_time() -> None:
    first, second = (text_corpus.read_corpus(None, limit=200_000) for _ in range(2))
    assert len(first) == 200_000
    assert torch.equal(first, second)
    assert b"import" in bytes(first.tolist())


def test_folder_is_read_recursively_without_binary_and_hidden_files(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / "b" / "two.txt").write_text("two")
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "c.bin").write_bytes(b"\0\1\2")
    (tmp_path / ".git" / "d.txt").write_text("hidden")
    assert bytes(text_corpus.read_corpus(tmp_path).tolist()) == b"one\ntwo\n"
    assert bytes(text_corpus.read_corpus(tmp_path / "a.txt").tolist()) == b"one\n"


def test_missing_or_empty_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(common.UserError, match="no text file"):
        text_corpus.read_corpus(tmp_path)
    with pytest.raises(common.UserError, match="no such folder"):
        text_corpus.read_corpus(tmp_path / "nowhere")


def test_split_is_by_position_and_too_short_a_text_is_an_error() -> None:
    corpus = torch.arange(200, dtype=torch.uint8)
    training, validation = text_corpus.split_corpus(corpus, context=19)
    assert (len(training), len(validation)) == (180, 20)
    assert torch.equal(torch.cat([training, validation]), corpus)
    with pytest.raises(common.UserError, match="too short"):
        text_corpus.split_corpus(corpus, context=20)


# ---------------------------------------------------------------------------------------- batches


def test_batch_is_a_function_of_seed_and_step() -> None:
    def batch(seed: int, step: int) -> list[int]:
        return text_corpus.windows_of_step(seed, step, 8, 1000, 32).tolist()

    assert batch(0, 5) == batch(0, 5)
    assert batch(0, 5) != batch(0, 6)
    assert batch(0, 5) != batch(1, 5)


def test_windows_lie_inside_the_text_and_reach_both_its_ends() -> None:
    corpus_bytes, context = 40, 32
    offsets = np.concatenate(
        [text_corpus.windows_of_step(0, step, 16, corpus_bytes, context) for step in range(20)]
    )
    assert (offsets.min(), offsets.max() + context) == (0, corpus_bytes - 1)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_slices_of_ranks_make_up_the_global_batch(world_size: int) -> None:
    offsets = text_corpus.windows_of_step(0, 3, 7, 1000, 32)
    slices = [offsets[common.shard(len(offsets), rank, world_size)] for rank in range(world_size)]
    assert np.concatenate(slices).tolist() == offsets.tolist()


def test_targets_are_the_inputs_one_byte_further() -> None:
    corpus = torch.arange(100, dtype=torch.uint8)
    inputs, targets = text_corpus.cut_windows(corpus, np.array([0, 90]), context=9)
    assert inputs.tolist() == [list(range(9)), list(range(90, 99))]
    assert torch.equal(targets, inputs + 1)


@pytest.mark.parametrize(("corpus_bytes", "expected"), [(33, 1), (65, 2), (10_000, 5)])
def test_validation_windows_do_not_overlap(corpus_bytes: int, expected: int) -> None:
    offsets = text_corpus.spread_windows(5, corpus_bytes, context=32)
    assert len(offsets) == expected
    assert all(np.diff(offsets) >= 32)
    assert offsets[-1] + 32 < corpus_bytes


# ------------------------------------------------------------------------------------------ model


def test_output_depends_on_earlier_bytes_only() -> None:
    net = gpt.Gpt(TINY)
    tokens = torch.randint(0, 256, (2, 12))
    changed = tokens.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 256
    before, after = net(tokens), net(changed)
    torch.testing.assert_close(before[:, :7], after[:, :7])
    assert not torch.allclose(before[:, 7:], after[:, 7:])


@pytest.mark.parametrize("tied", [True, False])
def test_tied_head_shares_the_embedding(tied: bool) -> None:
    net = gpt.Gpt(gpt.GptConfig(layers=1, width=16, heads=2, context=12, tied_head=tied))
    assert (net.head.weight is net.token.weight) == tied


def test_untrained_model_knows_nothing() -> None:
    tokens = torch.randint(0, 256, (8, 13))
    logits = gpt.Gpt(TINY)(tokens[:, :-1])
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    assert loss.item() == pytest.approx(np.log(256), abs=0.1)


def test_empty_slice_of_a_batch_has_zero_gradients() -> None:
    net = gpt.Gpt(TINY)
    net(torch.zeros(0, 12, dtype=torch.int64)).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in net.parameters())


def test_sample_is_repeatable_and_may_exceed_the_context() -> None:
    net = gpt.Gpt(TINY).eval()
    sample = gpt.generate(net, b"\n", 30, seed=1)
    assert len(sample) == 30
    assert sample == gpt.generate(net, b"\n", 30, seed=1)
    assert sample != gpt.generate(net, b"\n", 30, seed=2)
