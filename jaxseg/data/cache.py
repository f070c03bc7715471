"""Examples ready for the device: fitted to the working size, with frozen features, kept for reuse."""

import hashlib
import logging
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxseg.data.source import Source, categories_of, example_of, fit
from jaxseg.ops import geometry

log = logging.getLogger(__name__)

FeatureFn = Callable[[np.ndarray], np.ndarray]


class MemoryStore:
    """Keeps arrays in memory until `limit` bytes are used; after that it takes no more."""

    def __init__(self, limit: float):
        self._limit, self._used = limit, 0
        self._items: dict[Any, Any] = {}
        self._lock = threading.Lock()

    def get(self, key: Any) -> Any | None:
        return self._items.get(key)

    def put(self, key: Any, value: dict[str, Any]) -> None:
        size = sum(v.nbytes for v in value.values() if isinstance(v, np.ndarray))
        with self._lock:
            if key not in self._items and self._used + size <= self._limit:
                self._items[key] = value
                self._used += size

    def __getstate__(self):
        return {**self.__dict__, "_used": 0, "_items": {}, "_lock": None}

    def __setstate__(self, state):
        self.__dict__.update(state, _lock=threading.Lock())


class DiskStore:
    """Keeps feature arrays as `.npy` files below a folder until `limit` bytes are used.

    A file appears whole or not at all. Where the disk is full the features are computed again
    instead, and a warning says so once.
    """

    def __init__(self, folder: Path, limit: float):
        self._folder = Path(folder).expanduser()
        self._folder.mkdir(parents=True, exist_ok=True)
        self._room = limit - sum(f.stat().st_size for f in self._folder.glob("*.npy"))
        self._lock = threading.Lock()

    def get(self, key: str) -> np.ndarray | None:
        try:
            return np.load(self._folder / f"{key}.npy")
        except FileNotFoundError:
            return None
        except (ValueError, OSError, EOFError) as error:
            log.warning("cached features %s/%s.npy cannot be read (%s)", self._folder, key, error)
            return None

    def put(self, key: str, value: np.ndarray) -> None:
        with self._lock:
            if value.nbytes > self._room:
                return
            self._room -= value.nbytes
        temporary = self._folder / f".{key}.{os.getpid()}.{threading.get_ident()}.tmp"
        try:
            with temporary.open("wb") as file:
                np.save(file, value)
            os.replace(temporary, self._folder / f"{key}.npy")
        except OSError as error:
            self._room = 0
            temporary.unlink(missing_ok=True)
            log.warning("features are no longer cached in %s: %s", self._folder, error)


class FeatureCache:
    """Features of images, computed once.

    Args:
      compute: uint8 `H x W x 3` to a float16 array. Called with one image at a time, so that the
        result does not depend on what else is in a batch.
      key: names everything but the image that the features depend on (weights, layers, sizes).
      store: where to keep them across runs, or None.
    """

    def __init__(self, compute: FeatureFn, *, key: str, store: DiskStore | None):
        self._compute, self._key, self._store = compute, key.encode(), store
        # One at a time: threads would only take the processor from each other.
        self._lock = threading.Lock()

    def __call__(self, image: np.ndarray) -> np.ndarray:
        digest = hashlib.blake2b(self._key, digest_size=20)
        digest.update(str(image.shape).encode() + np.ascontiguousarray(image).tobytes())
        name = digest.hexdigest()
        found = self._store.get(name) if self._store else None
        if found is None:
            with self._lock:
                found = np.asarray(self._compute(image))
            if self._store:
                self._store.put(name, found)
        return found


class PreparedSource:
    """A source whose examples all have the working size, read again from memory where they fit.

    Args:
      source: what to read.
      size: (H, W) from `working_size`.
      multiple: pixels per token, see `source.fit`.
      memory: bytes of examples to keep.
      leave_out: fields of the examples that are not wanted.
      features: adds `features` to every example; None for images alone.
      flip: probability of a left-right flip, drawn from (seed, position). Only for features that
        are cached; without them the flip is done on the device.
      seed: of the flips.
    """

    def __init__(
        self,
        source: Source,
        size: tuple[int, int],
        *,
        multiple: int,
        memory: float,
        leave_out: Sequence[str] = (),
        features: FeatureCache | None = None,
        flip: float = 0.0,
        seed: int = 0,
    ):
        self.categories = categories_of(source)
        self._source, self._size, self._multiple = source, size, multiple
        self._leave_out = tuple(leave_out)
        self._features, self._flip, self._seed = features, flip, seed
        self._store = MemoryStore(memory)

    def __len__(self) -> int:
        return len(self._source)

    def read(self, index: int, position: int = 0, *, flipped: bool | None = None) -> dict[str, Any]:
        """The example `index` as it is read at `position` of the stream, which decides its flip."""
        if flipped is None:
            flipped = bool(self._flip) and self._draw(position) < self._flip
        key = (index, flipped)
        example = self._store.get(key)
        if example is None:
            example = example_of(self._source, index)
            for field in self._leave_out:
                example.pop(field, None)
            example = fit(example, self._size, multiple=self._multiple)
            if flipped:
                size = self._size
                example = {k: geometry.flip(k, value, size) for k, value in example.items()}
            if self._features is not None:
                example["features"] = self._features(example["image"])
            self._store.put(key, example)
        return example

    def _draw(self, position: int) -> float:
        # The stream of the flips must differ from that of the order: hence the third number.
        return np.random.default_rng((self._seed, position, 1)).random()

    def subset(self, indices: Sequence[int]) -> "Subset":
        """A source of the examples at `indices`, in that order."""
        return Subset(self, tuple(indices))


class Subset:
    """Some examples of a `PreparedSource`."""

    def __init__(self, source: PreparedSource, indices: tuple[int, ...]):
        self._source, self._indices = source, indices

    def __len__(self) -> int:
        return len(self._indices)

    def read(self, index: int, position: int = 0) -> dict[str, Any]:
        return self._source.read(self._indices[index], position)
