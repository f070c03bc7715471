import pickle

import ml_dtypes
import numpy as np
import pytest
from checkpoints import Call, Name, Strided, write_pth

from jaxseg.weights import torch_pickle


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.int64])
def test_reads_every_dtype(tmp_path, dtype):
    x = np.arange(24).reshape(2, 3, 4).astype(dtype)
    tensor = torch_pickle.read(write_pth(tmp_path / "x.pth", {"x": x, "epoch": 3}))["x"]
    assert tensor.shape == (2, 3, 4)
    got = tensor.read()
    assert got.dtype == x.dtype
    np.testing.assert_array_equal(got, x)


def test_reads_strided_views_and_empty_tensors(tmp_path):
    storage = np.arange(20, dtype=np.float32)
    view = Strided(storage, 3, (2, 4), (1, 4))  # A transposed slice.
    tree = {"view": view, "empty": np.zeros((0, 5), np.float32), "scalar": np.float32([7])[0:1]}
    tree = torch_pickle.read(write_pth(tmp_path / "x.pth", tree))
    np.testing.assert_array_equal(tree["view"].read(), storage[3:19].reshape(4, 4).T[:2])
    assert tree["view"].read().flags.c_contiguous
    assert tree["empty"].read().shape == (0, 5)


def test_reads_training_files_with_options_and_parameters(tmp_path):
    x = np.ones((2, 2), np.float32)
    options = Call(Name("argparse", "Namespace"), (), {"arch": "vit_small", "lr": 5e-4})
    state = Call(Name("collections", "OrderedDict"), (), {"_metadata": {}})
    parameter = Call(Name("torch._utils", "_rebuild_parameter"), (x, True, state))
    tree = {"args": options, "epoch": 100, "lrs": [0.1, None, True], "w": parameter}
    tree = torch_pickle.read(write_pth(tmp_path / "x.pth", tree))
    assert tree["epoch"] == 100 and tree["lrs"] == [0.1, None, True] and tree["args"] == {}
    np.testing.assert_array_equal(tree["w"].read(), x)


@pytest.mark.parametrize("module", [b"numpy.core", b"numpy._core"], ids=["NumPy 1", "NumPy 2"])
def test_numpy_scalars_of_an_optimizer_are_passed_over(module):
    """DINO's schedules are arrays, so its training files hold their elements, pickled by NumPy."""
    tree = {
        "optimizer": {"param_groups": [{"lr": np.linspace(0, 1, 3)[1], "eps": 1e-8}]},
        "epoch": 3,
    }
    pickled = pickle.dumps(tree, protocol=2)
    assert b"scalar" in pickled
    pickled = pickled.replace(b"numpy._core", module).replace(b"numpy.core", module)
    found = torch_pickle.interpret(pickled, "x.pth", None)
    assert found == {"optimizer": {"param_groups": [{"lr": None, "eps": 1e-8}]}, "epoch": 3}


@pytest.mark.parametrize(
    ("call", "shown"),
    [
        (Call(Name("os", "system"), ("touch {}",)), "os.system"),
        (Call(Name("posix", "system"), ("touch {}",)), "posix.system"),
        (Call(Name("builtins", "exec"), ("open('{}', 'w')",)), "builtins.exec"),
        (Call(Name("torch", "load"), ("{}",)), "torch.load"),
        (Call(Name("numpy", "ndarray"), ()), "numpy.ndarray"),
    ],
)
def test_malicious_pickle_is_refused_by_name_and_does_not_run(tmp_path, call, shown):
    victim = tmp_path / "victim"
    call.args = tuple(arg.format(victim) for arg in call.args)
    path = write_pth(tmp_path / "bad.pth", {"x": np.ones(3, np.float32), "y": call})
    with pytest.raises(ValueError, match=rf"bad.pth: it refers to {shown}.*nothing of it was run"):
        torch_pickle.read(path)
    assert not victim.exists()


def test_state_set_on_globals_has_no_effect(tmp_path):
    attack = Call(Name("torch._utils", "_rebuild_parameter"), (np.ones(2, np.float32),))
    attack.state = {"read": "nothing", "shape": (10**9,)}
    tensor = torch_pickle.read(write_pth(tmp_path / "x.pth", {"x": attack}))["x"]
    np.testing.assert_array_equal(tensor.read(), np.ones(2))


@pytest.mark.parametrize(
    "tensor",
    [
        Strided(np.zeros(6, np.float32), 1, (2, 3), (3, 1)),
        Strided(np.zeros(6, np.float32), 0, (2, 3), (4, 1)),
        Strided(np.zeros(1, np.float32), 0, (10**9,), (0,)),
        Strided(np.zeros(6, np.float32), -1, (2,), (1,)),
        Strided(np.zeros(6, np.float32), 0, (2, 3), (-1, 1)),
        Strided(np.zeros(6, np.float32), 0, (2, 3), (1,)),
    ],
)
def test_tensors_outside_their_storage_are_refused(tmp_path, tensor):
    with pytest.raises(ValueError, match="x.pth.*(does not fit|damaged)"):
        torch_pickle.read(write_pth(tmp_path / "x.pth", {"x": tensor}))


def test_truncated_and_damaged_files(tmp_path):
    whole = write_pth(tmp_path / "whole.pth", {"x": np.arange(1000, dtype=np.float32)})
    data = whole.read_bytes()
    for size in [0, 1, 3, 100, len(data) // 2, len(data) - 10]:
        path = tmp_path / f"cut{size}.pth"
        path.write_bytes(data[:size])
        with pytest.raises(ValueError, match=f"cut{size}.pth"):
            torch_pickle.read(path)["x"].read()
    flipped = bytearray(data)
    flipped[data.index(np.float32(500).tobytes() + np.float32(501).tobytes())] ^= 255
    (tmp_path / "flipped.pth").write_bytes(flipped)
    with pytest.raises(ValueError, match="flipped.pth.*damaged"):
        torch_pickle.read(tmp_path / "flipped.pth")["x"].read()


def test_random_damage_to_the_pickle_never_escapes_as_another_error(tmp_path):
    data = bytearray(write_pth(tmp_path / "x.pth", {"x": np.ones(4, np.float32)}).read_bytes())
    rng = np.random.default_rng(0)
    start = data.index(b"\x80\x02}")
    for _ in range(150):
        broken = bytearray(data)
        broken[start + rng.integers(0, 150)] = rng.integers(0, 256)
        (tmp_path / "y.pth").write_bytes(broken)
        with pytest.raises(ValueError, match="y.pth"):  # The checksum catches it...
            torch_pickle.read(tmp_path / "y.pth")


@pytest.mark.filterwarnings("ignore:invalid escape sequence")
def test_random_pickles_never_escape_as_another_error():
    rng = np.random.default_rng(0)
    good = b"\x80\x02}(X\x01\x00\x00\x00actorch\nFloatStorage\nX\x01\x00\x00\x00b](K\x01K\x02eu."
    for _ in range(3000):
        broken = bytearray(good)
        for _ in range(rng.integers(1, 4)):
            broken[rng.integers(0, len(broken))] = rng.integers(0, 256)
        try:
            torch_pickle.interpret(bytes(broken), "p", lambda *_: None)
        except ValueError:
            continue


def test_other_kinds_of_file(tmp_path):
    legacy = tmp_path / "old.pth"
    legacy.write_bytes(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.")
    with pytest.raises(ValueError, match=r"old.pth.*before 1.6.*Re-save.*torch.save"):
        torch_pickle.read(legacy)
    text = tmp_path / "page.pth"
    text.write_text("<html>404</html>")
    with pytest.raises(ValueError, match="page.pth is not a PyTorch file"):
        torch_pickle.read(text)
