"""Checkpoints: what is kept, and what happens to damaged ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxseg import checksums
from jaxseg.checksums import CheckpointError
from jaxseg.train import checkpoint
from jaxseg.train.checkpoint import Checkpointer


def _state(value: float):
    rng = np.random.default_rng(0)
    # Random numbers, so that the files are large enough to be damaged in the middle of the data.
    big = jnp.asarray(rng.normal(size=(200, 100)), jnp.float32) * value
    return {"params": {"w": big}, "none": None, "step": jnp.int32(value)}


def _save(workdir, steps, metrics=None):
    saver = Checkpointer(workdir)
    for step in steps:
        score = (metrics or {}).get(step)
        saver.save(_state(step), step, None if score is None else {"iou": score})
    saver.wait()
    kept = saver.steps()
    saver.close()
    return kept


def _largest_file(folder):
    return max((f for f in folder.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)


def test_keeps_two_latest_and_best(tmp_path):
    assert _save(tmp_path, range(1, 8), {2: 0.9, 4: 0.5, 6: 0.7}) == [2, 6, 7]
    assert _save(tmp_path, [8, 9]) == [2, 8, 9]  # the best survives a restart
    reader = Checkpointer(tmp_path, read_only=True)
    state, step = reader.restore(_state(0), which="best")
    assert step == 2
    np.testing.assert_array_equal(state["params"]["w"], _state(2)["params"]["w"])
    assert reader.restore(_state(0))[1] == 9


def test_nothing_saved_gives_none(tmp_path):
    assert Checkpointer(tmp_path).restore(_state(0)) is None


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_falls_back_over_a_damaged_checkpoint(tmp_path, damage, caplog):
    _save(tmp_path, [1, 2])
    file = _largest_file(tmp_path / "checkpoints" / "2")
    data = bytearray(file.read_bytes())
    assert len(data) > 20_000
    if damage == "flip":
        data[len(data) // 2] ^= 0xFF
        file.write_bytes(data)
    elif damage == "truncate":
        file.write_bytes(data[: len(data) // 2])
    else:
        file.unlink()
    reader = Checkpointer(tmp_path, read_only=True)
    state, step = reader.restore(_state(0))
    assert step == 1 and int(state["step"]) == 1
    assert "2 cannot be read" in caplog.text and "restored" in caplog.text
    assert (tmp_path / "checkpoints" / "2").exists()  # reading changes nothing
    reader.close()

    saver = Checkpointer(tmp_path)
    assert saver.restore(_state(0))[1] == 1
    assert (tmp_path / "checkpoints" / "damaged-2").exists()
    saver.save(_state(2), 2)
    saver.wait()
    assert saver.restore(_state(0))[1] == 2


def test_all_damaged_is_an_error(tmp_path):
    _save(tmp_path, [1, 2])
    for step in (1, 2):
        _largest_file(tmp_path / "checkpoints" / str(step)).unlink()
    with pytest.raises(CheckpointError, match="none of the checkpoints"):
        Checkpointer(tmp_path).restore(_state(0))
    assert (tmp_path / "checkpoints" / "2").exists()  # nothing is lost


def test_checksum_sees_swaps_and_single_bits():
    a = jnp.arange(1000, dtype=jnp.float32)
    sums = {
        int(checksums.checksum(x)) for x in (a, a[::-1], a.at[500].add(2**-14), a.at[0].set(-0.0))
    }
    assert len(sums) == 4


def test_frozen_parameters_come_back_and_are_checked(tmp_path):
    frozen = {"backbone": {"w": jnp.asarray(np.random.default_rng(1).normal(size=(300, 90)))}}
    checkpoint.save_frozen(tmp_path, frozen)
    checkpoint.save_frozen(tmp_path, jax.tree.map(jnp.zeros_like, frozen))  # is left as it is
    back = checkpoint.restore_frozen(tmp_path, frozen)
    np.testing.assert_array_equal(back["backbone"]["w"], frozen["backbone"]["w"])
    file = _largest_file(tmp_path / "frozen")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0xFF
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="damaged|frozen"):
        checkpoint.restore_frozen(tmp_path, frozen)
    checkpoint.save_frozen(tmp_path, frozen)  # writes a damaged copy anew
    back = checkpoint.restore_frozen(tmp_path, frozen)
    np.testing.assert_array_equal(back["backbone"]["w"], frozen["backbone"]["w"])
    with pytest.raises(CheckpointError, match="missing"):
        checkpoint.restore_frozen(tmp_path / "other", frozen)
