"""Reads PyTorch `.pth` files without PyTorch, and without running anything that is in them.

A `.pth` is a zip of one pickle and raw storages. `pickle` would call whatever the file names, so the
pickle is interpreted here: the few opcodes that dicts, lists, numbers and tensors need, and a fixed
list of names. There is no import and no call to anything else.
"""

import dataclasses
import math
import pickletools
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

_STORAGES = {
    "torch FloatStorage": np.dtype(np.float32),
    "torch HalfStorage": np.dtype(np.float16),
    "torch BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch DoubleStorage": np.dtype(np.float64),
    "torch LongStorage": np.dtype(np.int64),
    "torch IntStorage": np.dtype(np.int32),
    "torch ByteStorage": np.dtype(np.uint8),
    "torch BoolStorage": np.dtype(np.bool_),
}
_TENSOR = "torch._utils _rebuild_tensor_v2"
_PARAMETER = "torch._utils _rebuild_parameter"
_DICT = "collections OrderedDict"
_NAMESPACE = "argparse Namespace"  # The options in DINO's training files; read as an empty dict.
# NumPy's scalars, such as the learning rates in the optimiser's state of those files; read as None.
_SCALARS = {
    "numpy.core.multiarray scalar",
    "numpy._core.multiarray scalar",
    "numpy dtype",
    "_codecs encode",
}
_NAMES = {*_STORAGES, _TENSOR, _PARAMETER, _DICT, _NAMESPACE, *_SCALARS}
_LEGACY_START = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor in the file: where it lies; `read()` brings it in as a NumPy array."""

    dtype: np.dtype
    shape: tuple[int, ...]
    _read: Callable[[], np.ndarray] = dataclasses.field(repr=False)

    def read(self) -> np.ndarray:
        """Returns the tensor as a contiguous array. Raises ValueError if its bytes are damaged."""
        return self._read()


@dataclasses.dataclass(frozen=True)
class _Name:
    """A global that the pickle refers to: never the thing itself."""

    name: str


@dataclasses.dataclass(frozen=True)
class _Storage:
    key: str
    dtype: np.dtype
    count: int


class _Mark:
    pass


def read(path: str | Path) -> Any:
    """Returns the objects saved in a `.pth`: dicts, lists, numbers, strings and `Tensor`s.

    What a training file holds beside them, its options and NumPy's scalars, is read as {} and None.

    Raises ValueError, naming the file, if it is not a zip `.pth`, is truncated or damaged, holds
    tensors that do not fit their storages, or names anything but tensors and plain containers.
    """
    path = Path(path)
    with path.open("rb") as file:
        start = file.read(len(_LEGACY_START))
    if start == _LEGACY_START:
        raise ValueError(
            f"{path} is in the format of PyTorch before 1.6, which is not read here. Re-save it with "
            "PyTorch: torch.save(torch.load(old, map_location='cpu', weights_only=True), new)"
        )
    if not start.startswith(b"PK"):
        raise ValueError(f"{path} is not a PyTorch file: it starts with {start[:8]!r}, not a zip")
    try:
        with zipfile.ZipFile(path) as archive:
            root, members, pickled = _open(path, archive)
    except (zipfile.BadZipFile, EOFError, NotImplementedError, ValueError) as e:
        if isinstance(e, _Refused):
            raise
        raise _Refused(f"{path} is truncated or damaged ({e}): fetch it again") from e
    return interpret(pickled, str(path), _TensorMaker(path, root, members))


def _open(path: Path, archive: zipfile.ZipFile) -> tuple[str, dict[str, zipfile.ZipInfo], bytes]:
    """Returns the archive's top folder, its members by name, and its pickle."""
    members = {info.filename: info for info in archive.infolist()}
    pickles = [name for name in members if name.split("/")[1:] == ["data.pkl"]]
    if len(pickles) != 1:
        raise _Refused(f"{path} is a zip but not a PyTorch file: it has no single data.pkl")
    root = pickles[0].split("/")[0]
    for name, info in members.items():
        # PyTorch stores without compression, so nothing read here can outgrow the file.
        if info.compress_type != zipfile.ZIP_STORED:
            raise _Refused(f"{path}: {name} is compressed, which PyTorch never does")
    if f"{root}/byteorder" in members:
        order = archive.read(f"{root}/byteorder")
        if order != b"little":
            raise _Refused(f"{path} has byte order {order!r}: only little-endian is read")
    return root, members, archive.read(pickles[0])


@dataclasses.dataclass(frozen=True)
class _TensorMaker:
    """Makes the `Tensor`s of one archive, checking that they lie within their storages."""

    path: Path
    root: str
    members: dict[str, zipfile.ZipInfo]

    def __call__(self, storage: Any, offset: Any, shape: Any, stride: Any) -> Tensor:
        numbers = (offset, *shape, *stride)
        if not isinstance(storage, _Storage) or not all(type(n) is int and n >= 0 for n in numbers):
            raise TypeError("a tensor is described by other things than a storage and integers")
        member = f"{self.root}/data/{storage.key}"
        info = self.members.get(member)
        size = storage.count * storage.dtype.itemsize
        if info is None or info.file_size != size:
            found = "is missing" if info is None else f"has {info.file_size} bytes"
            raise _Refused(f"{member} {found}, expected {size} bytes: truncated or damaged")
        last = offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
        count = math.prod(shape)
        if count and (last >= storage.count or count > storage.count):
            raise _Refused(f"a tensor of shape {shape} does not fit its storage {member}")
        return Tensor(
            storage.dtype, shape, lambda: self._read(member, storage.dtype, offset, shape, stride)
        )

    def _read(
        self,
        member: str,
        dtype: np.dtype,
        offset: int,
        shape: tuple[int, ...],
        stride: tuple[int, ...],
    ) -> np.ndarray:
        if 0 in shape:
            return np.zeros(shape, dtype)
        try:
            with zipfile.ZipFile(self.path) as archive:
                flat = np.frombuffer(archive.read(member), dtype)
        except (OSError, zipfile.BadZipFile, EOFError, KeyError) as e:
            raise ValueError(f"{self.path}: {member} is damaged ({e}): fetch it again") from e
        steps = [s * dtype.itemsize for s in stride]
        return np.lib.stride_tricks.as_strided(flat[offset:], shape, steps).copy()


def interpret(pickled: bytes, source: str, make_tensor: Callable[..., Any]) -> Any:
    """Returns what a pickle describes, where that is plain containers, scalars and tensors.

    `make_tensor` is given each tensor's storage, offset, shape and stride. Raises ValueError, naming
    `source`, for anything else.
    """
    machine, position = _Machine(make_tensor), 0
    try:
        for opcode, arg, at in pickletools.genops(pickled):
            position = at
            if opcode.name == "STOP":
                return machine.stack.pop()
            machine.step(opcode.name, arg)
    except _Refused as e:
        raise ValueError(f"{source}: {e}") from None
    except (ValueError, LookupError, TypeError, ArithmeticError, RecursionError) as e:
        raise ValueError(f"{source} is damaged: its pickle breaks at byte {position} ({e})") from e
    raise ValueError(f"{source} is truncated: its pickle has no end")


class _Machine:
    """The stack machine that a pickle is a program for."""

    def __init__(self, make_tensor: Callable[..., Any]):
        self.stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._make_tensor = make_tensor

    def step(self, op: str, arg: Any) -> None:
        stack = self.stack
        if op in _PUSH_ARG:
            stack.append(arg)
        elif op in _PUSH_NEW:
            stack.append(_PUSH_NEW[op]())
        elif op in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self._memo[len(self._memo) if arg is None else arg] = stack[-1]
        elif op in ("BINGET", "LONG_BINGET"):
            stack.append(self._memo[arg])
        elif op in _TUPLES:
            stack.append(tuple(self._pop(_TUPLES[op])))
        elif op == "TUPLE":
            stack.append(tuple(self._pop_to_mark()))
        elif op in ("APPEND", "APPENDS"):
            items = self._pop(1) if op == "APPEND" else self._pop_to_mark()
            self._top(list).extend(items)
        elif op in ("SETITEM", "SETITEMS"):
            items = self._pop(2) if op == "SETITEM" else self._pop_to_mark()
            self._set_items(items)
        elif op == "GLOBAL":
            stack.append(_admit(arg))
        elif op == "STACK_GLOBAL":
            stack.append(_admit(" ".join(self._pop(2))))
        elif op == "BINPERSID":
            stack.append(_storage(stack.pop()))
        elif op in ("REDUCE", "NEWOBJ"):
            stack.append(self._call(*self._pop(2)))
        elif op == "BUILD":
            stack.pop()  # The attributes of a dict or of the options: nothing needs them.
        elif op not in ("PROTO", "FRAME"):
            raise _Refused(f"its pickle uses {op}, which no file of tensors needs")

    def _pop(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise IndexError("its stack is empty")
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def _pop_to_mark(self) -> list[Any]:
        items = []
        while not isinstance(item := self.stack.pop(), _Mark):
            items.append(item)
        return items[::-1]

    def _top(self, kind: type) -> Any:
        if not isinstance(self.stack[-1], kind):
            raise TypeError(f"a {kind.__name__} is expected")
        return self.stack[-1]

    def _set_items(self, items: list[Any]) -> None:
        keys = items[::2]
        if not all(isinstance(key, str | int) for key in keys):
            raise TypeError("a dict with keys other than strings and integers")
        self._top(dict).update(zip(keys, items[1::2], strict=True))

    def _call(self, name: Any, args: Any) -> Any:
        if not isinstance(name, _Name) or not isinstance(args, tuple):
            raise TypeError("a call of something that is not callable")
        if name.name in (_DICT, _NAMESPACE) and not args:
            return {}
        if name.name in _SCALARS:
            return None
        if name.name == _TENSOR:
            return self._make_tensor(*args[:4])
        if name.name == _PARAMETER:
            return args[0]
        raise TypeError(f"a call of {name.name} that no tensor needs")


class _Refused(ValueError):
    """What the file holds is understood, and not accepted."""


def _admit(name: str) -> _Name:
    if name not in _NAMES:
        raise _Refused(
            f"it refers to {name.replace(' ', '.')}, which is not a tensor; nothing of it was run. If "
            "you trust the file, load it with PyTorch and re-save its state_dict() alone"
        )
    return _Name(name)


def _storage(identifier: Any) -> _Storage:
    kind, storage, key, _, count = identifier
    if kind != "storage" or not isinstance(storage, _Name) or storage.name not in _STORAGES:
        raise TypeError("a storage of an unknown kind")
    if not isinstance(key, str) or type(count) is not int or count < 0:
        raise TypeError("a storage without a proper key and size")
    return _Storage(key, _STORAGES[storage.name], count)


_PUSH_ARG = frozenset(
    "BINUNICODE SHORT_BINUNICODE BINUNICODE8 BININT BININT1 BININT2 LONG1 BINFLOAT".split()
)
_PUSH_NEW = {
    "MARK": _Mark,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
