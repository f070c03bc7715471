import json
import struct

import ml_dtypes
import numpy as np
import pytest
from checkpoints import write_safetensors

from jaxseg.weights import safetensors_file as safetensors


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_reads_what_was_written(tmp_path, dtype):
    tensors = {
        "a.b": np.arange(6).reshape(2, 3).astype(dtype),
        "empty": np.zeros((0, 4), dtype),
        "one": np.float32([[1.5]]).astype(dtype),
    }
    got = safetensors.read(write_safetensors(tmp_path / "x.safetensors", tensors))
    assert got.keys() == tensors.keys()
    for name, x in tensors.items():
        assert got[name].dtype == x.dtype and got[name].shape == x.shape
        np.testing.assert_array_equal(got[name], x)


def _file(path, header, data=b"", length=None):
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(encoded) if length is None else length
    path.write_bytes(struct.pack("<Q", length) + encoded + data)
    return path


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"dtype": "I32", "shape": [2], "data_offsets": [0, 8]}, "x is I32: allowed are F32"),
        (
            {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]},
            "x of shape .* needs 12 bytes.*truncated",
        ),
        ({"dtype": "F32", "shape": [1], "data_offsets": [0, 8]}, "x of shape .* needs 4 bytes"),
        ({"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}, "x has no valid dtype"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}, "x has no valid dtype"),
        ({"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 8]}, "x of shape .* needs"),
        ({"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}, "x has no valid dtype"),
        ({"dtype": "F32", "shape": [1]}, "x has no valid dtype"),
        ("text", "x has no valid dtype"),
    ],
)
def test_bad_entries_name_the_tensor(tmp_path, entry, message):
    path = _file(tmp_path / "bad.safetensors", {"x": entry}, bytes(8))
    with pytest.raises(ValueError, match=f"bad.safetensors: {message}"):
        safetensors.read(path)


@pytest.mark.parametrize(
    ("header", "length"),
    [(b"", None), (b"{", None), (b"[]", None), (b"{}", 2**40), (b"\xff\xfe", None)],
)
def test_bad_headers_name_the_file(tmp_path, header, length):
    path = _file(tmp_path / "bad.safetensors", header, length=length)
    with pytest.raises(ValueError, match="bad.safetensors"):
        safetensors.read(path)


def test_empty_file(tmp_path):
    (tmp_path / "bad.safetensors").touch()
    with pytest.raises(ValueError, match="bad.safetensors is truncated"):
        safetensors.read(tmp_path / "bad.safetensors")
