"""The examples as a user runs them: the curve of one process on 2 and 4 ranks; mistakes that end the job."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.examples.idx_files import idx_bytes, write_set
from tests.launching import Launched, LaunchResult, launch

pytestmark = pytest.mark.one_mpi("openmpi")

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
# 150 is no multiple of 7, 7 is odd, and 3 is less than 4: short last batches, unequal and empty slices.
DIGITS = ["--limit", "150", "--epochs", "2", "--batch-size", "7", "--no-plot"]
MODEL = ["--layers", "2", "--width", "16", "--heads", "2", "--context", "16"]
TEXT = [*MODEL, "--limit", "20000", "--steps", "12", "--batch-size", "3", "--warmup", "2"]
TEXT += ["--eval-every", "4", "--eval-windows", "9", "--clip", "0", "--no-plot"]
EXPERTS = ["--experts", "5", "--capacity-factor", "1.5", "--clip", "0.5"]
SERVED = ["--layers", "1", "--width", "16", "--heads", "2", "--context", "16", "--limit", "50000"]
SERVED += ["--batch-size", "5", "--report-every", "10"]
MODES = {
    "plain": [],
    "blocking": ["--blocking"],
    "overlap": ["--forward-overlap"],
    "sharded": ["--optimizer", "sharded"],
}


def run(example: str, ranks: int, *arguments: str) -> LaunchResult:
    result = launch(ranks, EXAMPLES / example, *arguments, timeout_s=55.0)
    assert not result.timed_out, result.stderr
    return result


def history(example: str, ranks: int, output: Path, *arguments: str) -> dict[str, Any]:
    result = run(example, ranks, *arguments, "--output", str(output))
    assert result.returncode == 0, result.stderr
    content: dict[str, Any] = json.loads((output / "history.json").read_text())
    assert content["world_size"] == ranks
    return content


def losses(rows: list[dict[str, Any]]) -> list[float]:
    return [row[name] for row in rows for name in row if name.endswith(("loss", "accuracy"))]


@pytest.fixture(scope="module")
def digits_reference(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The curve of one process."""
    return losses(history("train_digits.py", 1, tmp_path_factory.mktemp("digits"), *DIGITS)["epochs"])


@pytest.fixture(scope="module")
def text_reference(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The curve of one process."""
    return losses(history("train_text.py", 1, tmp_path_factory.mktemp("text"), *TEXT)["evaluations"])


@pytest.mark.parametrize(
    ("mode", "ranks"),
    [("plain", 2), ("plain", 4), ("blocking", 2), ("overlap", 1), ("overlap", 4), ("sharded", 4)],
)
def test_digits_learn_as_in_one_process(
    digits_reference: list[float], tmp_path: Path, mode: str, ranks: int
) -> None:
    epochs = history("train_digits.py", ranks, tmp_path, *DIGITS, *MODES[mode])["epochs"]
    assert losses(epochs) == pytest.approx(digits_reference, rel=1e-3)


def test_digits_go_on_with_another_number_of_ranks(digits_reference: list[float], tmp_path: Path) -> None:
    arguments = [*DIGITS, "--optimizer", "sharded"]
    arguments += ["--checkpoints", str(tmp_path / "run"), "--step-delay", "0.02"]
    with Launched(2, EXAMPLES / "train_digits.py", *arguments) as job:
        job.wait_for_output("epoch   1")
        job.signal_rank(1, signal.SIGUSR1)  # in the middle of the second epoch
        stopped = job.wait()
    assert "another rank says so (rank 0 of 2)" in stopped.stdout
    assert stopped.returncode == 75
    (checkpoint,) = (tmp_path / "run").iterdir()
    assert 22 < int(checkpoint.name.removeprefix("step-")) < 44
    content = history("train_digits.py", 3, tmp_path, *arguments)
    assert [row["epoch"] for row in content["epochs"]] == [1, 2]
    assert losses(content["epochs"]) == pytest.approx(digits_reference, rel=1e-3)
    assert len(set(content["checksums"])) == 1
    again = run("train_digits.py", 1, *arguments, "--output", str(tmp_path))  # nothing is left to do
    assert "after 2 epochs" in again.stdout and again.returncode == 0


def test_nodes_train_by_themselves_and_end_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPCPAR_RANKS_PER_NODE", "1")
    arguments = ["--optimizer", "daso", "--warmup-epochs", "1", "--cooldown-epochs", "0"]
    content = history("train_digits.py", 2, tmp_path, *DIGITS, *arguments)
    first, last = content["epochs"]
    assert (first["note"], last["note"]) == ("warm-up", "cycling, parameters averaged every 4 steps")
    assert last["train_loss"] < first["train_loss"]
    assert len(set(content["checksums"])) == 1


def test_slow_rank_contributes_what_it_can(tmp_path: Path) -> None:
    arguments = ["--optimizer", "collaborative", "--slow", "0:6", "--micro-batch-size", "2", "--plot"]
    content = history("train_digits.py", 2, tmp_path, *DIGITS, *arguments)
    first, last = content["epochs"]
    assert last["train_loss"] < first["train_loss"]
    assert len(set(content["checksums"])) == 1
    samples = np.array(content["samples_per_rank"])
    assert samples.shape == (2, 2 * 22)
    assert samples.sum(axis=0).min() >= 7
    assert samples[0].sum() < samples[1].sum()
    assert (tmp_path / "samples_per_rank.png").stat().st_size > 1000


@pytest.mark.parametrize(("mode", "ranks"), [("plain", 2), ("plain", 4), ("overlap", 4)])
def test_text_is_learnt_as_in_one_process(
    text_reference: list[float], tmp_path: Path, mode: str, ranks: int
) -> None:
    evaluations = history("train_text.py", ranks, tmp_path, *TEXT, *MODES[mode])["evaluations"]
    assert losses(evaluations) == pytest.approx(text_reference, rel=1e-3)


@pytest.mark.parametrize(
    ("ranks", "arguments"),
    [
        (2, ["--pipeline", "2"]),
        (
            2,
            [
                "--pipeline",
                "2",
                "--schedule",
                "zero_bubble",
                "--reuse",
                "replicate",
                "--checkpoint",
                "always",
            ],
        ),
        (4, ["--pipeline", "2", "--schedule", "interleaved", "--chunks", "2"]),
    ],
)
def test_text_is_learnt_over_a_pipeline(
    text_reference: list[float], tmp_path: Path, ranks: int, arguments: list[str]
) -> None:
    # Three windows in eight microbatches: most of them are empty, and with two replicas one has one window.
    evaluations = history("train_text.py", ranks, tmp_path, *TEXT, *arguments)["evaluations"]
    assert losses(evaluations) == pytest.approx(text_reference, rel=1e-3)


def test_trace_is_a_timeline_and_a_picture_of_it(tmp_path: Path) -> None:
    trace = tmp_path / "step.json"
    arguments = ["--pipeline", "2", "--schedule", "zero_bubble", "--microbatches", "2", "--trace", str(trace)]
    result = run("train_text.py", 2, *TEXT, *arguments, "--output", str(tmp_path))
    assert result.returncode == 0, result.stderr
    events = json.loads(trace.read_text())["traceEvents"]
    names = {event["name"] for event in events}
    assert {"0F0", "1F1", "1I0", "1W1", "0W0"} <= names
    assert trace.with_suffix(".png").stat().st_size > 1000


def test_clipping_is_the_same_on_every_number_of_ranks(text_reference: list[float], tmp_path: Path) -> None:
    # Adam undoes a constant factor of the gradient unless its elements are as small as its epsilon.
    curves = [
        losses(history("train_text.py", ranks, tmp_path / str(ranks), *TEXT, "--clip", "1e-6")["evaluations"])
        for ranks in (1, 2)
    ]
    assert curves[1] == pytest.approx(curves[0], rel=1e-3)
    assert curves[0] != pytest.approx(text_reference, rel=1e-3)


@pytest.fixture(scope="module")
def experts_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with experts in one process, saved at each evaluation."""
    folder = tmp_path_factory.mktemp("experts")
    history("train_text.py", 1, folder, *TEXT, *EXPERTS, "--save", str(folder))
    return folder


def losses_of_experts(run: Path) -> list[float]:
    return losses(json.loads((run / "history.json").read_text())["evaluations"])


def test_experts_learn_as_in_one_process(experts_run: Path, tmp_path: Path) -> None:
    arguments = [*TEXT, *EXPERTS, "--plot", "--sample", "5"]
    content = history("train_text.py", 2, tmp_path, *arguments)
    assert losses(content["evaluations"]) == pytest.approx(losses_of_experts(experts_run), rel=1e-3)
    rows, expected = (np.load(path / "expert_load.npz")["rows"] for path in (tmp_path, experts_run))
    assert rows.shape == (1, 5, 12)
    assert rows.sum(axis=1).tolist() == expected.sum(axis=1).tolist()
    assert (tmp_path / "expert_load.png").stat().st_size > 1000


def test_experts_go_on_with_another_number_of_ranks(experts_run: Path, tmp_path: Path) -> None:
    arguments = [*TEXT, *EXPERTS, "--resume", str(experts_run / "step-8")]
    content = history("train_text.py", 3, tmp_path, *arguments)
    assert [row["step"] for row in content["evaluations"]] == [12]
    assert losses(content["evaluations"]) == pytest.approx(losses_of_experts(experts_run)[-2:], rel=1e-3)


def test_experts_learn_over_a_pipeline(experts_run: Path, tmp_path: Path) -> None:
    # One microbatch, so that gates have the statistics of the whole batch, and capacity is of it.
    arguments = [*TEXT, *EXPERTS, "--pipeline", "2", "--microbatches", "1", "--sample", "5"]
    content = history("train_text.py", 4, tmp_path, *arguments)
    assert losses(content["evaluations"]) == pytest.approx(losses_of_experts(experts_run), rel=1e-3)
    rows, expected = (np.load(path / "expert_load.npz")["rows"] for path in (tmp_path, experts_run))
    assert rows.sum(axis=1).tolist() == expected.sum(axis=1).tolist()


@pytest.mark.parametrize(("ranks", "arguments"), [(1, []), (3, ["--switch", "--samples-per-update", "20"])])
def test_text_is_learnt_through_served_experts(tmp_path: Path, ranks: int, arguments: list[str]) -> None:
    content = history("serve_experts.py", ranks, tmp_path, *SERVED, "--steps", "20", "--no-plot", *arguments)
    first, last = (row["loss"] for row in content["reports"])
    assert last < first - 0.2
    choices = (1 if arguments else 2) * 5 * 16
    rows = np.load(tmp_path / "expert_load.npz")["rows"]
    assert rows.sum(axis=(0, 1)).tolist() == [choices] * 20
    assert sum(expert["examples"] for expert in content["experts"]) == 20 * choices
    assert {expert["rank"] for expert in content["experts"]} == {ranks - 1}


def test_slow_expert_is_left_out(tmp_path: Path) -> None:
    arguments = ["--slow-expert", "0.6", "--forward-timeout", "0.2", "--servers", "2", "--steps", "2"]
    content = history("serve_experts.py", 3, tmp_path, *SERVED, *arguments, "--no-plot")
    assert "block0.1.3" in content["left_out"]
    updates = {expert["uid"]: expert["updates"] for expert in content["experts"]}
    assert updates["block0.1.3"] == 0
    assert sum(updates.values()) > 0


def test_digits_write_one_line_per_epoch_and_a_picture(tmp_path: Path) -> None:
    result = run("train_digits.py", 2, "--limit", "60", "--epochs", "2", "--output", str(tmp_path))
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert [line.split()[:2] for line in lines[:2]] == [["epoch", "1"], ["epoch", "2"]]
    assert lines[2].startswith("final test accuracy")
    assert lines[-1].endswith("curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_text_prints_a_sample_of_the_bytes_asked_for(tmp_path: Path) -> None:
    result = run("train_text.py", 2, *TEXT, "--sample", "25", "--bf16", "--output", str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("--- sample") == 1


def test_digits_read_a_folder_of_idx_files(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 6, 6))
    write_set(tmp_path, "train", pixels, np.arange(20) % 3)
    write_set(tmp_path, "t10k", pixels, np.arange(20) % 3)
    arguments = ["--data", str(tmp_path), "--epochs", "1", "--no-plot"]
    assert len(history("train_digits.py", 2, tmp_path / "out", *arguments)["epochs"]) == 1


@pytest.mark.parametrize(
    ("example", "arguments", "message"),
    [
        ("train_digits.py", ["--data", "nowhere"], "nowhere is not a folder"),
        ("train_digits.py", ["--epochs", "0"], "must be at least 1, got 0"),
        ("train_text.py", ["--text", "nowhere"], "no such folder"),
        ("train_text.py", ["--limit", "100"], "too short"),
        ("train_text.py", ["--heads", "3"], "--heads 3 must divide --width 128"),
        ("train_text.py", ["--pipeline", "3"], "--pipeline 3 and --data-parallel 1 need 3 ranks, got 2"),
        ("train_text.py", ["--trace", "x.json"], "--trace shows the stages of a pipeline"),
        ("train_text.py", ["--resume", "nowhere"], "--resume nowhere: no such folder"),
        ("serve_experts.py", ["--servers", "2"], "--servers 2 leaves no client of 2 rank(s)"),
    ],
)
def test_mistake_ends_all_ranks_with_one_message(example: str, arguments: list[str], message: str) -> None:
    result = run(example, 2, *arguments)
    assert result.returncode != 0
    assert result.stderr.count(message) == 1
    assert "Traceback" not in result.stderr
    assert result.duration_s < 60


def test_damaged_idx_file_is_named_once(tmp_path: Path) -> None:
    images = np.zeros((4, 3, 3))
    write_set(tmp_path, "train", images, np.zeros(4))
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx_bytes(images)[:-1])
    result = run("train_digits.py", 2, "--data", str(tmp_path))
    assert result.returncode != 0
    assert result.stderr.count("train-images-idx3-ubyte: truncated") == 1
