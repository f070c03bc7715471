import dataclasses
import hashlib

import jax
import ml_dtypes
import numpy as np
import pytest
from checkpoints import vit_tensors, write_pth, write_safetensors

from jaxseg.backbones import build, pretrained, vit
from jaxseg.weights import catalog


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("write", [write_pth, write_safetensors])
def test_pth_and_safetensors_of_every_dtype(tmp_path, write, dtype):
    tensors = {k: v.astype(dtype) for k, v in vit_tensors().items()}
    path = write(tmp_path / ("x.pth" if write is write_pth else "x.safetensors"), tensors)
    loaded = pretrained.load(path)
    assert loaded.source == str(path)
    assert loaded.digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert dataclasses.astuple(loaded.variant)[1:] == (4, 64, 2, 1, 3, 4, False, 0, 0.1, False)
    kernel = loaded.params["blocks_0"]["mlp"]["fc1"]["kernel"]
    assert kernel.dtype == np.float32
    np.testing.assert_array_equal(kernel, tensors["blocks.0.mlp.fc1.weight"].T.astype(np.float32))


def test_bad_arguments(tmp_path):
    with pytest.raises(
        ValueError, match="no weights 'dino_vits61': neither a file nor .*dino_vits16"
    ):
        pretrained.load("dino_vits61")
    with pytest.raises(ValueError, match=f"{tmp_path}"):
        pretrained.load(tmp_path)
    path = write_pth(tmp_path / "x.pth", vit_tensors())
    with pytest.raises(ValueError, match="branch is 'pupil'"):
        pretrained.load(path, branch="pupil")
    with pytest.raises(ValueError, match="no backbone is called 'huge'"):
        pretrained.load(path, variant="huge")
    with pytest.raises(ValueError, match="x.pth as dino_vits16: .*missing.*has shape .*expected"):
        pretrained.load(path, variant="dino_vits16")


@pytest.fixture
def published(tmp_path, monkeypatch):
    """Makes `dino_vits16` of the catalogue a small file at a file:// address."""
    path = write_pth(tmp_path / "published.pth", vit_tensors())
    entry = catalog.Entry(path.as_uri(), hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setitem(catalog.CATALOG, "dino_vits16", entry)
    monkeypatch.setenv("JAXSEG_CACHE", str(tmp_path / "cache"))
    return path


def test_fetch_downloads_once_into_the_cache(published, tmp_path):
    path = catalog.fetch("dino_vits16")
    assert path == tmp_path / "cache" / "published.pth"
    assert path.read_bytes() == published.read_bytes()
    published.unlink()
    assert catalog.fetch("dino_vits16") == path
    assert list(path.parent.iterdir()) == [path]


def test_load_by_name_expects_the_named_variant(published, tmp_path):
    with pytest.raises(ValueError, match="published.pth as dino_vits16: missing tensors"):
        pretrained.load("dino_vits16", cache_dir=tmp_path / "other")
    tiny = vit.Variant("tiny", 4, 64, 2, 1, grid=3)
    assert pretrained.load("dino_vits16", variant=tiny).variant is tiny


def test_offline_says_which_file_to_put_where(published, tmp_path):
    published.unlink()
    target = tmp_path / "cache" / "published.pth"
    with pytest.raises(OSError, match="cannot download") as e:
        pretrained.load("dino_vits16")
    assert f"fetch {published.as_uri()}" in str(e.value) and f"put it at {target}" in str(e.value)
    assert not list(target.parent.iterdir())


def test_wrong_checksum_leaves_nothing(published, tmp_path):
    published.write_bytes(published.read_bytes() + b"x")
    with pytest.raises(ValueError, match="has sha256 .* expected"):
        catalog.fetch("dino_vits16")
    assert not list((tmp_path / "cache").iterdir())


def test_damaged_file_in_the_cache_is_noticed(published):
    path = catalog.fetch("dino_vits16")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"{path} has sha256 .*: delete the file"):
        pretrained.load("dino_vits16")


def test_built_in_weights_are_those_of_their_card(monkeypatch):
    monkeypatch.setattr(catalog, "_download", None)
    for name, path in catalog.BUILT_IN.items():
        loaded = pretrained.load(name)
        sizes = [leaf.size for leaf in jax.tree.leaves(loaded.params)]
        assert sum(sizes) <= 6e6 and path.stat().st_size <= 12e6
        assert loaded.digest in path.with_suffix(".md").read_text()
        image = np.random.default_rng(0).normal(size=(1, 64, 64, 3)).astype(np.float32)
        out = build(loaded.variant).apply({"params": loaded.params}, image)
        assert np.isfinite(out["patches"]).all() and np.std(out["patches"]) > 0.1


def test_catalogue_names_are_variants():
    assert catalog.CATALOG.keys() <= vit.VARIANTS.keys()
    assert all(entry.url.endswith(".pth") for entry in catalog.CATALOG.values())
    with pytest.raises(
        ValueError, match="no weights are called 'x': allowed are shapes_micro8, dino_"
    ):
        catalog.fetch("x")
