"""Backbones written to one file: the release's own tensors, and the same features."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from shared import shared_path
from tiny import tiny_config

from jaxseg import backbones, cli, workdir
from jaxseg.assembly import make_backbone
from jaxseg.backbones import pretrained, vit, vit_weights
from jaxseg.tasks import Facts
from jaxseg.train.checkpoint import Checkpointer
from jaxseg.train.state import TrainState
from jaxseg.weights import safetensors_file, torch_pickle


def _command(folder, outputs="", **overrides):
    options = {"mode": "export", "workdir": folder, "inputs": "", "outputs": str(outputs)}
    cli._run(options, None, {k.replace("__", "."): v for k, v in overrides.items()})


def test_back_to_the_release():
    path = shared_path("golden/dino_vit_tiny_random.pth")
    tensors = {k: np.asarray(v.read()) for k, v in torch_pickle.read(path).items()}
    variant = vit.Variant("golden", patch=16, dim=96, depth=3, heads=3, grid=14)
    params, _ = vit_weights.to_flax(tensors, variant=variant, source=str(path))
    back = vit_weights.from_flax(params, variant)
    assert back.keys() == tensors.keys()
    for name, tensor in back.items():
        np.testing.assert_array_equal(tensor, tensors[name].astype(np.float32), name)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_written_files_are_read_back(tmp_path, dtype):
    rng = np.random.default_rng(0)
    tensors = {"a.b": rng.normal(size=(3, 5)).astype(dtype), "c": np.array(2, dtype)}
    safetensors_file.write(tmp_path / "x.safetensors", tensors, {"format": "pt"})
    found = safetensors_file.read(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys() and len(list(tmp_path.iterdir())) == 1
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(found[name], tensor)


def _begun(folder, config):
    """A workdir with a checkpoint, as a training writes it, of parameters drawn by NumPy."""
    made = make_backbone(config)
    image = jnp.zeros((1, 32, 32, 3))
    shapes = jax.eval_shape(made.module.init, jax.random.key(0), image)["params"]
    rng = np.random.default_rng(0)
    drawn = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), shapes)
    folder.mkdir()
    workdir.begin(folder, config, workdir.Description(made.variant, Facts((32, 32)), ""))
    saver = Checkpointer(folder)
    saver.save(TrainState(jnp.int32(2), {"backbone": drawn}, None, None, ()), 2)
    saver.wait()
    saver.close()


def test_a_run_is_exported(tmp_path, capsys):
    _begun(tmp_path / "w", tiny_config())
    file = tmp_path / "new" / "vit.safetensors"
    _command(tmp_path / "w", file)
    printed = capsys.readouterr().out
    assert "vit_micro16" in printed and "the head of the run is not in it" in printed
    with pytest.raises(ValueError, match="takes no config.eval.checkpoint"):
        _command(tmp_path / "w", "x", eval__checkpoint="best")
    other = tiny_config(backbone__weights=str(tmp_path / "w"), backbone__normalization="none")
    with pytest.raises(ValueError, match="normalization is 'none'; the run in .*'imagenet'"):
        make_backbone(other)
    ours, theirs = pretrained.load(tmp_path / "w"), pretrained.load(file)
    assert theirs.variant == backbones.BACKBONES["vit_micro16"]
    for a, b in zip(jax.tree.leaves(ours.params), jax.tree.leaves(theirs.params), strict=True):
        np.testing.assert_array_equal(a.astype(np.float16), b)


def test_a_damaged_variant_is_named(tmp_path):
    file = tmp_path / "x.safetensors"
    safetensors_file.write(file, {"a": np.zeros(1, np.float32)}, {"jaxseg.variant": "{}"})
    with pytest.raises(ValueError, match="x.safetensors: jaxseg.variant is damaged"):
        pretrained.load(file)


def test_what_cannot_be_exported(tmp_path):
    with pytest.raises(ValueError, match="names that end in .safetensors"):
        pretrained.export(tmp_path, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="model.json is missing"):
        pretrained.export(tmp_path, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="needs --outputs=FILE.safetensors"):
        _command(tmp_path)
    assert not list(tmp_path.iterdir())
