from __future__ import annotations

import pickle
from itertools import islice
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from hpcpar.data import H5Dataset
from tests.data.files import BOTH, as_rank, images, numbers, write

pytestmark = pytest.mark.local

STORED: dict[str, tuple[int | None, dict[str, Any]]] = {
    "gzip": (4, {"compression": "gzip", "shuffle": True}),
    "lzf with checksums": (7, {"compression": "lzf", "fletcher32": True}),
    "chunks": (1, {}),
    "contiguous": (None, {}),
    "one chunk": (100, {"compression": "gzip"}),
}


# ---- what comes out


@pytest.mark.parametrize("stored", STORED)
def test_every_sample_comes_once_from_every_kind_of_file(tmp_path: Path, stored: str) -> None:
    chunk, options = STORED[stored]
    path = write(tmp_path / "a.h5", 53, chunk, **options)
    for shuffle in (False, True):
        data = H5Dataset(path, BOTH, shuffle=shuffle, block_size=6, window_blocks=2)
        for epoch in range(2):
            data.set_epoch(epoch)
            found = numbers(data)
            assert (sorted(found) if shuffle else found) == list(range(53))
            assert numbers(data.batches(8)) == found
        assert (found == list(range(53))) is not shuffle


@pytest.mark.parametrize(("samples", "ranks"), [(53, 3), (2, 4), (0, 2), (1, 1)])
def test_ranks_share_exactly(tmp_path: Path, samples: int, ranks: int) -> None:
    path = write(tmp_path / "a.h5", samples)
    shares = [
        as_rank(H5Dataset(path, BOTH, shuffle=True, window_blocks=3, block_size=4), r, ranks)
        for r in range(ranks)
    ]
    found = [numbers(share) for share in shares]
    assert [len(own) for own in found] == [len(share) for share in shares]
    assert max(map(len, found)) - min(map(len, found)) <= 1
    assert sorted(n for own in found for n in own) == list(range(samples))
    # The order of an epoch does not depend on the number of ranks.
    alone = H5Dataset(path, BOTH, shuffle=True, window_blocks=3, block_size=4)
    assert [n for own in found for n in own] == numbers(alone)


def test_samples_mix_beyond_their_blocks_and_epochs_differ(tmp_path: Path) -> None:
    data = H5Dataset(write(tmp_path / "a.h5", 400), BOTH, shuffle=True, block_size=8)
    first = numbers(data)
    blocks = [{n // 8 for n in first[at : at + 8]} for at in range(0, 400, 8)]
    assert np.mean([len(block) for block in blocks]) > 2.5
    data.set_epoch(1)
    assert numbers(data) != first
    assert numbers(H5Dataset(tmp_path / "a.h5", BOTH, shuffle=True, block_size=8)) == first
    assert numbers(H5Dataset(tmp_path / "a.h5", BOTH, shuffle=True, block_size=8, seed=1)) != first


def test_several_files_count_as_one(tmp_path: Path) -> None:
    paths = [
        write(tmp_path / f"part{part}.h5", size, 4 + part, first=start)
        for part, (start, size) in enumerate([(0, 10), (10, 0), (10, 23), (33, 5)])
    ]
    assert numbers(H5Dataset(paths, BOTH)) == list(range(38))
    shuffled = numbers(H5Dataset(str(tmp_path / "part*.h5"), BOTH, shuffle=True))
    assert sorted(shuffled) == list(range(38)) and shuffled != list(range(38))
    assert numbers(H5Dataset([paths[3], paths[0]], BOTH))[:6] == [33, 34, 35, 36, 37, 0]


def test_patterns_find_files_in_all_folders_below(tmp_path: Path) -> None:
    for at, folder in enumerate(["a", "a/b", "a/b/c"]):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "part.h5", 5, first=5 * at)
    assert sorted(numbers(H5Dataset(str(tmp_path / "a/**/*.h5"), BOTH))) == list(range(15))


def test_types_of_numbers(tmp_path: Path) -> None:
    types = "bool uint8 int8 uint16 uint32 uint64 int16 int64 >i4 float16 float32 >f8 complex64".split()
    values = {name: (np.arange(12).reshape(4, 3) % 3).astype(name) for name in types}
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for name in types:
            file[name] = values[name]
    (batch,) = H5Dataset(tmp_path / "a.h5", types).batches(4)
    for name, got in zip(types, batch, strict=True):
        expected = torch.from_numpy(values[name].astype(values[name].dtype.newbyteorder("=")))
        assert got.dtype == expected.dtype and torch.equal(got, expected), name


def test_one_name_gives_tensors_and_several_give_tuples(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5", 5)
    image = next(iter(H5Dataset(path, "images")))
    assert image.shape == (3, 4) and image.dtype == torch.uint8
    (label,) = next(iter(H5Dataset(path, ["labels"])))
    assert label.shape == () and label.dtype == torch.int64
    shapes = [tuple(part.shape) for part in next(iter(H5Dataset(path, BOTH).batches(2)))]
    assert shapes == [(2, 3, 4), (2,)]


def test_batches_are_nobody_elses_memory(tmp_path: Path) -> None:
    data = H5Dataset(write(tmp_path / "a.h5", 90), BOTH, shuffle=True, block_size=4, window_blocks=2)
    kept = list(data.batches(7))
    assert [len(labels) for _, labels in kept] == [7] * 12 + [6]
    assert sorted(numbers(kept)) == list(range(90))
    samples = list(data)
    for image, _ in samples[::2]:
        image.zero_()
    assert sum(int(image.any()) for image, _ in samples) >= 44
    assert len(list(data.batches(7, drop_last=True))) == len(data.batches(7, drop_last=True)) == 12
    assert len(data.batches(7)) == 13


@pytest.mark.cuda
def test_batches_are_page_locked_where_there_is_a_gpu(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5", 30)
    found = list(H5Dataset(path, BOTH).batches(7))
    assert all(part.is_pinned() for batch in found for part in batch)
    assert numbers(found) == list(range(30))
    assert not next(iter(H5Dataset(path, "images", pin_memory=False).batches(7))).is_pinned()


def test_transforms(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5", 10)

    def halve(sample: Any) -> Any:
        return sample[0].float() / 2, sample[1] + 100

    expected = torch.from_numpy(images(range(10))).float() / 2
    data = H5Dataset(path, BOTH, transform=halve)
    assert torch.equal(torch.stack([image for image, _ in data]), expected)
    batches = list(data.batches(4))
    assert torch.equal(torch.cat([image for image, _ in batches]), expected)
    assert batches[1][1].tolist() == [104, 105, 106, 107]
    data = H5Dataset(path, "images", transform=torch.Tensor.float, batch_transform=lambda batch: batch.sum(0))
    assert torch.equal(next(iter(data.batches(10))), expected.mul(2).sum(0))
    with pytest.raises(ValueError, match="batch_transform must be used with batches"):
        next(iter(data))


def test_the_node_cache_gives_the_same(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5", 53, compression="gzip")
    plain = H5Dataset(path, BOTH, shuffle=True, block_size=4, window_blocks=2)
    with H5Dataset(path, BOTH, shuffle=True, block_size=4, window_blocks=2, cache="node") as cached:
        path.unlink()  # it is read already
        assert numbers(cached.batches(5)) == numbers(cached)
        assert len(cached) == 53
        first = numbers(cached)
    write(path, 53, compression="gzip")
    assert first == numbers(plain)


# ---- where an epoch is


@pytest.mark.parametrize("ranks", [1, 3])
def test_an_interrupted_epoch_goes_on_bit_for_bit(tmp_path: Path, ranks: int) -> None:
    path = write(tmp_path / "a.h5", 100)

    def make(rank: int) -> H5Dataset:
        return as_rank(H5Dataset(path, BOTH, shuffle=True, block_size=4, window_blocks=3), rank, ranks)

    for rank in range(ranks):
        whole = make(rank)
        whole.set_epoch(2)
        expected = numbers(whole)
        first = make(rank)
        first.set_epoch(2)
        batches = iter(first.batches(5))
        taken = numbers([next(batches) for _ in range(3)])
        second = make(rank)
        second.load_state_dict(pickle.loads(pickle.dumps(first.state_dict())))
        second.set_epoch(2)
        samples = iter(second)
        taken += numbers([next(samples) for _ in range(10)])
        third = make(rank)
        third.load_state_dict(second.state_dict())
        assert len(third) == len(expected) - 25
        assert taken + numbers(third.batches(5)) == expected
        assert third.state_dict()["taken"] == -(-100 // ranks) - 25  # all that any rank has
        third.set_epoch(3)
        assert len(third) == len(expected)


def test_another_number_of_ranks_takes_exactly_what_is_left(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5", 101)

    def make(rank: int, ranks: int) -> H5Dataset:
        return as_rank(H5Dataset(path, BOTH, shuffle=True, block_size=4, window_blocks=3), rank, ranks)

    seen: list[int] = []
    state = make(0, 1).state_dict()
    for ranks, steps in [(3, 4), (4, 1), (2, 3), (1, 2), (5, 50)]:
        everyone = [make(rank, ranks) for rank in range(ranks)]
        for data in everyone:
            data.load_state_dict(state)
            seen += numbers(islice(data.batches(3), steps))
        state = everyone[0].state_dict()
    assert sorted(seen) == list(range(101))


def test_a_look_at_the_first_batch_does_not_use_up_what_was_loaded(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5", 100)
    first, second = H5Dataset(path, BOTH, shuffle=True), H5Dataset(path, BOTH, shuffle=True)
    expected = numbers(first)
    second.load_state_dict(first.state_dict(60))
    next(iter(second.batches(8)))
    next(iter(second))
    assert numbers(second.batches(8)) == expected[60:]
    assert second.state_dict()["taken"] == 40
    assert len(second) == 100 and numbers(second.batches(8)) == expected


@pytest.mark.parametrize("steps", [0, 2, 5])
def test_a_restart_forgets_what_was_loaded_and_handed_out(tmp_path: Path, steps: int) -> None:
    path = write(tmp_path / "a.h5", 100)
    first, second = H5Dataset(path, BOTH, shuffle=True), H5Dataset(path, BOTH, shuffle=True)
    expected = numbers(first)
    second.load_state_dict(first.state_dict(60))
    numbers(islice(second.batches(8), steps))
    second.restart()
    assert len(second) == 100 and numbers(second.batches(8)) == expected


def test_what_drop_last_leaves_out_counts_as_taken(tmp_path: Path) -> None:
    data = H5Dataset(write(tmp_path / "a.h5", 100), BOTH)
    other = H5Dataset(tmp_path / "a.h5", BOTH)
    for batch in data.batches(30, drop_last=True):
        numbers([batch])
        other.load_state_dict(data.state_dict())
    assert len(other) == 0
    other.load_state_dict(data.state_dict())
    assert numbers(other) == []


def test_a_foreign_state_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5", 50)
    state = H5Dataset(path, BOTH, shuffle=True, seed=4).state_dict()
    for options in [{"seed": 5}, {"shuffle": False}, {"block_size": 8}, {"window_blocks": 7}]:
        with pytest.raises(ValueError, match="of the same data in the same order"):
            H5Dataset(path, BOTH, **{"shuffle": True, "seed": 4, **options}).load_state_dict(state)
    other = H5Dataset(write(tmp_path / "b.h5", 51), BOTH, shuffle=True, seed=4)
    with pytest.raises(ValueError, match="samples 50 where it has 51"):
        other.load_state_dict(state)
    with pytest.raises(ValueError, match="spans of a state must lie in"):
        H5Dataset(path, BOTH, shuffle=True, seed=4).load_state_dict({**state, "spans": [[0, 60]]})


# ---- DataLoader


def half(sample: Any) -> Any:
    return sample[0].float() / 2, sample[1]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("whole_batches", [False, True])
def test_a_loader_has_the_order_of_one_process(tmp_path: Path, workers: int, whole_batches: bool) -> None:
    path = write(tmp_path / "a.h5", 67)
    options: Any = {"shuffle": True, "block_size": 4, "window_blocks": 3}
    expected = list(as_rank(H5Dataset(path, BOTH, **options), 1, 2).batches(5))
    data = as_rank(H5Dataset(path, BOTH, batch_size=5, **options), 1, 2)
    source: Any = {"dataset": data, "batch_size": 5}
    if whole_batches:
        source = {"dataset": data.batches(5), "batch_size": None}
    loader: Any = DataLoader(**source, num_workers=workers)
    found = list(loader)
    assert len(loader) == len(found) == len(expected)
    for got, wanted in zip(found, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    if workers:
        with pytest.raises(ValueError, match="samples must be given"):
            data.state_dict()
    other = as_rank(H5Dataset(path, BOTH, **options), 1, 2)
    other.load_state_dict(data.state_dict(15))
    assert numbers(other.batches(5)) == numbers(expected[3:])


@pytest.mark.parametrize("whole_batches", [False, True])
def test_a_loader_without_workers_is_counted_exactly(tmp_path: Path, whole_batches: bool) -> None:
    data = H5Dataset(write(tmp_path / "a.h5", 67), BOTH, shuffle=True)
    loader: Any = DataLoader(data.batches(5), batch_size=None) if whole_batches else DataLoader(data, 5)
    taken = numbers(islice(loader, 3))
    other = H5Dataset(tmp_path / "a.h5", BOTH, shuffle=True)
    other.load_state_dict(data.state_dict())
    assert len(taken) == 15 and taken + numbers(other) == numbers(data)


def test_workers_without_a_batch_size_share_exactly(tmp_path: Path) -> None:
    data = H5Dataset(write(tmp_path / "a.h5", 31), BOTH, shuffle=True, transform=half)
    loader = DataLoader(data, batch_size=4, num_workers=2)
    assert sorted(label for _, labels in loader for label in labels.tolist()) == list(range(31))
    with pytest.raises(ValueError, match="batch_size must be given to H5Dataset"):
        data.state_dict(8)


def test_persistent_workers_follow_the_epoch(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5", 40)
    data = H5Dataset(path, BOTH, shuffle=True)
    alone = H5Dataset(path, BOTH, shuffle=True)
    loader: Any = DataLoader(data.batches(4), batch_size=None, num_workers=1, persistent_workers=True)
    for epoch in (0, 1, 1, 5):
        data.set_epoch(epoch)
        alone.set_epoch(epoch)
        assert numbers(loader) == numbers(alone)
    data.load_state_dict(alone.state_dict(4))
    with pytest.raises(RuntimeError, match="before a DataLoader starts persistent workers"):
        list(loader)


def test_spawned_workers_open_the_files_for_themselves(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5", 20)
    with H5Dataset(path, BOTH, shuffle=True, cache="node") as data:
        loader: Any = DataLoader(
            data.batches(4), batch_size=None, num_workers=1, multiprocessing_context="spawn"
        )
        assert numbers(loader) == numbers(data)


def test_workers_fork_while_the_reader_is_at_work(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5", 300, compression="gzip")
    data = H5Dataset(path, BOTH, block_size=4, window_blocks=1)
    for _ in zip(data, range(5), strict=False):
        found = numbers(DataLoader(H5Dataset(path, BOTH).batches(50), batch_size=None, num_workers=1))
        assert found == list(range(300))


# ---- what is refused


def test_wrong_arguments_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5", 9)
    cases: list[tuple[Any, Any, dict[str, Any], type[Exception], str]] = [
        (tmp_path / "none.h5", "x", {}, FileNotFoundError, "none.h5 must be an HDF5 file"),
        (tmp_path, "x", {}, FileNotFoundError, "got a folder"),
        (tmp_path / "*.hdf", "x", {}, FileNotFoundError, "must match at least one file"),
        ([], "x", {}, ValueError, "path must name at least one file"),
        (None, "x", {}, TypeError, "path must be a file, a pattern or a list of these, got None"),
        ([path, None], "x", {}, TypeError, "path must be a file"),
        (path, 5, {}, TypeError, "names must be the name of a dataset or a list of names, got 5"),
        (path, [5], {}, TypeError, "names must be the name"),
        (path, "pictures", {}, KeyError, "must have a dataset 'pictures'"),
        (path, [], {}, ValueError, "names must be those of at least one"),
        (path, ["images", "images"], {}, ValueError, "names must be different"),
        (path, BOTH, {"block_size": 0}, ValueError, "block_size must be"),
        (path, BOTH, {"window_blocks": 1.5}, ValueError, "window_blocks must be"),
        (path, BOTH, {"buffers": 1}, ValueError, "buffers must be a whole number from 2"),
        (path, BOTH, {"seed": -1}, ValueError, "seed must be"),
        (path, BOTH, {"cache": "disk"}, ValueError, "cache must be None or 'node'"),
        (path, BOTH, {"driver": "core"}, ValueError, "driver must be None or 'mpio'"),
    ]
    for where, names, options, kind, message in cases:
        with pytest.raises(kind, match=message):
            H5Dataset(where, names, **options)
    with pytest.raises(ValueError, match="batch_size must be a whole number from 1, got None"):
        H5Dataset(path, BOTH).batches()
    (tmp_path / "text.h5").write_text("no HDF5")
    with pytest.raises(OSError, match=r"text\.h5 must be an HDF5 file that can be read"):
        H5Dataset(tmp_path / "text.h5", "x")


def test_unfit_datasets_are_named(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["words"] = np.array([b"one", b"two"])
        file["scalar"] = 3.0
        file["long"], file["short"], file["pairs"] = np.arange(5), np.arange(4), np.zeros((5, 2))
    for names, kind, message in [
        ("words", TypeError, "'words' in .* must be of a type that torch has"),
        ("scalar", ValueError, "got a scalar"),
        (["long", "short"], ValueError, "equally many samples, got 'long' 5, 'short' 4"),
    ]:
        with pytest.raises(kind, match=message):
            H5Dataset(tmp_path / "a.h5", names)
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file["pairs"] = np.zeros((5, 3))
    with pytest.raises(ValueError, match=r"'pairs' in .*b\.h5 must be of float64 \(2,\)"):
        H5Dataset([tmp_path / "a.h5", tmp_path / "b.h5"], "pairs")


def test_parallel_hdf5_is_asked_for_as_h5py_wants_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.h5", 12)
    if not h5py.get_config().mpi:
        with pytest.raises(ValueError, match="an h5py that was built with parallel HDF5"):
            H5Dataset(path, BOTH, driver="mpio")
    asked: list[dict[str, Any]] = []
    real = h5py.File

    def pretended(name: str, mode: str, **options: Any) -> Any:
        asked.append({key: options.pop(key) for key in ("driver", "comm") if key in options})
        return real(name, mode, **options)

    class Communicator:
        rank, size, mpi = 0, 1, "an mpi4py communicator"

    class Config:
        mpi = True

    monkeypatch.setattr(h5py, "File", pretended)
    monkeypatch.setattr(h5py, "get_config", Config)
    monkeypatch.setattr("hpcpar.data.read_options.threads_allowed", lambda: True)
    with pytest.raises(ValueError, match="must have the communicator"):
        H5Dataset(path, BOTH, driver="mpio")
    made: Any = Communicator()
    with H5Dataset(path, BOTH, made, driver="mpio") as data:
        assert numbers(data) == numbers(data) == list(range(12))
        with pytest.raises(TypeError, match="must not be pickled"):
            pickle.dumps(data)
    assert asked == [{}, {"driver": "mpio", "comm": "an mpi4py communicator"}]  # opened once, for all epochs


def test_reading_much_more_than_there_is_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("x", (1 << 24, 2), "u1", chunks=(1 << 20, 2))  # 32 MiB that are not written

    data = H5Dataset(tmp_path / "a.h5", "x", shuffle=True)
    data._warn_of_amplification(2)
    assert not caplog.messages
    data._warn_of_amplification(8)
    assert "8 ranks read the data 2.0 times in each epoch" in caplog.text
    assert "Use cache='node'" in caplog.text
