"""Backbones out of workdirs of every kind of run."""

import json

import numpy as np
import orbax.checkpoint as ocp
import pytest
from tiny import tiny_config

from jaxseg import backbones
from jaxseg.assembly import make_backbone
from jaxseg.backbones import pretrained
from jaxseg.checksums import with_checksums

VARIANT = backbones.BACKBONES["resnet10_mini"]


def _leaf(value):
    return {"conv1": {"kernel": np.full(3, value, np.float32)}}


def _workdir(path, *, state=None, frozen=None):
    path.mkdir()
    description = {"variant": backbones.to_json(VARIANT)}
    (path / "model.json").write_text(json.dumps(description))
    folders = {path / "checkpoints" / "5" / "default": state, path / "frozen": frozen}
    with ocp.StandardCheckpointer() as checkpointer:
        for folder, tree in folders.items():
            if tree is not None:
                checkpointer.save(folder.absolute(), with_checksums(tree))
    return path


DINO = {
    "params": {"backbone": _leaf(1)},
    "extra": {
        "teacher": {"backbone": _leaf(2)},
        "teacher_statistics": {"backbone": _leaf(3), "head": _leaf(9)},
        "student_statistics": {"backbone": _leaf(9), "head": _leaf(9)},
    },
}
ROTATION = {"params": {"backbone": _leaf(2)}, "extra": {"statistics": _leaf(3)}}
DENSE = {
    "params": {"backbone": _leaf(1)},
    "average": {"backbone": _leaf(2)},
    "extra": {"batch_stats": {"backbone": _leaf(3), "head": _leaf(9)}},
}
FROZEN = {"params": {"head": _leaf(9)}, "extra": DENSE["extra"]}


@pytest.mark.parametrize(
    ("state", "frozen"),
    [(DINO, None), (ROTATION, None), (DENSE, None), (FROZEN, {"backbone": _leaf(2)})],
    ids=["dino", "rotation", "dense", "frozen"],
)
def test_the_trained_backbone_and_its_statistics(tmp_path, state, frozen):
    loaded = pretrained.load(_workdir(tmp_path / "w", state=state, frozen=frozen))
    np.testing.assert_array_equal(loaded.params["conv1"]["kernel"], [2, 2, 2])
    np.testing.assert_array_equal(loaded.statistics["conv1"]["kernel"], [3, 3, 3])
    assert loaded.variant == VARIANT


def test_frozen_and_trained_layers_are_put_together(tmp_path):
    state = {"params": {"backbone": {"layer1_0": _leaf(1)}}, "extra": None}
    frozen = {"backbone": _leaf(2), "head": {"prior": _leaf(9)}}
    loaded = pretrained.load(_workdir(tmp_path / "w", state=state, frozen=frozen))
    assert set(loaded.params) == {"conv1", "layer1_0"} and loaded.statistics == {}


def test_nothing_saved_yet(tmp_path):
    with pytest.raises(ValueError, match="holds no checkpoint yet"):
        pretrained.load(_workdir(tmp_path / "w"))


def _damage(folder):
    """Turns one bit of the largest array over."""
    file = max(folder.rglob("d/*"), key=lambda path: path.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def test_the_config_of_others_is_none_of_ours(tmp_path):
    """Released weights are often published as a folder with a config.json."""
    (tmp_path / "config.json").write_text('{"architectures": ["ViTModel"]}')
    with pytest.raises(ValueError, match="is no workdir of a run: .* or .safetensors, in such a"):
        make_backbone(tiny_config(backbone__weights=str(tmp_path)))


def test_damaged_checkpoints_are_passed_over(tmp_path, caplog):
    workdir = tmp_path / "w"
    value = np.random.default_rng(0).normal(size=(300, 90)).astype(np.float32)
    states = [{"params": {"backbone": {"w": value * step}}, "extra": None} for step in (1, 2)]
    _workdir(workdir, state=states[1])
    with ocp.StandardCheckpointer() as checkpointer:
        older = (workdir / "checkpoints" / "4" / "default").absolute()
        checkpointer.save(older, with_checksums(states[0]))
    np.testing.assert_array_equal(pretrained.load(workdir).params["w"], 2 * value)
    _damage(workdir / "checkpoints" / "5")
    np.testing.assert_array_equal(pretrained.load(workdir).params["w"], value)
    assert "5/default cannot be read" in caplog.text and "\n" not in caplog.messages[0]
    _damage(workdir / "checkpoints" / "4")
    with pytest.raises(ValueError, match="4/default cannot be read"):
        pretrained.load(workdir)
