"""Writes checkpoint files for tests byte by byte, without PyTorch and without our readers."""

import dataclasses
import json
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

_STORAGES = {
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "int64": "LongStorage",
}
_SAFETENSORS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64"}


@dataclasses.dataclass
class Name:
    """A global: `Name("os", "system")`."""

    module: str
    name: str


@dataclasses.dataclass
class Call:
    """A call that the pickle asks for, with `state` to set on the result if given."""

    function: Name
    args: tuple
    state: Any = None


@dataclasses.dataclass
class Strided:
    """A view into a storage."""

    storage: np.ndarray
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class PthWriter:
    """Pickles dicts, lists, tuples, scalars, arrays, `Strided`, `Name` and `Call`."""

    def __init__(self):
        self.storages: list[np.ndarray] = []

    def emit(self, x: Any) -> bytes:
        many = lambda items: b"(" + b"".join(map(self.emit, items))  # noqa: E731
        if isinstance(x, dict):
            return b"}" + many(v for item in x.items() for v in item) + b"u"
        if isinstance(x, list):
            return b"]" + many(x) + b"e"
        if isinstance(x, tuple):
            return many(x) + b"t"
        if isinstance(x, str):
            return b"X" + struct.pack("<I", len(x.encode())) + x.encode()
        if x is None or isinstance(x, bool):
            return {None: b"N", True: b"\x88", False: b"\x89"}[x]
        if isinstance(x, int):
            return b"J" + struct.pack("<i", x)
        if isinstance(x, float):
            return b"G" + struct.pack(">d", x)
        if isinstance(x, Name):
            return f"c{x.module}\n{x.name}\n".encode()
        if isinstance(x, Call):
            state = b"" if x.state is None else self.emit(x.state) + b"b"
            return self.emit(x.function) + self.emit(x.args) + b"R" + state
        if isinstance(x, np.ndarray):
            stride = tuple(s // x.itemsize for s in np.empty(x.shape, x.dtype).strides)
            x = Strided(np.ascontiguousarray(x).reshape(-1), 0, x.shape, stride)
        return self._tensor(x)

    def _tensor(self, x: Strided) -> bytes:
        kind = Name("torch", _STORAGES[x.storage.dtype.name])
        key, count = str(len(self.storages)), x.storage.size
        self.storages.append(x.storage)
        storage = self.emit(("storage", kind, key, "cpu", count)) + b"Q"
        hooks = self.emit(Call(Name("collections", "OrderedDict"), ()))
        rest = b"".join(map(self.emit, (x.offset, x.shape, x.stride, False))) + hooks
        return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + rest + b"tR"


def write_pth(path: Path, tree: Any) -> Path:
    writer = PthWriter()
    pickled = b"\x80\x02" + writer.emit(tree) + b"."
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", "little")
        for i, storage in enumerate(writer.storages):
            archive.writestr(f"archive/data/{i}", storage.tobytes())
    return path


def write_safetensors(path: Path, tensors: dict[str, np.ndarray]) -> Path:
    header, blobs, at = {"__metadata__": {"format": "pt"}}, [], 0
    for name, x in tensors.items():
        blobs.append(np.ascontiguousarray(x).tobytes())
        header[name] = {
            "dtype": _SAFETENSORS[x.dtype.name],
            "shape": list(x.shape),
            "data_offsets": [at, at + len(blobs[-1])],
        }
        at += len(blobs[-1])
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + b"".join(blobs))
    return path


def vit_tensors(
    *, patch=4, dim=64, depth=2, grid=3, layerscale=False, registers=0, seed=0
) -> dict[str, np.ndarray]:
    """Random tensors of a ViT in the key layout of the DINO release."""
    rng = np.random.default_rng(seed)
    shapes = {"cls_token": (1, 1, dim), "pos_embed": (1, 1 + grid**2, dim)}
    if registers:
        shapes["register_tokens"] = (1, registers, dim)
    shapes |= {"patch_embed.proj.weight": (dim, 3, patch, patch), "patch_embed.proj.bias": (dim,)}
    linear = {"attn.qkv": (3, 1), "attn.proj": (1, 1), "mlp.fc1": (4, 1), "mlp.fc2": (1, 4)}
    for i in range(depth):
        for name in ("norm1", "norm2"):
            shapes[f"blocks.{i}.{name}.weight"] = shapes[f"blocks.{i}.{name}.bias"] = (dim,)
        for name, (n_out, n_in) in linear.items():
            shapes[f"blocks.{i}.{name}.weight"] = (n_out * dim, n_in * dim)
            shapes[f"blocks.{i}.{name}.bias"] = (n_out * dim,)
        if layerscale:
            shapes[f"blocks.{i}.ls1.gamma"] = shapes[f"blocks.{i}.ls2.gamma"] = (dim,)
    shapes["norm.weight"] = shapes["norm.bias"] = (dim,)
    return {k: (0.2 * rng.normal(size=s)).astype(np.float32) for k, s in shapes.items()}
