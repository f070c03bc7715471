"""From a source to the batches of a run: read, fitted to one size, kept, with cached features."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxseg.data import loader
from jaxseg.data.cache import FeatureCache, PreparedSource
from jaxseg.data.source import Source, spread
from jaxseg.options import option

Batches = Iterator[Mapping[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Reading:
    """How a source is read, and what is kept of it."""

    size: tuple[int, int] = option(
        (0, 0),
        "(height, width) of the images, multiples of the stride; (0, 0) = native",
        low=0,
        length=2,
        open=True,
    )
    limit: int = option(
        0, "read only so many examples of each split, evenly spaced; 0 = all", low=0, open=True
    )
    threads: int = option(2, "that decode, in each process", low=1, high=1024, free=True, open=True)
    workers: int = option(
        0, "processes that decode, beside the threads", low=0, high=1024, free=True, open=True
    )
    memory_gigabytes: float = option(
        4.0,
        "decoded images and cached features kept in memory",
        low=0,
        high=1e6,
        free=True,
        open=True,
    )
    cache_dir: str = option(
        "", "also keep the features of a frozen backbone here, for later runs", free=True, open=True
    )
    cache_gigabytes: float = option(
        20.0, "at most this much there", low=0, high=1e6, free=True, open=True
    )


class Reader:
    """Batches of a source, its images in one size; a process reads its own share of them.

    Args:
      source: what to read.
      size: (H, W) that examples are fitted to, from `working_size`.
      reading: how; its `size` and `limit` are for whoever makes `source` and `size`.
      batch: examples in a global batch.
      seed: of the order, and of cached flips.
      multiple: pixels per token, see `source.fit`.
      leave_out: fields of the examples that are not wanted, such as "mask".
      memory_share: of `reading.memory_gigabytes` that it may keep.
      features: adds `features` to every example.
      flip: probability of a left-right flip of examples with cached features; others are flipped on
        the device.

    Attributes:
      cached: whether examples have features.
    """

    def __init__(
        self,
        source: Source,
        size: tuple[int, int],
        *,
        reading: Reading,
        batch: int,
        seed: int = 0,
        multiple: int = 1,
        leave_out: tuple[str, ...] = (),
        memory_share: float = 1.0,
        features: FeatureCache | None = None,
        flip: float = 0.0,
    ):
        self.cached = features is not None
        self._reading, self._batch, self._seed = reading, batch, seed
        self._source = PreparedSource(
            source,
            size,
            multiple=multiple,
            memory=memory_share * reading.memory_gigabytes * 1e9,
            leave_out=leave_out,
            features=features,
            flip=flip if self.cached else 0.0,
            seed=seed,
        )

    def __len__(self) -> int:
        return len(self._source)

    def train_batches(self, start: int, stop: int) -> Batches:
        """This process's share of the training batches of steps start .. stop - 1."""
        steps = dict(start_step=start, stop_step=stop)
        return loader.train_batches(self._source, seed=self._seed, **steps, **self._options())

    def eval_batches(self) -> Batches:
        """This process's share of the whole source, once and in order."""
        return loader.eval_batches(self._source, **self._options())

    def spread(self, limit: int) -> tuple[Batches, int]:
        """(batches of `limit` examples, evenly spaced over the source, their number); 0 = all.

        An example's `index` is its place among them.
        """
        picked = spread(len(self), limit or len(self))
        return self.subset(picked), len(picked)

    def subset(self, indices: Sequence[int]) -> Batches:
        """Batches of the examples at `indices`, in that order; `index` is the place among them."""
        return loader.eval_batches(self._source.subset(indices), **self._options())

    def example(self, index: int) -> Mapping[str, np.ndarray]:
        """One example, unflipped, with features where they are cached."""
        return self._source.read(index, flipped=False)

    def _options(self) -> dict[str, Any]:
        return dict(
            batch=self._batch,
            size=None,  # `PreparedSource` brings its examples to one size itself
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            local_devices=jax.local_device_count(),
            num_threads=self._reading.threads,
            # Features are computed on this process's device.
            num_workers=0 if self.cached else self._reading.workers,
        )
