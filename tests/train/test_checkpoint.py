"""Checkpoints: what is kept, and what happens to damaged ones."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxseg import checksums
from jaxseg.checksums import CheckpointError
from jaxseg.train import checkpoint
from jaxseg.train.checkpoint import Checkpointer
from jaxseg.train.state import ScoredState, TrainState


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


def _trained(optimizer, params, step):
    """The state of a run at `step`, with an average and an extra state."""
    half = jax.tree.map(lambda x: x / 2, params)
    return TrainState(jnp.int32(step), params, half, {"seen": params}, optimizer.init(params))


def test_what_is_scored_is_read_without_the_optimisers_state(tmp_path):
    params = {"head": _state(3)["params"]}
    saver = Checkpointer(tmp_path)
    saver.save(_trained(optax.adam(1e-3), params, 3), 3)
    saver.wait()
    saver.close()

    zeros = jax.tree.map(jnp.zeros_like, params)
    like = ScoredState(jnp.int32(0), zeros, zeros, {"seen": zeros})
    reader = Checkpointer(tmp_path, read_only=True)
    with pytest.raises(CheckpointError, match="none of the checkpoints"):
        reader.restore(_trained(optax.sgd(1e-3), zeros, 0))  # a state of another optimiser
    state, step = reader.restore(like, whole=False)
    assert step == 3 and int(state.step) == 3
    np.testing.assert_array_equal(state.params["head"]["w"], params["head"]["w"])
    np.testing.assert_array_equal(state.best_params["head"]["w"], params["head"]["w"] / 2)
    np.testing.assert_array_equal(state.extra["seen"]["head"]["w"], params["head"]["w"])


def test_arrays_that_are_scored_are_checked_too(tmp_path):
    params = _state(1)["params"]
    saver = Checkpointer(tmp_path)
    saver.save(_trained(optax.sgd(1e-3), params, 1), 1)
    saver.wait()
    reader = Checkpointer(tmp_path, read_only=True)
    more = {**params, "b": jnp.zeros(3)}
    with pytest.raises(CheckpointError, match="belong to another model"):
        reader.restore(ScoredState(jnp.int32(0), more, more, None), whole=False)
    file = _largest_file(tmp_path / "checkpoints" / "1")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0xFF
    file.write_bytes(data)
    like = ScoredState(jnp.int32(0), params, params, {"seen": params})
    with pytest.raises(CheckpointError, match="damaged"):
        reader.restore(like, whole=False)
