"""Reads and writes `.safetensors`: an 8-byte length, a JSON header, then raw little-endian buffers."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxseg.files import replacing

_DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),  # the counters of torch's batch norm
}
_MAX_HEADER = 100_000_000  # The format's own limit.


def read(path: str | Path) -> dict[str, np.ndarray]:
    """Returns the tensors of a `.safetensors` file by name, mapped from disk and read-only.

    float32, float16, bfloat16 and int64. Raises ValueError, naming the file (and the tensor), if the header
    is not valid, a tensor has another dtype, or its bytes lie outside the file.
    """
    path = Path(path)
    header, begin = _header(path)
    header.pop("__metadata__", None)
    if path.stat().st_size == begin:
        data = np.zeros(0, np.uint8)
    else:
        data = np.memmap(path, np.uint8, mode="r", offset=begin)
    return {name: _tensor(f"{path}: {name}", entry, data) for name, entry in header.items()}


def metadata(path: str | Path) -> dict[str, str]:
    """Returns the texts that a file says about itself; {} where there are none. Raises as `read` does."""
    found = _header(Path(path))[0].get("__metadata__")
    return {k: v for k, v in found.items() if isinstance(v, str)} if isinstance(found, dict) else {}


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """(the JSON header, where the buffers begin)."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            raise ValueError(f"{path} is truncated or not a safetensors file: {size} bytes")
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError) as e:
            raise ValueError(f"{path} is not a safetensors file: its header is not JSON") from e
    if not isinstance(header, dict):
        raise ValueError(f"{path} is not a safetensors file: its header is not a JSON object")
    return header, 8 + length


def write(path: str | Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Writes tensors of the dtypes that `read` knows; the file appears whole or not at all."""
    codes = {dtype: code for code, dtype in _DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        code, shape = codes[tensor.dtype], list(tensor.shape)
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # The buffers begin at a multiple of eight.
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(np.ascontiguousarray(tensor).tobytes())


def _tensor(where: str, entry: Any, data: np.ndarray) -> np.ndarray:
    try:
        code, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        valid = isinstance(code, str)
        valid &= all(type(n) is int and n >= 0 for n in (begin, end, *shape))
    except (KeyError, TypeError, ValueError):
        valid = False
    if not valid:
        raise ValueError(f"{where} has no valid dtype, shape and data_offsets: {entry}")
    if code not in _DTYPES:
        raise ValueError(f"{where} is {code}: allowed are {', '.join(_DTYPES)}")
    dtype = _DTYPES[code]
    expected = math.prod(shape) * dtype.itemsize
    if end - begin != expected or end > data.size:
        raise ValueError(
            f"{where} of shape {shape} needs {expected} bytes, found {begin} to {end} of the file's "
            f"{data.size}: truncated or damaged"
        )
    return data[begin:end].view(dtype).reshape(shape)
