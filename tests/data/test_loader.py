import itertools
import threading

import numpy as np
import pytest

from jaxseg import data
from jaxseg.data import loader

SIZE = (16, 32)


class Numbered:
    """Example i is an image filled with i. Deliberately without `sizes`, which no batch needs."""

    categories = ("even", "odd")

    def __init__(self, length=10, *, broken=None, shape=SIZE, masks=True):
        self.length, self.broken, self.shape, self.masks = length, broken, shape, masks

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        if index == self.broken:
            raise data.DataError(f"{index}.jpg: cannot be read")
        image = np.full((*self.shape, 3), index, np.uint8)
        mask = np.full(self.shape, index % 2, np.uint8)
        example = {"image": image, "category": index % 2, "name": str(index)}
        return example | ({"mask": mask} if self.masks else {})


def assert_same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key], err_msg=key)


def train(source, **options):
    defaults = {"batch": 4, "seed": 7, "start_step": 0, "stop_step": 8, "size": SIZE}
    return list(data.train_batches(source, **(defaults | options)))


def test_what_a_batch_holds():
    batch = train(Numbered(), batch=3)[0]
    assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
        "image": ((3, *SIZE, 3), np.uint8),
        "mask": ((3, *SIZE), np.uint8),
        "extent": ((3, 2), np.int32),
        "index": ((3,), np.int32),
        "row": ((3,), np.int32),
        "category": ((3,), np.int32),
        "valid": ((3,), np.bool_),
    }
    assert all(type(value) is np.ndarray for value in batch.values())
    for row, index in enumerate(batch["index"]):
        assert (batch["image"][row] == index).all()
        assert (batch["mask"][row] == index % 2).all() and batch["category"][row] == index % 2


def test_every_epoch_is_another_permutation():
    epochs = [[data.example_index(3, e * 10 + r, 10) for r in range(10)] for e in range(5)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 5
    assert epochs[0] != [data.example_index(4, r, 10) for r in range(10)]


def test_order_is_pinned():
    """Resumed runs rely on it, so that a change must be a decision."""
    expected = [*np.random.default_rng((0, 0)).permutation(6)]
    expected += [*np.random.default_rng((0, 1)).permutation(6)]
    batches = train(Numbered(6), seed=0, batch=4, stop_step=3)  # the second crosses the epochs
    assert np.concatenate([b["index"] for b in batches]).tolist() == expected


def test_batch_larger_than_the_source():
    (batch,) = train(Numbered(3), batch=8, stop_step=1)
    assert sorted(batch["index"][:3]) == sorted(batch["index"][3:6]) == [0, 1, 2]


@pytest.mark.parametrize("step", [0, 1, 5, 8])
def test_restart_goes_on_the_same(step):
    whole, rest = train(Numbered()), train(Numbered(), start_step=step)
    assert len(rest) == 8 - step
    for a, b in zip(whole[step:], rest, strict=True):
        assert_same(a, b)


@pytest.mark.parametrize("threads", [0, 1, 8])
def test_threads_change_nothing(threads):
    for a, b in zip(train(Numbered()), train(Numbered(), num_threads=threads), strict=True):
        assert_same(a, b)


def test_worker_processes_change_nothing():
    for a, b in zip(train(Numbered()), train(Numbered(), num_workers=2), strict=True):
        assert_same(a, b)
        assert all(type(value) is np.ndarray for value in b.values())


@pytest.mark.parametrize("batch, count, devices", [(8, 2, 4), (7, 3, 1), (5, 2, 4), (2, 4, 2)])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_processes_together_read_what_one_reads(mode, batch, count, devices):
    def batches(**options):
        if mode == "train":
            return train(Numbered(11), batch=batch, **options)
        return list(data.eval_batches(Numbered(11), batch=batch, size=SIZE, **options))

    alone = batches()
    each = [
        batches(process_index=p, process_count=count, local_devices=devices) for p in range(count)
    ]
    for whole, *shares in zip(alone, *each, strict=True):
        assert len({share["image"].shape for share in shares}) == 1
        assert all(len(share["valid"]) % devices == 0 for share in shares)
        for key in whole:
            joined = np.concatenate([share[key][share["valid"]] for share in shares])
            np.testing.assert_array_equal(joined, whole[key][whole["valid"]], err_msg=key)
        for share in shares:
            padding = ~share["valid"]
            assert (share["mask"][padding] == 255).all() and not share["image"][padding].any()


def test_share_covers_the_batch_once():
    for batch, count, devices in itertools.product(range(1, 12), range(1, 6), range(1, 5)):
        shares = [loader.share(batch, p, count, devices) for p in range(count)]
        assert [i for offsets, _ in shares for i in offsets] == list(range(batch))
        assert len({rows for _, rows in shares}) == 1
        assert all(len(offsets) <= rows and rows % devices == 0 for offsets, rows in shares)


def test_eval_reads_all_once_in_order_and_pads_the_last():
    batches = list(data.eval_batches(Numbered(10), batch=4, size=SIZE))
    assert [len(b["index"]) for b in batches] == [4, 4, 4]
    index = np.concatenate([b["index"][b["valid"]] for b in batches])
    assert index.tolist() == list(range(10))
    assert batches[-1]["valid"].tolist() == [True, True, False, False]


def test_without_masks():
    source = Numbered(3, masks=False)
    (batch,) = data.eval_batches(source, batch=4, size=SIZE)
    assert batch.keys() == {"image", "extent", "category", "index", "row", "valid"}


def test_ready_examples_with_further_arrays():
    class Ready(Numbered):
        def read(self, index, position):
            return {**self[index], "features": np.full((2, 3), position, np.float16)}

    batches = train(Ready(), size=None, batch=3, local_devices=4, stop_step=2)
    assert batches[1]["features"].dtype == np.float16
    assert batches[1]["features"][:, 0, 0].tolist() == [3, 4, 5, 0]


def test_examples_are_fitted():
    (batch,) = data.eval_batches(Numbered(2, shape=(20, 40)), batch=2, size=SIZE)
    assert batch["image"].shape == (2, *SIZE, 3)


@pytest.mark.parametrize("options", [{}, {"num_threads": 0}, {"num_workers": 1}])
def test_errors_arrive_with_their_batch(options):
    batches = data.eval_batches(Numbered(10, broken=7), batch=2, size=SIZE, **options)
    for first in (0, 2, 4):
        assert next(batches)["index"].tolist() == [first, first + 1]
    with pytest.raises(data.DataError, match=r"^7\.jpg: cannot be read"):
        next(batches)


def test_nothing_is_left_running():
    before = {thread.ident for thread in threading.enumerate()}
    batches = data.train_batches(
        Numbered(), batch=2, seed=0, start_step=0, stop_step=10**9, size=SIZE
    )
    next(batches)
    batches.close()
    for thread in threading.enumerate():
        if thread.ident not in before:
            thread.join(timeout=10)
            assert not thread.is_alive(), thread


def test_reading_starts_before_the_first_batch_is_asked_for():
    started = threading.Event()

    class Watched(Numbered):
        def __getitem__(self, index):
            started.set()
            return super().__getitem__(index)

    batches = data.eval_batches(Watched(), batch=2, size=SIZE)
    assert started.wait(timeout=10)
    assert len(list(batches)) == 5


def test_bad_arguments():
    with pytest.raises(ValueError, match="batch is 0"):
        train(Numbered(), batch=0)
    with pytest.raises(ValueError, match="batch is 0"):
        data.eval_batches(Numbered(), batch=0, size=SIZE)
    with pytest.raises(ValueError, match="empty"):
        train(Numbered(0))
