"""One process saves and loads: every kind of value, templates, objects, random numbers, series."""

from __future__ import annotations

import enum
import logging
import math
import random
import subprocess
import sys
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from hpcpar.checkpoint import PerRank, export, info, latest, load, load_rng_state, rng_state, save, verify
from hpcpar.errors import CheckpointError

pytestmark = pytest.mark.local

DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32,
    torch.uint64, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64,
    torch.complex128, torch.float8_e4m3fn, torch.float8_e5m2,
]  # fmt: skip

VALUES = {
    "none": None,
    "flags": (True, False),
    "numbers": [1, -(2**62), 2**63, -(2**90), 10**5000, 2.5, math.inf, -math.inf, 1e-310, -0.0],
    "complex": [1 - 2j, complex(math.inf, 0.0)],
    "text": "größer\x00\n",
    "bytes": [b"", b"\x00\xff", b"x" * 100_000],
    0: {"lr": 0.1, 1.5: (), True + 1: [], None: {}},
    "torch": [torch.float16, torch.Size([2, 3]), torch.device("cpu")],
    "ordered": OrderedDict(b=1, a=2),
    "milestones": Counter({30: 1, 80: 2}),
}


def bits(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def same(a: Any, b: Any) -> bool:
    """Equal, in all nested places, types included."""
    if isinstance(a, torch.Tensor):
        return (
            isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape and bits(a) == bits(b)
        )
    if isinstance(a, dict):
        return type(a) is type(b) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or a != a)


# ---- values ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asynchronous", [False, True])
def test_values_come_back_as_they_were(asynchronous: bool, tmp_path: Path) -> None:
    saving = save(tmp_path / "new" / "run", VALUES, asynchronous=asynchronous)
    assert saving.wait() == tmp_path / "new" / "run"
    assert saving.done
    assert same(load(tmp_path / "new" / "run"), VALUES)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_tensors_of_every_dtype_and_form_come_back_bit_for_bit(asynchronous: bool, tmp_path: Path) -> None:
    state: dict[str, Any] = {}
    for dtype in DTYPES:
        whole = (torch.randn(6, 4) * 3).to(dtype) if not dtype.is_complex else torch.randn(6, 4, dtype=dtype)
        forms = {
            "whole": whole,
            "0-d": whole[1, 2],
            "empty": whole[:0],
            "transposed": whole.T,
            "view": whole[1::2],
        }
        state[str(dtype)] = {**forms, "expanded": whole[:1].expand(3, 4)}
    state["conjugate"] = torch.randn(3, dtype=torch.complex64).conj()
    state["parameter"] = torch.nn.Parameter(torch.randn(2))
    save(tmp_path / "run", state, asynchronous=asynchronous).wait()
    state["parameter"] = state["parameter"].detach()
    loaded = load(tmp_path / "run")
    assert same(loaded, state)


def test_arrays_and_numpy_scalars_come_back(tmp_path: Path) -> None:
    arrays = [np.arange(6, dtype=dtype).reshape(2, 3) for dtype in ("<f4", ">f8", "<i2", "<c16", "<f2")]
    arrays += [
        np.array(["ab", "ü"]),
        np.array("2024-05-01", dtype="M8[D]"),
        np.ones((2, 0)),
        np.arange(9)[::2],
    ]
    scalars = [np.float32(1.5), np.int64(-3), np.bool_(True), np.str_("text")]
    save(tmp_path / "run", {"arrays": arrays, "scalars": scalars})
    loaded = load(tmp_path / "run")
    for saved, found in zip([*arrays, *scalars], [*loaded["arrays"], *loaded["scalars"]], strict=True):
        assert type(saved) is type(found) and saved.dtype == found.dtype and np.array_equal(saved, found)


def test_tensor_with_two_names_is_written_once(tmp_path: Path) -> None:
    weight = torch.randn(500, 500)
    save(tmp_path / "run", {"a": weight, "b": [weight]})
    assert info(tmp_path / "run").nbytes < 1.5 * weight.nbytes
    loaded = load(tmp_path / "run")
    assert torch.equal(loaded["a"], weight) and torch.equal(loaded["b"][0], weight)


def test_leaves_of_several_slices_come_back(tmp_path: Path) -> None:
    state = [torch.randn(3_000_001), torch.randint(0, 255, (5_000_003,), dtype=torch.uint8)]
    save(tmp_path / "run", state)
    assert same(load(tmp_path / "run"), state)


class Color(enum.IntEnum):
    RED = 1


class Broken:
    def state_dict(self) -> dict[str, Any]:
        raise RuntimeError("no state today")


def itself() -> list[Any]:
    ring: list[Any] = []
    ring.append(ring)
    return ring


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (object(), r"state\['a'\]\[1\] must be made of.*object"),
        ({1, 2}, "set"),
        ({(1, 2): 3}, "a key of"),
        (Color.RED, "enum"),
        (torch.eye(2).to_sparse(), "dense"),
        (torch.empty(2, device="meta"), "contents"),
        (np.array([object()]), "numbers or strings"),
        (PerRank(PerRank(1)), "PerRank inside"),
        (Broken(), "no state today"),
        (itself(), "contain itself"),
        ("\ud800", "Unicode"),
    ],
    ids=str,
)
def test_what_cannot_be_saved_is_named_and_leaves_nothing(value: Any, named: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=named):
        save(tmp_path / "run", {"a": [1, value]})
    assert list(tmp_path.iterdir()) == []


# ---- templates ---------------------------------------------------------------------------------------------


def test_template_is_filled_in_place(tmp_path: Path) -> None:
    saved = {
        "w": torch.randn(3, 4),
        "t": (torch.ones(2), 5),
        "l": [1, {"x": 2}],
        "array": np.arange(3),
        "more": 1,
    }
    save(tmp_path / "run", saved)
    weight, inner, array = torch.zeros(4, 3).T, torch.zeros(2), np.zeros(3, dtype=np.int64)
    template = {"w": weight, "t": (inner, 0), "l": [0, {"x": 0}], "array": array}
    version = weight._version
    assert load(tmp_path / "run", template) is template
    assert template["w"] is weight and torch.equal(weight, saved["w"]) and weight._version > version
    assert template["t"][0] is inner and template["t"] == (inner, 5) and inner.tolist() == [1, 1]
    assert template["l"] == [1, {"x": 2}] and template["array"] is array and array.tolist() == [0, 1, 2]
    assert "more" not in template


def test_none_and_empty_containers_of_a_template_take_everything(tmp_path: Path) -> None:
    save(tmp_path / "run", VALUES)
    template: dict[Any, Any] = {"flags": None, 0: {}, "numbers": []}
    load(tmp_path / "run", template)
    assert template == {key: VALUES[key] for key in template}
    empty: dict[Any, Any] = {}
    assert load(tmp_path / "run", empty) is empty
    assert list(empty) == list(VALUES)


def test_misfits_are_named_all_at_once_and_change_nothing(tmp_path: Path) -> None:
    save(
        tmp_path / "run",
        {"a": torch.ones(2), "b": torch.ones(2), "c": {"d": 1}, "e": [1, 2], "ok": torch.ones(1)},
    )
    ok = torch.zeros(1)
    template = {
        "ok": ok,
        "a": torch.zeros(3),
        "b": torch.zeros(2, dtype=torch.bfloat16),
        "c": 1,
        "e": [1],
        "new": 0,
    }
    with pytest.raises(CheckpointError) as error:
        load(tmp_path / "run", template)
    for text in ("state['a']", "[3]", "state['b']", "bfloat16", "state['c']", "state['e']", "state['new']"):
        assert text in str(error.value)
    assert ok.item() == 0


def test_what_is_missing_stays_as_it_is_when_that_is_allowed(tmp_path: Path) -> None:
    save(tmp_path / "run", {"a": 1})
    with pytest.raises(CheckpointError, match=r"no state\['new'\]"):
        load(tmp_path / "run", {"a": 0, "new": 5})
    assert load(tmp_path / "run", {"a": 0, "new": 5}, strict=False) == {"a": 1, "new": 5}


def make_training() -> dict[str, Any]:
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 2))
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 3], gamma=0.5)
    return {"model": net, "optimizer": optimizer, "scheduler": scheduler, "epoch": 0}


def train(state: dict[str, Any], steps: int) -> None:
    for _ in range(steps):
        state["optimizer"].zero_grad()
        state["model"](torch.randn(5, 4)).square().sum().backward()
        state["optimizer"].step()
        state["scheduler"].step()


@pytest.mark.parametrize("asynchronous", [False, True])
def test_training_goes_on_exactly_from_objects(asynchronous: bool, tmp_path: Path) -> None:
    first, second = make_training(), make_training()
    train(first, 2)
    saving = save(
        tmp_path / "run", {**first, "rng": PerRank(rng_state()), "epoch": 7}, asynchronous=asynchronous
    )
    train(first, 3)  # the snapshot must not see this
    saving.wait()
    template = {**second, "rng": PerRank(None)}
    load(tmp_path / "run", template)
    assert template["epoch"] == 7 and template["model"] is second["model"]
    load_rng_state(template["rng"])
    train(second, 3)
    for a, b in zip(first["model"].state_dict().values(), second["model"].state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert first["scheduler"].get_last_lr() == second["scheduler"].get_last_lr()


def test_state_that_does_not_fit_its_object_is_named(tmp_path: Path) -> None:
    save(tmp_path / "run", {"model": torch.nn.Linear(2, 3)})
    with pytest.raises(CheckpointError, match=r"(?s)state\['model'\] must fit its Linear.*size mismatch"):
        load(tmp_path / "run", {"model": torch.nn.Linear(3, 3)})


def test_random_numbers_go_on() -> None:
    def draw() -> list[Any]:
        return [
            random.random(),
            random.gauss(0, 1),
            np.random.rand(),  # noqa: NPY002 - the generator that is saved
            np.random.randn(),  # noqa: NPY002
            torch.rand(()).item(),
        ]

    draw()
    state = rng_state()
    expected = draw()
    load_rng_state(state)
    assert draw() == expected
    load_rng_state(None)
    with pytest.raises(CheckpointError, match="rng_state"):
        load_rng_state({"python": 1})


# ---- saves in the background -------------------------------------------------------------------------------


def test_next_save_waits_for_the_one_before_and_raises_its_error(tmp_path: Path, caplog: Any) -> None:
    caplog.set_level(logging.CRITICAL)
    state = {"x": torch.randn(100_000)}
    first = save(tmp_path / "a", state, asynchronous=True)
    save(tmp_path / "b", state)
    assert first.done
    broken = save(tmp_path / "c", state, asynchronous=True, keep=None)
    broken._thread.join()  # type: ignore[union-attr]
    broken._error = CheckpointError("the disk is full")
    with pytest.raises(CheckpointError, match="disk is full"):
        save(tmp_path / "d", state)
    assert not (tmp_path / "d").exists()
    assert same(load(save(tmp_path / "d", state).wait()), state)


def test_error_in_the_background_is_raised_by_each_wait_and_then_forgotten(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    saving = save(tmp_path / "a", {"x": torch.ones(3)}, asynchronous=True)
    saving._thread.join()  # type: ignore[union-attr]
    saving._error = CheckpointError("the disk is full")
    for _ in range(2):
        with pytest.raises(CheckpointError, match="disk is full"):
            saving.wait()
    save(tmp_path / "b", {})


def test_exit_of_the_process_waits_for_a_save(tmp_path: Path) -> None:
    script = (
        "import sys, torch; from hpcpar.checkpoint import data_file, save\n"
        "data_file._SYNC_BYTES = 1 << 20\n"
        "save(sys.argv[1], {'x': torch.arange(20_000_000.0)}, asynchronous=True)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and done.stderr == ""
    assert torch.equal(load(tmp_path / "run")["x"], torch.arange(20_000_000.0))


def test_data_files_are_hdf5(tmp_path: Path) -> None:
    weight = torch.randn(100)
    save(tmp_path / "run", {"w": weight})
    with h5py.File(next((tmp_path / "run").glob("*.h5"))) as file:
        assert file.attrs["format"] == "hpcpar checkpoint data 1" and file.attrs["rank"] == 0
        assert file["data"][:400].tobytes() == weight.numpy().tobytes()


# ---- series ------------------------------------------------------------------------------------------------


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    (tmp_path / "other-1").mkdir()
    (tmp_path / "step-5").mkdir()  # not a checkpoint
    for step in (8, 9, 10, 11):
        save(tmp_path / f"step-{step}", {"step": step}, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other-1", "step-10", "step-11", "step-5"]
    save(tmp_path / "step-3", {"step": 3}, keep=2)  # training has gone back: what was just saved stays
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other-1", "step-11", "step-3", "step-5"]


def test_foreign_files_are_never_removed(tmp_path: Path, caplog: Any) -> None:
    save(tmp_path / "step-1", {"x": torch.ones(3)})
    (tmp_path / "step-1" / "notes.txt").write_text("mine")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "step-0").symlink_to(tmp_path / "elsewhere")
    save(tmp_path / "step-2", {"x": torch.ones(3)}, keep=1)
    assert [path.name for path in (tmp_path / "step-1").iterdir()] == ["notes.txt"]
    assert (tmp_path / "step-0").is_symlink()
    assert "notes.txt" in caplog.text


@pytest.mark.parametrize(("name", "keep"), [("run", 2), ("step-1", 0), ("step-1", True), ("step-1", 1.5)])
def test_keep_that_makes_no_sense_is_refused(name: str, keep: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="keep"):
        save(tmp_path / name, {}, keep=keep)


def test_latest_is_the_newest_whole_one(tmp_path: Path) -> None:
    assert latest(tmp_path / "nothing") is None
    assert latest(tmp_path) is None
    save(tmp_path / "run", {"x": torch.ones(3)})
    assert latest(tmp_path) == tmp_path / "run"
    for step in (9, 100, 20):
        save(tmp_path / f"step-{step}", {"x": torch.ones(3)})
    assert latest(tmp_path) == tmp_path / "step-20"  # training has gone back
    next((tmp_path / "step-20").glob("*.h5")).unlink()
    assert latest(tmp_path) == tmp_path / "step-100"
    (tmp_path / "step-100" / "manifest.json").write_text("{}")
    assert latest(tmp_path) == tmp_path / "step-9"


# ---- looking -----------------------------------------------------------------------------------------------


def test_info_lists_what_is_saved(tmp_path: Path) -> None:
    save(tmp_path / "run", {"model": {"w": torch.ones(2, 3)}, "lr": 0.1, "mine": PerRank([1])})
    found = info(tmp_path / "run")
    assert [entry.name for entry in found.entries] == ["model.w", "lr", "mine.0"]
    weight, rate, mine = found.entries
    assert (weight.dtype, weight.shape, weight.nbytes, weight.ranks) == ("float32", (2, 3), 24, ())
    assert (rate.kind, rate.value) == ("float", "0.1") and mine.ranks == (0,)
    assert found.ranks == 1 and found.versions["torch"] == torch.__version__
    assert verify(tmp_path / "run") == found


def test_exported_tensors_are_those_of_safetensors(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    net = torch.nn.Linear(3, 2).bfloat16()
    tied = {"a": net.weight, "b": net.weight}
    save(tmp_path / "run", {"model": net, "tied": tied, "lr": 0.1, "mine": PerRank(torch.ones(1))})
    assert export(tmp_path / "run", tmp_path / "all.safetensors") == [
        "model.weight",
        "model.bias",
        "tied.a",
        "tied.b",
    ]
    export(tmp_path / "run", tmp_path / "model.safetensors", prefix="model.")
    assert same(
        safetensors.load_file(tmp_path / "model.safetensors"),
        dict(sorted(net.state_dict().items())),
    )
    with pytest.raises(CheckpointError, match="nothing"):
        export(tmp_path / "run", tmp_path / "none.safetensors", prefix="nothing")
    with pytest.raises(CheckpointError, match="must be writable"):
        export(tmp_path / "run", tmp_path / "no" / "folder.safetensors")
