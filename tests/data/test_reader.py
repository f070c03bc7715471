"""The one reader: what it reads for training, evaluation and a part, and what it keeps."""

import dataclasses
import pickle

import numpy as np
import pytest

from jaxseg.data import Kinds, Reader, Reading, Shapes, loader
from jaxseg.data.cache import FeatureCache, PreparedSource
from jaxseg.options import options

SIZE = (32, 32)


def source(length=22):
    return Kinds(size=(32, 40), length=length)


def reader(**options):
    defaults = dict(reading=Reading(), batch=6, seed=3)
    return Reader(options.pop("source", None) or source(), SIZE, **(defaults | options))


def features():
    """The mean colour of 8x8 cells."""
    calls = []

    def compute(image):
        calls.append(image)
        return image.reshape(4, 8, 4, 8, 3).mean((1, 3)).astype(np.float16)

    return FeatureCache(compute, key="cells", store=None), calls


def same(batches, others):
    for a, b in zip(batches, others, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key], err_msg=key)


def test_batches_are_those_of_the_loader():
    prepared = PreparedSource(source(), SIZE, multiple=1, memory=1e9)
    shared = dict(batch=6, size=None)
    expected = loader.train_batches(prepared, seed=3, start_step=2, stop_step=5, **shared)
    same(reader().train_batches(2, 5), expected)
    same(reader().eval_batches(), loader.eval_batches(prepared, **shared))
    assert len(reader()) == 22


def test_a_part_of_the_examples():
    read = reader()
    batches, count = read.spread(8)
    batches = list(batches)
    found = {k: np.concatenate([b[k] for b in batches]) for k in ("image", "index", "valid")}
    assert count == 8 and found["index"][found["valid"]].tolist() == list(range(8))
    chosen = np.linspace(0, 21, 8).astype(int)
    same(read.subset(chosen.tolist()), read.spread(8)[0])
    for i, image in zip(chosen, found["image"][found["valid"]], strict=True):
        np.testing.assert_array_equal(image, read.example(int(i))["image"])
    batches, count = read.spread(0)
    assert count == 22 and sum(batch["valid"].sum() for batch in batches) == 22


def test_fields_are_left_out():
    assert "mask" in reader().example(0)
    read = reader(leave_out=("mask",))
    assert "mask" not in read.example(0)
    assert all("mask" not in batch for batch in read.train_batches(0, 1))


def test_workers_and_threads_change_nothing():
    expected = list(reader().train_batches(0, 3))
    same(reader(reading=Reading(threads=3, workers=1)).train_batches(0, 3), expected)


def test_a_worker_process_gets_what_reads_images():
    prepared = reader(leave_out=("mask",))._source
    before = prepared.read(3)["image"]
    copy = pickle.loads(pickle.dumps(prepared))
    np.testing.assert_array_equal(copy.read(3)["image"], before)
    assert "mask" not in copy.read(3)


def test_examples_are_kept_up_to_a_share_of_the_memory(monkeypatch):
    drawn = source(4)
    read = []
    monkeypatch.setattr(Kinds, "__getitem__", lambda self, i: read.append(i) or drawn_examples[i])
    drawn_examples = [Shapes.__getitem__(drawn, i) for i in range(4)]
    each = 4 * 32 * 32 + 8  # image, mask and extent
    for share, expected in (
        (1.0, [0, 1, 2, 3]),
        (0.5, [0, 1, 2, 3, 2, 3]),
        (0.0, [0, 1, 2, 3] * 2),
    ):
        read.clear()
        once = reader(
            source=drawn, reading=Reading(memory_gigabytes=4 * each / 1e9), memory_share=share
        )
        for i in (0, 1, 2, 3) * 2:
            once.example(i)
        assert read == expected


@pytest.mark.parametrize("flip, orientations", [(0.0, 1), (0.5, 2), (1.0, 1)])
def test_cached_features(flip, orientations):
    cache, calls = features()
    read = reader(features=cache, flip=flip, reading=Reading(workers=4, threads=1))
    assert read.cached and not reader(flip=flip).cached
    batches = list(read.train_batches(0, 40))  # workers would not find the features
    assert len(calls) == 22 * orientations
    mirrored = []
    for batch in batches:
        for row, index in enumerate(batch["index"]):
            whole = read.example(index)
            flipped = not np.array_equal(batch["image"][row], whole["image"])
            mirrored.append(flipped)
            step = slice(None, None, -1 if flipped else 1)
            np.testing.assert_array_equal(batch["image"][row], whole["image"][:, step])
            np.testing.assert_array_equal(batch["mask"][row], whole["mask"][:, step])
            np.testing.assert_array_equal(batch["features"][row], whole["features"][:, step])
    assert np.mean(mirrored) == pytest.approx(flip, abs=0.1)
    # The flips follow from the seed and the position: from step 7 on they are the same.
    same(reader(features=features()[0], flip=flip).train_batches(7, 9), batches[7:9])


def test_without_features_the_flip_is_left_to_the_device():
    same(reader(flip=1.0).train_batches(0, 2), reader().train_batches(0, 2))


def test_what_a_config_may_set():
    found = options(Reading)
    assert list(found) == [field.name for field in dataclasses.fields(Reading)]
    free = {name for name, option in found.items() if option.free}
    assert free == {"threads", "workers", "memory_gigabytes", "cache_dir", "cache_gigabytes"}
    assert all(option.open and option.help for option in found.values())
    assert found["size"].fits((32, 48)) and not found["size"].fits((-1, 3))
