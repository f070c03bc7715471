import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image
from shared import shared_path

from jaxseg.data import BinaryMasks, DataError, write_image, write_mask
from jaxseg.data.formats.class_masks import ClassMasks

IDS = np.array([[0, 1, 2, 3], [3, 255, 0, 1]])  # with id 3 void
SIZE = IDS.shape
COLORS = ((10, 0, 0), (0, 20, 0), (0, 0, 30), (0, 0, 0))


def put(folder, stem, mask, *, labels="labels", suffix=".png"):
    """Writes an image of the mask's size, and the mask: a Pillow image, or integers as grey PNG."""
    for name in ("images", labels):
        (folder / name).mkdir(parents=True, exist_ok=True)
    mask = mask if isinstance(mask, Image.Image) else Image.fromarray(np.asarray(mask, np.uint8))
    mask.save(folder / labels / (stem + suffix))
    picture = np.full((mask.height, mask.width, 3), len(stem), np.uint8)
    write_image(folder / "images" / (stem + ".jpg"), picture)


@pytest.fixture
def root(tmp_path):
    """Three classes and a void id that is named, in a folder with train and val."""
    (tmp_path / "classes.txt").write_text("road\nsky\ntree\nvoid\n")
    put(tmp_path / "train", "a", IDS)
    put(tmp_path / "train", "bb", IDS[::-1])
    put(tmp_path / "val", "c", IDS)
    return tmp_path


def expected():
    return np.where(IDS == 3, 255, IDS)


def test_reads(root):
    source = ClassMasks(root, "train")
    assert source.classes == ("road", "sky", "tree") and source.categories == ("all",)
    assert len(source) == 2 and source.sizes() == [SIZE, SIZE]
    example = source[0]
    np.testing.assert_array_equal(example["mask"], expected())
    assert example["mask"].dtype == example["image"].dtype == np.uint8
    assert example["image"].shape == (*SIZE, 3)
    assert (example["name"], example["category"]) == ("a", 0)
    np.testing.assert_array_equal(source[1]["mask"], expected()[::-1])
    again = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(again[1]["mask"], source[1]["mask"])
    assert len(ClassMasks(root, "val")) == 1


def test_classes_and_void_of_a_config(root):
    (root / "classes.txt").unlink()
    with pytest.raises(DataError, match="classes.txt is missing: name the classes .*data.classes"):
        ClassMasks(root, "train")
    source = ClassMasks(root, "train", classes=("a", "b", "c"), void=(3,))
    assert source.classes == ("a", "b", "c")
    np.testing.assert_array_equal(source[0]["mask"], expected())


def test_void_in_between_is_closed_up(root):
    source = ClassMasks(root, "train", void=(0,))
    assert source.classes == ("sky", "tree")
    lookup = {0: 255, 1: 0, 2: 1, 3: 255, 255: 255}
    np.testing.assert_array_equal(source[0]["mask"], np.vectorize(lookup.get)(IDS))


def test_undeclared_ids(root):
    put(root / "train", "a", np.array([[0, 3, 7, 9]]))
    message = (
        r"labels.a\.png: ids 3, 7, 9 are not declared; allowed are 0-1 \(2 classes\) and 8, 255 "
        r"\(void\)\. Name them in classes\.txt or data\.classes, or add them to data\.void to ignore"
    )
    (root / "classes.txt").write_text("road\nsky\n")
    with pytest.raises(DataError, match=message) as error:
        ClassMasks(root, "train", void=(8,))[0]
    assert "\n" not in str(error.value)
    ignored = ClassMasks(root, "train", void=(3, 7, 9))[0]["mask"]
    np.testing.assert_array_equal(ignored, [[0, 255, 255, 255]])


def test_class_lists(root):
    def fails(text, message, **options):
        (root / "classes.txt").write_bytes(text)
        with pytest.raises(DataError, match=message):
            ClassMasks(root, "train", **options)

    fails(b" \n\n", "classes.txt is empty: name the classes in it, one a line, or in data.classes")
    fails(b"road\n\nsky\n", "classes.txt: line 2 is empty; each line stands for an id")
    fails(b"road\nsky\nroad\n", r"3 classes \(road, sky, road\); allowed are 1 to 255 different")
    fails(b"void\n", "0 classes")
    fails("\n".join(f"c{i}" for i in range(300)).encode(), "299 classes .*allowed are 1 to 255")
    fails(b"\xff\xfe\xfa", "classes.txt: cannot be read as text")
    moved = "data.classes names ids 0, 1, 2, ... and has sky, tree in other .*classes.txt, where .* 1, 2"
    fails(b"road\nsky\ntree\nvoid\n", moved, classes=("sky", "tree"))
    fails(b"road\n", "data.void has -1, 70000; allowed are ids from 0 to 65535", void=(-1, 70000))
    (root / "classes.txt").write_bytes(b"\xef\xbb\xbfroad\r\nsky\r\ntree\r\nVoid\r\n\r\n")
    assert ClassMasks(root, "train").classes == ("road", "sky", "tree")
    renamed = ClassMasks(root, "train", classes=("street", "sky", "tree"), void=(3,))
    assert renamed.classes == ("street", "sky", "tree")


def write_palette(root, colors=COLORS):
    lines = (" ".join(str(value) for value in color) for color in colors)
    (root / "palette.txt").write_text("\n".join(lines))


def test_palettes_give_their_index(root):
    image = Image.fromarray(IDS.astype(np.uint8)).convert("P")
    image.putdata(IDS.ravel().tolist())
    image.putpalette([200, 100, 0] * 256)
    put(root / "train", "a", image)
    np.testing.assert_array_equal(ClassMasks(root, "train")[0]["mask"], expected())
    write_palette(root)
    coloured = ClassMasks(root, "train")
    np.testing.assert_array_equal(coloured[0]["mask"], expected())


def test_16_bit_and_1_bit_masks(root):
    put(root / "train", "a", Image.fromarray(np.array([[0, 2, 300]], np.uint16)))
    put(root / "train", "bb", Image.fromarray(np.array([[False, True]])))
    with pytest.raises(DataError, match="ids 300 are not declared"):
        ClassMasks(root, "train")[0]
    source = ClassMasks(root, "train", void=(300,))
    np.testing.assert_array_equal(source[0]["mask"], [[0, 2, 255]])
    np.testing.assert_array_equal(source[1]["mask"], [[0, 1]])


def test_masks_in_colours(root):
    ids = np.where(IDS == 255, 3, IDS)
    put(root / "train", "a", Image.fromarray(np.array(COLORS, np.uint8)[ids]))
    with pytest.raises(DataError, match="a.png is in colour and no colours .*palette.txt"):
        ClassMasks(root, "train")[0]
    (root / "palette.txt").write_text("10 0 0\n0, 20, 0\n0\t0\t30\n0 0 0\n")
    listed = ClassMasks(root, "train")
    np.testing.assert_array_equal(listed[0]["mask"], np.where(ids == 3, 255, ids))
    np.testing.assert_array_equal(listed[1]["mask"], expected()[::-1])  # grey: ids
    odd = np.zeros((*SIZE, 3), np.uint8)
    odd[0, 0] = (1, 2, 3)
    put(root / "train", "a", Image.fromarray(odd))
    with pytest.raises(
        DataError, match=r"colours \(1 2 3\) are not declared; allowed are the 4 of"
    ):
        listed[0]


@pytest.mark.parametrize(
    ("colors", "message"),
    [
        (COLORS[:2], "2 colours are for ids 0 to 1; each class needs one"),
        ((*COLORS, (9, 9, 9)), "5 colours are for ids 0 to 4; .* or to be in data.void"),
        ((COLORS[1], *COLORS[1:]), "two classes have the same colour"),
        (((0, 0, 256), *COLORS[1:]), "three numbers from 0 to 255 each"),
        (((0, 0), *COLORS[1:]), "palette.txt: colours must be three"),
        ((("a", 0, 0), *COLORS[1:]), "palette.txt: colours must be three whole numbers"),
    ],
)
def test_wrong_colours(root, colors, message):
    write_palette(root, colors)
    with pytest.raises(DataError, match=message):
        ClassMasks(root, "train")


def test_void_ids_may_share_a_colour(root):
    write_palette(root, (*COLORS, COLORS[3]))
    source = ClassMasks(root, "train", void=(4,))
    assert source.classes == ("road", "sky", "tree")


def test_sizes_must_agree(root):
    write_mask(root / "train" / "labels" / "bb.png", np.zeros((5, 6)))
    source = ClassMasks(root, "train")
    for use in (source.sizes, lambda: source[1]):
        with pytest.raises(
            DataError, match=r"labels.bb\.png is 6x5 but its image .*bb\.jpg is 4x2"
        ):
            use()


def test_jpeg_masks(root):
    (root / "train" / "labels" / "a.png").unlink()
    put(root / "train", "a", np.array([[0, 200], [90, 7]]), suffix=".jpg")
    with pytest.raises(DataError, match="JPEG does not keep a mask's values: save it as PNG"):
        ClassMasks(root, "train")[0]


def test_folders(root, tmp_path_factory):
    with pytest.raises(DataError, match="has no split 'test': it has train, val"):
        ClassMasks(root, "test")
    with pytest.raises(DataError, match="unknown split 'all': allowed are train, val, test"):
        ClassMasks(root, "all")
    with pytest.raises(DataError, match="data.root is empty"):
        ClassMasks("", "train")
    with pytest.raises(DataError, match="no such data folder; expected in it is <split>/images"):
        ClassMasks(root / "nowhere", "train")
    with pytest.raises(DataError, match="holds images, labels; allowed layouts: <split>/photos"):
        ClassMasks(root / "train", "train", images="photos")
    with pytest.raises(DataError, match="annotations: no such folder"):
        ClassMasks(root, "train", labels="annotations")
    (root / "train" / "labels").rename(root / "train" / "annotations")
    assert len(ClassMasks(root, "train", labels="annotations")) == 2
    (root / "train" / "annotations" / "a.png").unlink()
    with pytest.raises(DataError, match=r"1 of 2 images have no mask of the same stem .*: a\.jpg"):
        ClassMasks(root, "train", labels="annotations")
    bare = tmp_path_factory.mktemp("bare")
    with pytest.raises(DataError, match="holds no folders; allowed layouts"):
        ClassMasks(bare, "train")


def test_flat_folder_is_split_as_binary_masks_are(tmp_path):
    for i in range(20):
        put(tmp_path, f"x{i:02d}", IDS % 2)
        (tmp_path / "masks").mkdir(exist_ok=True)
        write_mask(tmp_path / "masks" / f"x{i:02d}.png", IDS % 2)
    splits = {}
    for split in ("train", "val", "test"):
        source = ClassMasks(tmp_path, split, classes=("a", "b"))
        splits[split] = [source[i]["name"] for i in range(len(source))]
        other = BinaryMasks(tmp_path, split)
        assert splits[split] == [other[i]["name"] for i in range(len(other))]
    assert {split: len(names) for split, names in splits.items()} == {
        "train": 16,
        "val": 2,
        "test": 2,
    }


def test_camvid():
    root = shared_path("data/camvid")
    names = (root / "classes.txt").read_text().split()
    for split, length in (("train", 367), ("val", 101)):
        source = ClassMasks(root, split)
        assert source.classes == tuple(names[:11]) and names[11] == "void"
        assert len(source) == length and set(source.sizes()) == {(360, 480)}
        chosen = range(0, length, 25)
        with ThreadPoolExecutor(2) as pool:
            examples = list(pool.map(source.__getitem__, chosen))
        for example in examples:
            raw = np.asarray(Image.open(root / split / "labels" / f"{example['name']}.png"))
            np.testing.assert_array_equal(example["mask"], np.where(raw == 11, 255, raw))
            assert example["image"].shape == (360, 480, 3)
