"""Batches of a source. What a step reads follows from (seed, step) alone, so no state is saved."""

import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxseg.data.image_files import DataError
from jaxseg.data.source import Source, example_of, fit
from jaxseg.ops import geometry

_NUMBERS = "biufcV"  # kinds of dtypes; V are those of ml_dtypes, such as bfloat16


def example_index(seed: int, position: int, length: int) -> int:
    """Which of `length` examples is read at `position` of the endless shuffled stream.

    Position p is rank p % length in the permutation of epoch p // length, which is drawn from
    (seed, epoch); so every epoch reads every example once.
    """
    epoch, rank = divmod(position, length)
    return int(_permutation(seed, epoch, length)[rank])


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, length: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(length)


def share(batch: int, index: int, count: int, local_devices: int) -> tuple[range, int]:
    """The part of a global batch that process `index` of `count` reads.

    Returns:
      (offsets into the global batch, rows in this process's arrays). Rows are the same for all
      processes and a multiple of `local_devices`; those beyond the offsets are padding.
    """
    each = -(-batch // count)
    start = min(index * each, batch)
    rows = -(-each // local_devices) * local_devices
    return range(start, min(start + each, batch)), rows


def train_batches(
    source: Source, *, batch: int, seed: int, start_step: int, stop_step: int, **options
) -> Iterator[dict[str, np.ndarray]]:
    """Yields this process's share of the global batches of steps start_step .. stop_step - 1.

    Step s of global batch B reads positions s*B .. s*B + B - 1 of the stream of `example_index`,
    whatever the number of processes, devices, threads and workers.

    Args:
      source: what to read.
      batch: size of the global batch, over all processes.
      seed: of the order.
      start_step, stop_step: which steps.
      **options: see `_batches`; the same for `eval_batches`.

    Yields:
      image uint8 bxHxWx3, mask uint8 bxHxW (absent if the source has none), category int32 b, any
      further arrays of the examples, index int32 b (of the example in the source), row int32 b (its
      place in the global batch) and valid bool b.
      Rows where `valid` is False are padding: mask void, everything else 0 (`geometry.FIELDS`).

    Raises:
      ValueError: what the source raises, when the batch that it belongs to is asked for.
    """
    length = len(source)

    def index_at(position: int) -> int:
        return example_index(seed, position, length)

    return _batches(source, index_at, range(start_step, stop_step), batch=batch, **options)


def eval_batches(source: Source, *, batch: int, **options) -> Iterator[dict[str, np.ndarray]]:
    """Yields this process's share of the whole source, once, in order; see `train_batches`.

    All processes yield the same number of batches of the same shape; the last is padded with rows
    where `valid` is False.
    """
    length = len(source)

    def index_at(position: int) -> int | None:
        return position if position < length else None

    return _batches(source, index_at, range(-(-length // max(batch, 1))), batch=batch, **options)


def _batches(
    source: Source,
    index_at: Callable[[int], int | None],
    steps: range,
    *,
    batch: int,
    size: tuple[int, int] | None,
    multiple: int = 16,
    process_index: int = 0,
    process_count: int = 1,
    local_devices: int = 1,
    num_threads: int = 4,
    num_workers: int = 0,
) -> Iterator[dict[str, np.ndarray]]:
    """Reads ahead in `num_threads` threads, a batch each, in each of `num_workers` processes.

    Workers (0: threads of this process) are spawned, not forked, so they are safe beside JAX; they
    pay when decoding holds the interpreter lock, and need a source that can be pickled.

    Args:
      size: (height, width) from `working_size`, to which `fit` brings every example. None: the
        source has `read(index, position)`, whose examples are ready to be stacked.
      multiple: see `fit`.
      process_index, process_count, local_devices: see `share`.
    """
    import grain  # here, with absl: they take a second, and only who reads batches needs them
    from absl import flags

    if batch < 1:
        raise ValueError(f"batch is {batch}: it must be at least 1")
    if not len(source):
        raise ValueError("the data source is empty")
    offsets, rows = share(batch, process_index, process_count, local_devices)

    def read(index: int, position: int) -> dict:
        if size is None:
            return source.read(index, position)
        return fit(example_of(source, index), size, multiple=multiple)

    def load(step: int) -> dict[str, np.ndarray]:
        asked = [(index_at(p), p) for p in (step * batch + offset for offset in offsets)]
        wanted = [(i, p) for i, p in asked if i is not None]
        padding = [0] * (rows - len(wanted))
        which = {
            "index": np.array([i for i, _ in wanted] + padding, np.int32),
            "row": np.array([p - step * batch for _, p in wanted] + padding, np.int32),
            "valid": np.arange(rows) < len(wanted),
        }
        return which | _stacked(read, wanted, rows)

    threads = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=max(num_threads, 2))
    data = grain.MapDataset.range(steps.start, steps.stop).map(load).to_iter_dataset(threads)
    if num_workers:
        if not flags.FLAGS.is_parsed():  # Grain's workers read flags; outside app.run nobody parses
            flags.FLAGS.mark_as_parsed()
        data = data.mp_prefetch(grain.MultiprocessingOptions(num_workers=num_workers))
        # Through pipes: what Grain leaves in shared memory is not always freed when a run ends.
        piped = grain.experimental.DatasetOptions(min_shm_size=sys.maxsize)
        data = grain.experimental.WithOptionsIterDataset(data, piped)
    iterator = iter(data)
    iterator.start_prefetch()  # so that reading overlaps with what the caller does before step 1
    return _closing(iterator)


def _closing(iterator: Any) -> Iterator[dict[str, np.ndarray]]:
    """Stops a Grain iterator's threads and processes as soon as the caller is done, or lets go."""
    try:
        yield from iterator
    finally:
        iterator.close()


def _stacked(
    read: Callable[[int, int], dict], wanted: Sequence[tuple[int, int]], rows: int
) -> dict[str, np.ndarray]:
    """The arrays of the wanted (index, position) examples, padded to `rows`."""
    examples = [read(*which) for which in wanted]
    like = examples[0] if examples else read(0, 0)  # shapes, where all rows are padding
    stacked = {}
    for key in like:
        first, kind = np.asarray(like[key]), geometry.field(key)
        if first.dtype.kind not in _NUMBERS:  # the name
            continue
        stacked[key] = np.full((rows, *first.shape), kind.padding, kind.dtype or first.dtype)
        for row, example in enumerate(examples):
            if key not in example or np.shape(example[key]) != first.shape:
                raise DataError(_unlike(key, example, like))
            stacked[key][row] = example[key]
    return stacked


def _unlike(key: str, example: Mapping[str, Any], like: Mapping[str, Any]) -> str:
    has = f"is of shape {np.shape(example[key])}" if key in example else "is missing"
    advice = "; pad boxes with rows of 0" if key == "boxes" else ""
    return (
        f"{key} of example {example.get('name', '')} {has}, and of shape {np.shape(like[key])} in example "
        f"{like.get('name', '')}: allowed is one shape for a source{advice}"
    )
