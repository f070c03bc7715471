import io
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image, ImageFile

from jaxseg import data
from jaxseg.data import DataError, Tfds

TRUNCATED = 5  # of the feature "damaged"


def png(array):
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, "PNG")
    stream.seek(0)
    return stream


def pixels(index):
    """Example `index` as the builders below write it: the mask is a trimap of 1, 2 and 3."""
    image = np.full((20 + index, 30, 3), index, np.uint8)
    trimap = np.arange(30 * (20 + index), dtype=np.uint8).reshape(20 + index, 30) % 3 + 1
    return image, trimap


class TinyPets(tfds.core.GeneratorBasedBuilder):
    # TFDS looks for the sources of a builder in a package with importlib_resources, which it does
    # not require.
    __module__ = "tiny_pets"
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "segmentation_mask": tfds.features.Image(shape=(None, None, 1)),
            "binary": tfds.features.Image(shape=(None, None, 1)),
            "grey": tfds.features.Image(shape=(None, None, 1)),
            "small": tfds.features.Image(shape=(None, None, 1)),
            "damaged": tfds.features.Image(shape=(None, None, 3)),
            "tensor": tfds.features.Tensor(shape=(4, 6, 1), dtype=np.uint8),
            "label": tfds.features.ClassLabel(names=["cat", "dog"]),
        }
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(6), "validation": self._generate_examples(3)}

    def _generate_examples(self, count):
        for index in range(count):
            image, trimap = pixels(index)
            damaged = png(np.random.default_rng(0).integers(0, 256, (50, 50, 3), np.uint8))
            if index == TRUNCATED:
                damaged.truncate(4000)
            yield (
                index,
                {
                    "image": png(image),
                    "segmentation_mask": png(trimap),
                    "binary": png((trimap == 1).astype(np.uint8) * 255),
                    "grey": png(image[..., 0]),
                    "small": png(np.zeros((2, 2), np.uint8)),
                    "damaged": damaged,
                    "tensor": np.full((4, 6, 1), index % 2, np.uint8),
                    "label": index % 2,
                },
            )


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("tfds"))
    TinyPets(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


def create(root, split="train", **options):
    defaults = {"name": "tiny_pets", "foreground": (1,), "void": (3,)}
    return Tfds(root, split, **(defaults | options))


def test_trimap(root):
    source = create(root)
    assert len(source) == 6 and source.categories == ("object",)
    for index in range(6):
        image, trimap = pixels(index)
        example = source[index]
        assert example["image"].dtype == example["mask"].dtype == np.uint8
        np.testing.assert_array_equal(example["image"], image)
        np.testing.assert_array_equal(example["mask"], np.choose(trimap - 1, (1, 0, 255)))
    assert source.sizes() == [(20 + i, 30) for i in range(6)]
    assert len({source[i]["name"] for i in range(6)}) == 6


def test_plain_binary_masks_need_no_mapping(root):
    source = create(root, mask_key="binary", foreground=())
    np.testing.assert_array_equal(source[2]["mask"], pixels(2)[1] == 1)


def test_grey_images(root):
    assert create(root, image_key="grey")[3]["image"].shape == (23, 30, 3)


def test_tensor_features(root):
    source = create(root, image_key="tensor", mask_key="tensor", void=())
    assert source.sizes() == [(4, 6)] * 6
    assert source[1]["image"].shape == (4, 6, 3) and source[1]["mask"].all()
    assert not source[2]["mask"].any()


def test_several_classes(root):
    """Values 3 and 1 are the classes 0 and 1, value 2 is void."""
    source = Tfds(root, name="tiny_pets", classes=("a", "b"), ids=(3, 1), void=(2,))
    assert source.names == ("a", "b")
    trimap = pixels(4)[1]
    want = np.select([trimap == 3, trimap == 1], [0, 1], 255)
    np.testing.assert_array_equal(source[4]["mask"], want)
    options = dict(root=root, name="tiny_pets", classes=("a", "b"))
    with pytest.raises(DataError, match="values 2, 3 are neither classes .*nor void"):
        Tfds(**options)[0]
    with pytest.raises(DataError, match="2 classes in data.classes, 1 values in data.tfds.ids"):
        Tfds(**options, ids=(1,))
    for ids in ((1, 1), (1, 255)):
        with pytest.raises(DataError, match="data.tfds.ids=.*allowed is each value once, and none"):
            Tfds(**options, ids=ids)
    with pytest.raises(DataError, match="2 names, 1 of them different; allowed are at most 255"):
        Tfds(**options | {"classes": ("a", "a")}, ids=(1, 2))


def test_truncated_images_are_errors(root):
    """TFDS's own decoder would show them half grey, and make Pillow accept others too."""
    source = create(root, image_key="damaged", mask_key="damaged", foreground=(1,))
    assert source[TRUNCATED - 1]["image"].shape == (50, 50, 3)
    with pytest.raises(DataError, match="train example 5 damaged: cannot be read as an image"):
        source[TRUNCATED]
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


def test_splits(root):
    assert len(create(root, "val")) == len(create(root, "validation")) == 3
    assert len(create(root, "train[50%:]").split("val")) == 3
    half = create(root, "train[50%:]")
    assert len(half) == 3 and half[0]["name"].isascii() and "/" not in half[0]["name"]
    np.testing.assert_array_equal(half[0]["image"], pixels(3)[0])
    with pytest.raises(DataError, match="no split 'test'; it has train, validation"):
        create(root, "test")


def test_through_the_loader(root):
    source = create(root)
    batches = list(data.eval_batches(source, batch=4, size=(16, 16), num_threads=4))
    assert [b["image"].shape for b in batches] == [(4, 16, 16, 3)] * 2


def test_errors(root):
    with pytest.raises(DataError, match="no feature 'mask'; it has .*segmentation_mask"):
        create(root, mask_key="mask")
    with pytest.raises(DataError, match="data.categories is cat; .* all of object"):
        create(root, categories=["cat"])
    with pytest.raises(
        DataError, match="example 0 segmentation_mask: mask values 1, 2, 3 .*name the foreground"
    ):
        create(root, foreground=())[0]
    with pytest.raises(DataError, match="example 1: image .21, 30. and mask .2, 2. must have"):
        create(root, mask_key="small")[1]
    with pytest.raises(DataError, match="no data set 'none'.*file_format='array_record'"):
        create(root, name="none")
    with pytest.raises(DataError, match="data.tfds.name is empty"):
        create(root, name="")
    with pytest.raises(IndexError):
        create(root)[6]


def test_not_prepared(root, tmp_path):
    with pytest.raises(DataError, match="not prepared.*data_dir='.*array_record'.*download_and"):
        create(str(tmp_path), name="oxford_iiit_pet")


def test_reading_takes_neither_the_builder_nor_tensorflow(root):
    script = f"""
import pickle
import sys
from jaxseg.data import FORMATS
assert not {{"tensorflow_datasets", "jax"}} & set(sys.modules)
source = FORMATS["tfds"]({root!r}, name="tiny_pets", foreground=(1,))
sent = pickle.loads(pickle.dumps(source))  # as to a worker process
assert (sent[1]["mask"] == source[1]["mask"]).all()
assert source.sizes()[1] == (21, 30)
assert not {{"tensorflow", "torch", "cv2"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
