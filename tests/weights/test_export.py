"""Backbones written to one file: the release's own tensors, and the same features."""

import jax
import numpy as np
import pytest
from shared import shared_path
from tiny import tiny_config

from jaxseg import modes, run, weights
from jaxseg.experiment import Backbone
from jaxseg import backbones
from jaxseg.backbones import vit
from jaxseg.weights import safetensors_file as safetensors
from jaxseg.weights import torch_pickle
from jaxseg.weights import vit_tensors as convert


def test_back_to_the_release():
    path = shared_path("golden/dino_vit_tiny_random.pth")
    tensors = {k: np.asarray(v.read()) for k, v in torch_pickle.read(path).items()}
    variant = vit.Variant("golden", patch=16, dim=96, depth=3, heads=3, grid=14)
    params, _ = convert.to_flax(tensors, variant=variant, source=str(path))
    back = convert.from_flax(params, variant)
    assert back.keys() == tensors.keys()
    for name, tensor in back.items():
        np.testing.assert_array_equal(tensor, tensors[name].astype(np.float32), name)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_written_files_are_read_back(tmp_path, dtype):
    rng = np.random.default_rng(0)
    tensors = {"a.b": rng.normal(size=(3, 5)).astype(dtype), "c": np.array(2, dtype)}
    safetensors.write(tmp_path / "x.safetensors", tensors, {"format": "pt"})
    found = safetensors.read(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys() and len(list(tmp_path.iterdir())) == 1
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(found[name], tensor)


def test_a_run_is_exported(tmp_path, capsys):
    config = tiny_config(train__steps=2)
    run.train(config, tmp_path / "w")
    file = tmp_path / "new" / "vit.safetensors"
    modes.main("export", config=None, overrides={}, workdir=tmp_path / "w", outputs=str(file))
    assert "vit_micro16" in capsys.readouterr().out
    best = {"eval.checkpoint": "best"}
    with pytest.raises(ValueError, match="takes no config.eval.checkpoint"):
        modes.main("export", config=None, overrides=best, workdir=tmp_path / "w", outputs="x")
    other = tiny_config(backbone__weights=str(tmp_path / "w"), backbone__normalization="none")
    with pytest.raises(ValueError, match="normalization is 'none'; the run in .*'imagenet'"):
        Backbone.load(other)
    ours, theirs = weights.load(tmp_path / "w"), weights.load(file)
    assert theirs.variant == backbones.BACKBONES["vit_micro16"]
    for a, b in zip(jax.tree.leaves(ours.params), jax.tree.leaves(theirs.params), strict=True):
        np.testing.assert_array_equal(a.astype(np.float16), b)


def test_a_damaged_variant_is_named(tmp_path):
    file = tmp_path / "x.safetensors"
    safetensors.write(file, {"a": np.zeros(1, np.float32)}, {"jaxseg.variant": "{}"})
    with pytest.raises(ValueError, match="x.safetensors: jaxseg.variant is damaged"):
        weights.load(file)


def test_what_cannot_be_exported(tmp_path):
    with pytest.raises(ValueError, match="names that end in .safetensors"):
        weights.export(tmp_path, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="model.json is missing"):
        weights.export(tmp_path, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="needs --outputs=FILE.safetensors"):
        modes.main("export", config=None, overrides={}, workdir=tmp_path)
    assert not list(tmp_path.iterdir())
