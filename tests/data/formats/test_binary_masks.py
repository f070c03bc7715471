import pickle
import shutil

import numpy as np
import pytest
from PIL import Image
from shared import shared_path

from jaxseg.data import BinaryMasks, DataError, list_images, write_image, write_mask

SHAPE = (6, 8)


def put(folder, stem, *, image=".png", mask=".png", masks="annotations", shape=SHAPE, value=9):
    for name in ("images", masks):
        (folder / name).mkdir(parents=True, exist_ok=True)
    if image:
        write_image(folder / "images" / (stem + image), np.full((*shape, 3), value, np.uint8))
    if mask:
        pixels = np.zeros(shape, bool)
        pixels[0] = True
        write_mask(folder / masks / (stem + mask), pixels)


@pytest.fixture
def root(tmp_path):
    """The layout with categories: train has cat (a, b) and dog (a), test has cat (c)."""
    put(tmp_path / "train" / "cat", "b", image=".JPG", value=2)
    put(tmp_path / "train" / "cat", "a", value=1)
    put(tmp_path / "train" / "dog", "a", value=3)
    put(tmp_path / "test" / "cat", "c")
    return tmp_path


def test_categories(root):
    source = BinaryMasks(root, "train")
    assert source.categories == ("cat", "dog")
    assert [source[i]["name"] for i in range(len(source))] == ["cat/a", "cat/b", "dog/a"]
    assert [source[i]["category"] for i in range(3)] == [0, 0, 1]
    assert [source[i]["image"][0, 0, 0] for i in range(3)] == [1, 2, 3]
    assert source[0]["image"].shape == (*SHAPE, 3) and source[0]["mask"].shape == SHAPE
    assert source[0]["mask"].dtype == np.uint8
    assert source[0]["mask"][0].all() and not source[0]["mask"][1:].any()
    assert len(BinaryMasks(root, "test")) == 1


def test_selected_categories(root):
    source = BinaryMasks(root, "train", categories=["dog"])
    assert source.categories == ("dog",) and len(source) == 1 and source[0]["category"] == 0
    with pytest.raises(DataError, match="no category cow; available: cat, dog"):
        BinaryMasks(root, "train", categories=["cow", "dog"])


def test_sizes(root):
    assert BinaryMasks(root, "train").sizes() == [SHAPE] * 3
    put(root / "train" / "dog", "z", mask=None, shape=(5, 5))
    shutil.copy(root / "train/dog/annotations/a.png", root / "train/dog/annotations/z.png")
    source = BinaryMasks(root, "train")
    expected = r"annotations.z\.png is 8x6 but its image .*images.z\.png is 5x5"
    with pytest.raises(DataError, match=expected):
        source.sizes()
    with pytest.raises(DataError, match=expected):
        source[3]


def test_can_be_sent_to_workers(root):
    source = pickle.loads(pickle.dumps(BinaryMasks(root, "train")))
    assert source[2]["name"] == "dog/a"


@pytest.mark.parametrize("masks", ["masks", "annotations"])
def test_split_folders_without_categories(tmp_path, masks):
    put(tmp_path / "train", "a", masks=masks)
    put(tmp_path / "val", "b", masks=masks)
    source = BinaryMasks(tmp_path, "val")
    assert source.categories == ("object",)
    assert source[0]["name"] == "b" and source[0]["category"] == 0
    with pytest.raises(DataError, match="no split 'test': it has train, val"):
        BinaryMasks(tmp_path, "test")
    with pytest.raises(DataError, match="available: object"):
        BinaryMasks(tmp_path, "val", categories=["dog"])


@pytest.mark.parametrize("count, expected", [(3, (1, 1, 1)), (10, (8, 1, 1)), (40, (32, 4, 4))])
def test_flat_folders_are_split_by_hash(tmp_path, count, expected):
    for i in range(count):
        put(tmp_path, f"img{i}", masks="masks", value=i)
    names = {}
    for split in ("train", "val", "test"):
        source = BinaryMasks(tmp_path, split)
        names[split] = [source[i]["name"] for i in range(len(source))]
        assert source.categories == ("object",)
    assert tuple(map(len, names.values())) == expected
    assert sorted(sum(names.values(), [])) == sorted(f"img{i}" for i in range(count))


def test_flat_split_is_pinned(tmp_path):
    """Scores on `test` are comparable only while this holds."""
    for i in range(10):
        put(tmp_path, f"img{i}", masks="masks")
    assert BinaryMasks(tmp_path, "test")[0]["name"] == "img6"
    assert BinaryMasks(tmp_path, "val")[0]["name"] == "img5"


def test_too_few_to_split(tmp_path):
    put(tmp_path, "a")
    put(tmp_path, "b")
    with pytest.raises(DataError, match="2 images cannot be split into train, val, test"):
        BinaryMasks(tmp_path, "train")


def test_hidden_and_other_files_are_ignored(root):
    for name in (".DS_Store", "._a.png", "Thumbs.db", "notes.txt"):
        (root / "train/cat/images" / name).write_bytes(b"?")
    (root / "train/.git/images").mkdir(parents=True)
    (root / ".cache").mkdir()
    assert len(BinaryMasks(root, "train")) == 3


def test_missing_and_empty_folders(tmp_path):
    with pytest.raises(DataError, match="data.root is empty"):
        BinaryMasks("", "train")
    with pytest.raises(DataError, match=r"nowhere: no such data folder; expected <split>"):
        BinaryMasks(tmp_path / "nowhere", "train")
    with pytest.raises(DataError, match="has no folders in it; expected <split>"):
        BinaryMasks(tmp_path, "train")
    (tmp_path / "photos").mkdir()
    with pytest.raises(DataError, match="holds photos; allowed layouts: <split>"):
        BinaryMasks(tmp_path, "train")
    (tmp_path / "train").mkdir()
    with pytest.raises(DataError, match="train has no folders in it"):
        BinaryMasks(tmp_path, "train")
    (tmp_path / "train/dog/annotations").mkdir(parents=True)
    with pytest.raises(DataError, match=r"dog.images: no such folder"):
        BinaryMasks(tmp_path, "train")
    (tmp_path / "train/dog/images").mkdir()
    with pytest.raises(DataError, match=r"dog.images: holds no images; image suffixes are \.jpg"):
        BinaryMasks(tmp_path, "train")


def test_a_file_as_root(tmp_path):
    (tmp_path / "a.zip").write_bytes(b"")
    with pytest.raises(DataError, match=r"a\.zip: not a folder"):
        BinaryMasks(tmp_path / "a.zip", "train")


def test_unknown_split(root):
    with pytest.raises(DataError, match="unknown split 'dev': allowed are train, val, test"):
        BinaryMasks(root, "dev")
    with pytest.raises(DataError, match="has no split 'val': it has test, train"):
        BinaryMasks(root, "val")


def test_image_without_mask(root):
    put(root / "train/dog", "b", mask=None)
    with pytest.raises(DataError, match=r"dog.images: 1 of 2 images have no mask .*: b\.png$"):
        BinaryMasks(root, "train")
    shutil.rmtree(root / "train/dog/annotations")
    with pytest.raises(DataError, match="dog has no folder of masks; allowed.*annotations, masks"):
        BinaryMasks(root, "train")


def test_mask_without_image_is_reported(root, caplog):
    put(root / "train/dog", "b", image=None)
    with caplog.at_level("WARNING"):
        assert len(BinaryMasks(root, "train")) == 3
    assert "dog/annotations: masks without image, ignored: b.png" in caplog.text


def test_two_images_of_one_stem(root):
    put(root / "train/dog", "a", image=".jpg")
    with pytest.raises(DataError, match=r"a\.jpg and a\.png have the same stem"):
        BinaryMasks(root, "train")


def test_unusable_files_are_named_when_read(root):
    (root / "train/cat/images/a.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    Image.fromarray(np.full(SHAPE, 7, np.uint8)).save(root / "train/dog/annotations/a.png")
    source = BinaryMasks(root, "train")
    with pytest.raises(DataError, match=r"cat.images.a\.png"):
        source[0]
    with pytest.raises(DataError, match=r"dog.annotations.a\.png: mask values 7 "):
        source[2]
    assert BinaryMasks(root, "train", mask_threshold=5)[2]["mask"].all()


def test_list_images(tmp_path):
    for name in ("b.JPG", "a.png", "deep/er/c.webp", "note.txt", ".h.png", ".hidden/d.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")

    def names(inputs):
        return [str(p.relative_to(tmp_path)) for p in list_images(inputs)]

    assert names(tmp_path) == names(str(tmp_path) + "/") == ["a.png", "b.JPG", "deep/er/c.webp"]
    assert names(tmp_path / "a.png") == ["a.png"]
    assert names(tmp_path / "*") == ["a.png", "b.JPG"]
    assert names(tmp_path / "**" / "*.webp") == ["deep/er/c.webp"]
    assert names(tmp_path / "note.txt") == ["note.txt"]  # named by hand: reading it will complain


def test_list_images_takes_names_that_look_like_patterns(tmp_path):
    (tmp_path / "a[1].png").write_bytes(b"")
    assert list_images(tmp_path / "a[1].png") == [tmp_path / "a[1].png"]


def test_list_images_without_a_match(tmp_path):
    for inputs in (tmp_path, tmp_path / "none", tmp_path / "*.png"):
        with pytest.raises(DataError, match=r"no .*image.*; image suffixes are \.jpg") as caught:
            list_images(inputs)
        assert str(inputs) in str(caught.value)


def test_davis():
    root = shared_path("data/obj_seg")
    train, test = (BinaryMasks(root, split, categories=["dog"]) for split in ("train", "test"))
    assert (len(train), len(test)) == (50, 10)
    assert set(train.sizes()) == {(480, 854)}
    example = train[0]
    assert set(np.unique(example["mask"])) == {0, 1}
    raw = np.asarray(Image.open(root / "train/dog/annotations/00000.png"))
    np.testing.assert_array_equal(example["mask"] * 255, raw)
    assert len(BinaryMasks(root, "train").categories) == 12


def test_void_means_void_in_every_mask_of_a_set(tmp_path):
    """A mask of 0 and 255 beside masks with class ids: its 255 is void, not foreground."""
    for name, values in (("a", (0, 1, 255)), ("b", (0, 0, 255))):
        for kind in ("images", "masks"):
            (tmp_path / "train" / kind).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (3, 1)).save(tmp_path / "train" / "images" / f"{name}.png")
        mask = np.array([values], np.uint8)
        Image.fromarray(mask).save(tmp_path / "train" / "masks" / f"{name}.png")
    source = BinaryMasks(tmp_path, "train")
    assert [source[i]["mask"].tolist() for i in range(2)] == [[[0, 1, 255]], [[0, 0, 255]]]
    assert BinaryMasks(tmp_path, "train", mask_values="0/1")[1]["mask"].tolist() == [[0, 0, 255]]
    # The other splits are read alike, though nothing in them tells.
    shutil.copytree(tmp_path / "train", tmp_path / "test")
    for kind in ("images", "masks"):
        (tmp_path / "test" / kind / "a.png").unlink()
    assert BinaryMasks(tmp_path, "test")[0]["mask"].tolist() == [[0, 0, 255]]
