"""Images without masks: folders and zip files, with and without splits and classes."""

import pickle
import zipfile

import numpy as np
import pytest
from PIL import Image
from shared import shared_path

from jaxseg.data import DataError
from jaxseg.data.formats.images import Images


def _make(root, names):
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((4 + i, 5, 3), i, np.uint8)).save(root / name)


def _zipped(root, target):
    with zipfile.ZipFile(target, "w") as archive:
        for path in sorted(root.rglob("*")):
            if path.is_file():
                archive.write(path, path.relative_to(root))
    return target


NAMES = ("train/cat/a.png", "train/dog/b.png", "train/dog/deep/c.png", "val/dog/d.png")


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_splits_and_classes(tmp_path, kind):
    _make(tmp_path / "in", (*NAMES, "train/.hidden/e.png"))
    (tmp_path / "in/train/notes.txt").write_text("no image")
    root = tmp_path / "in" if kind == "folder" else _zipped(tmp_path / "in", tmp_path / "x.zip")
    source = Images(root, "train")
    assert source.categories == ("cat", "dog") and len(source) == 3
    assert [source[i]["category"] for i in range(3)] == [0, 1, 1]
    assert [source[i]["name"] for i in range(3)] == list(NAMES[:3])
    assert [(source[i]["image"] == i).all() for i in range(3)] == [True] * 3
    assert source.sizes() == [(4, 5), (5, 5), (6, 5)]
    assert Images(root, "train", categories=("dog",)).categories == ("dog",)
    copy = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(copy[1]["image"], source[1]["image"])


def test_without_splits_or_classes(tmp_path):
    _make(tmp_path, ("b.png", "a.png"))
    source = Images(tmp_path, "train")
    assert source.categories == () and [source[i]["name"] for i in range(2)] == ["a.png", "b.png"]
    assert source[0]["category"] == -1
    with pytest.raises(
        DataError, match="no split 'val': it has train, and val of ten images or more"
    ):
        Images(tmp_path, "val")


def test_the_split_in_the_name(tmp_path):
    _make(tmp_path / "in", NAMES)
    _zipped(tmp_path / "in", tmp_path / "all_train.zip")
    assert len(Images(tmp_path / "all_{split}.zip", "train")) == 3


def test_errors(tmp_path):
    with pytest.raises(DataError, match="no such folder or zip file"):
        Images(tmp_path / "none", "train")
    with pytest.raises(DataError, match="data.root is empty"):
        Images("", "train")
    with pytest.raises(DataError, match="holds no images; suffixes are .jpg"):
        Images(tmp_path, "train")
    _make(tmp_path / "in", NAMES)
    with pytest.raises(DataError, match="unknown split 'dev': allowed are train, val, test"):
        Images(tmp_path / "in", "dev")
    with pytest.raises(DataError, match="no split 'test': it has train, val"):
        Images(tmp_path / "in", "test")
    with pytest.raises(DataError, match="no class bird; available: cat, dog"):
        Images(tmp_path / "in", "train", categories=("bird",))
    (tmp_path / "bad.zip").write_bytes(b"PK no zip")
    with pytest.raises(DataError, match="bad.zip is no readable zip file"):
        Images(tmp_path / "bad.zip", "train")
    (tmp_path / "in/train/cat/a.png").write_bytes(b"no png")
    with pytest.raises(DataError, match="a.png: not an image"):
        Images(tmp_path / "in", "train")[0]
    broken = _zipped(tmp_path / "in", tmp_path / "broken.zip")
    with pytest.raises(DataError, match="broken.zip/train/cat/a.png: not an image"):
        Images(broken, "train")[0]


def test_cifar():
    root = str(shared_path("data/cifar10_test.zip")).replace("test", "{split}")
    source = Images(root, "test")
    assert len(source) == 4000 and len(source.categories) == 10
    assert source[1234]["image"].shape == (32, 32, 3)


def test_a_tenth_of_a_folder_without_splits_is_set_aside(tmp_path):
    names = [f"{kind}/{i}.png" for kind in "ab" for i in range(15)]
    _make(tmp_path, names)
    train, val = Images(tmp_path, "train"), Images(tmp_path, "val")
    found = [[source[i]["name"] for i in range(len(source))] for source in (train, val)]
    assert sorted(sum(found, [])) == sorted(names) and len(val) == 3
    assert train.categories == ("a", "b")
    with pytest.raises(DataError, match="no split 'test'"):
        Images(tmp_path, "test")


def test_classes_are_those_of_all_splits(tmp_path):
    _make(tmp_path / "in", NAMES)
    assert Images(tmp_path / "in", "val").categories == ("cat", "dog")
    _make(tmp_path / "flat", [f"{kind}/0.png" for kind in "abcdefghijkl"])
    assert Images(tmp_path / "flat", "val").categories == tuple("abcdefghijkl")


def test_a_folder_around_the_splits_is_passed_over(tmp_path):
    _make(tmp_path / "in" / "pets", NAMES)
    source = Images(_zipped(tmp_path / "in", tmp_path / "pets.zip"), "val")
    assert source.categories == ("cat", "dog") and len(source) == 1
    assert source[0]["name"] == "pets/val/dog/d.png" and source[0]["category"] == 1


@pytest.mark.parametrize("first, second", [("training", "validation"), ("train", "valid")])
def test_other_names_of_splits_are_no_classes(tmp_path, first, second):
    _make(tmp_path, [f"{first}/cat/a.png", f"{second}/cat/b.png"])
    with pytest.raises(DataError, match=f"rename .*{second} to val"):
        Images(tmp_path, "train")


def test_an_encrypted_zip_is_an_error(tmp_path):
    _make(tmp_path / "in", ["train/cat/a.png"])
    data = bytearray(_zipped(tmp_path / "in", tmp_path / "x.zip").read_bytes())
    for start in (data.find(b"PK\x03\x04") + 6, data.find(b"PK\x01\x02") + 8):
        data[start] |= 1  # the flag of encryption
    (tmp_path / "x.zip").write_bytes(data)
    with pytest.raises(DataError, match="x.zip: train/cat/a.png cannot be read: .*encrypted"):
        Images(tmp_path / "x.zip", "train")[0]
