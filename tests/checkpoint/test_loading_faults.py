"""What a rank gets back of a state that ranks did not have alike, and mistakes that all ranks must see."""

from __future__ import annotations

import copy
import logging
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from hpcpar.checkpoint import PerRank, export, load, loading, reading, save
from hpcpar.errors import CheckpointError
from tests.checkpoint.thread_ranks import on_ranks, save_on_ranks

pytestmark = pytest.mark.local


def trained_adam(parameters: int, value: float) -> torch.optim.Optimizer:
    """After one step, with a state for each parameter."""
    made = [torch.nn.Parameter(torch.full((3,), value)) for _ in range(parameters)]
    optimizer = torch.optim.Adam(made)
    sum(parameter.square().sum() for parameter in made).backward()  # type: ignore[union-attr]
    optimizer.step()
    return optimizer


def new_adam(parameters: int) -> torch.optim.Optimizer:
    return torch.optim.Adam([torch.nn.Parameter(torch.zeros(3)) for _ in range(parameters)])


# ---- what belongs to which rank ----------------------------------------------------------------------------


def test_objects_get_no_keys_of_other_ranks(tmp_path: Path) -> None:
    saved = [trained_adam(2, 1.0), trained_adam(4, 1.0)]
    assert save_on_ranks(tmp_path, *({"o": optimizer} for optimizer in saved)) == [None, None]

    def load_own(ranks: Any) -> Any:
        optimizer = new_adam(len(saved[ranks.rank].state))
        load(tmp_path, {"o": optimizer}, ranks)
        return optimizer.state_dict()["state"]

    for rank, state in enumerate(on_ranks(2, load_own)):
        expected = saved[rank].state_dict()["state"]
        assert list(state) == list(expected)
        assert all(torch.equal(state[n]["exp_avg"], expected[n]["exp_avg"]) for n in expected)


@pytest.mark.parametrize("template", [None, {"d": None}, {"d": {}}, {}])
def test_whole_dicts_have_the_keys_of_the_rank_or_of_all_ranks_on_another_number(
    template: Any, tmp_path: Path
) -> None:
    save_on_ranks(tmp_path, {"d": {"a": 1, "b": 2}}, {"d": {"c": 3, "b": 2}}, {"d": {}})

    def load_all(ranks: Any) -> Any:
        return load(tmp_path, copy.deepcopy(template), ranks)["d"]

    assert on_ranks(3, load_all) == [{"a": 1, "b": 2}, {"b": 2, "c": 3}, {}]
    for size in (1, 2, 4):
        assert on_ranks(size, load_all) == [{"a": 1, "b": 2, "c": 3}] * size


def test_keys_that_are_asked_for_come_from_whoever_had_them(tmp_path: Path) -> None:
    save_on_ranks(tmp_path, {"d": {"a": 1}, "rest": {"x": 5}}, {"d": {"b": 2}})
    loaded = on_ranks(2, lambda ranks: load(tmp_path, {"d": {"a": 0, "b": 0}, "rest": None}, ranks))
    assert loaded == [{"d": {"a": 1, "b": 2}, "rest": {"x": 5}}] * 2


def test_object_of_a_rank_keeps_its_state_where_none_was_saved(tmp_path: Path) -> None:
    save_on_ranks(tmp_path, {"o": PerRank(trained_adam(1, 1.0))}, {"o": PerRank(trained_adam(1, 2.0))})

    def load_own(ranks: Any) -> Any:
        optimizer = new_adam(1)
        load(tmp_path, {"o": PerRank(optimizer)}, ranks)
        return [float(state["exp_avg"][0]) for state in optimizer.state.values()]

    assert on_ranks(3, load_own) == [[pytest.approx(0.2)], [pytest.approx(0.4)], []]


def test_process_of_a_job_has_its_rank_there_by_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_on_ranks(tmp_path, {"who": PerRank(0)}, {"who": PerRank(1)})
    assert load(tmp_path) == {"who": 0}
    job = threading.local()
    monkeypatch.setattr(loading, "ranks_of", lambda comm: job.ranks)

    def load_by_default(ranks: Any) -> Any:
        job.ranks = ranks
        return load(tmp_path)

    assert on_ranks(2, load_by_default) == [{"who": 0}, {"who": 1}]


# ---- mistakes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keys", [(1, True), (0, 0.0), (False, 0)])
def test_keys_that_are_equal_to_python_are_refused_on_all_ranks(
    keys: tuple[Any, Any], tmp_path: Path
) -> None:
    errors = save_on_ranks(tmp_path / "run", *({"t": {key: "x"}} for key in keys))
    assert all(isinstance(error, CheckpointError) for error in errors)
    assert len({str(error) for error in errors}) == 1
    assert f"keys of state['t'] must be of one type on all ranks, got {keys[0]!r}" in str(errors[0])


def test_ranks_that_mean_other_paths_get_the_same_error(tmp_path: Path) -> None:
    for name in "ab":
        save_on_ranks(tmp_path / name, {"x": name}, {"x": name})
    errors = on_ranks(2, lambda ranks: load(tmp_path / "ab"[ranks.rank], None, ranks))
    assert len({str(error) for error in errors}) == 1 and "same on all ranks" in str(errors[0])
    assert f"{tmp_path / 'b'}' on rank 1" in str(errors[1])


def test_empty_path_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for use in (lambda: save("", {"x": 1}), lambda: load("")):
        with pytest.raises(CheckpointError, match="path must be the folder of a checkpoint, got ''"):
            use()
    assert not list(tmp_path.iterdir())


def test_values_that_differ_without_a_mark_are_named_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "hpcpar.checkpoint"):
        for _ in range(3):
            save_on_ranks(tmp_path, *({"named": r, "ok": PerRank(r), "same": 1} for r in range(2)))
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 1 and "state['named']" in messages[0] and "PerRank" in messages[0]
    assert "ok" not in messages[0] and "same" not in messages[0]


def test_uninitialised_parameters_are_named(tmp_path: Path) -> None:
    lazy = torch.nn.LazyLinear(3)
    with pytest.raises(CheckpointError, match=r"state\['m'\]\['weight'\] must have a shape"):
        save(tmp_path / "run", {"m": lazy})
    save(tmp_path / "run", {"w": torch.ones(3, 4)})
    with pytest.raises(CheckpointError, match=r"state\['w'\] must have a shape"):
        load(tmp_path / "run", {"w": lazy.weight})


@pytest.mark.parametrize(
    "unfit", [torch.zeros(3, 1).expand(3, 4), torch.zeros(3, 4, device="meta"), torch.zeros(3, 4).to_sparse()]
)
def test_tensors_that_cannot_be_filled_are_found_before_others_are(
    unfit: torch.Tensor, tmp_path: Path
) -> None:
    save(tmp_path / "run", {"a": torch.ones(2), "x": torch.ones(3, 4), "n": 1})
    template = {"a": torch.zeros(2), "x": unfit, "n": 0}
    with pytest.raises(CheckpointError, match=r"state\['x'\] must"):
        load(tmp_path / "run", template)
    assert template["a"].tolist() == [0, 0] and template["n"] == 0


def test_few_files_of_many_ranks_are_open_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states = [{f"w{r}": torch.full((5,), r), "mine": PerRank(torch.tensor(r))} for r in range(6)]
    save_on_ranks(tmp_path, *states)
    opened: list[Any] = []

    class Counted(reading.DataReader):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            opened.append(self)
            assert len(opened) <= 2

        def close(self) -> None:
            super().close()
            opened.remove(self)

    monkeypatch.setattr(reading, "DataReader", Counted)
    monkeypatch.setattr(reading, "_MOST_OPEN", 2)
    loaded = load(tmp_path, strict=False)
    assert all(torch.equal(loaded[f"w{r}"], states[r][f"w{r}"]) for r in range(6))
    assert not opened


# ---- export ------------------------------------------------------------------------------------------------


def test_export_leaves_nothing_out_in_silence(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    target = tmp_path / "out.safetensors"
    model = {"w": torch.ones(2)}
    save_on_ranks(tmp_path / "a", *({**model, "mean": torch.full((2,), r)} for r in range(2)))
    with pytest.raises(CheckpointError, match=r"same on all ranks, got different ones for mean.*skip"):
        export(tmp_path / "a", target)
    assert not target.exists()
    assert export(tmp_path / "a", target, skip_per_rank=True) == ["w"]
    save_on_ranks(tmp_path / "b", *({**model, "rng": PerRank(torch.tensor(r))} for r in range(2)))
    caplog.clear()
    assert export(tmp_path / "b", target) == list(safetensors.load_file(target)) == ["w"]
    assert "single ranks: rng" in caplog.text


@pytest.mark.parametrize("keys", [("a.b", "a"), (1, "1")])
def test_export_refuses_two_tensors_of_one_name(keys: tuple[Any, Any], tmp_path: Path) -> None:
    pytest.importorskip("safetensors.torch")
    nested = {"b": torch.zeros(1)} if keys[1] == "a" else torch.zeros(1)
    save(tmp_path / "run", {keys[0]: torch.ones(1), keys[1]: nested})
    with pytest.raises(CheckpointError, match="names of exported tensors must be unique"):
        export(tmp_path / "run", tmp_path / "out.safetensors")
