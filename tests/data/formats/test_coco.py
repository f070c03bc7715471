import json
import pickle
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image
from shared import shared_path

from jaxseg.data import DataError, image_size, write_image
from jaxseg.data.formats.coco import Coco
from jaxseg.data.formats.polygons import fill, polygon, run_lengths, runs_region

SIZE = (40, 60)
# COCO's own string for `striped()`, from pycocotools.mask.encode.
STRIPED = (
    "d0d0T30WNBG0YO>HBo0000YO>HBo0000YO>HBo0000YO>HBo0000YO>HBo0000YO>HBo0000YO>HBo0000YO>HBo0000"
    "00000000000000000000000000000000000000U6KoH000000000n4"
)
CATEGORIES = [{"id": 7, "name": "dog"}, {"id": 2, "name": "cat"}, {"id": 9, "name": "car"}]


def striped():
    mask = np.zeros(SIZE, bool)
    mask[3:9, 5:50] = True
    mask[20:40, 0:30:3] = True
    mask[::7, 55] = True
    return mask


def box(top, left, bottom, right):
    return [[left, top, right, top, right, bottom, left, bottom]]


def full(region, size):
    top, left, inside = region
    mask = np.zeros(size, bool)
    mask[top : top + inside.shape[0], left : left + inside.shape[1]] = inside
    return mask


def some_polygons():
    """60 polygons, also beyond the image and with repeated corners, and the images' sizes."""
    rng = np.random.default_rng(4)
    for i in range(60):
        size = rng.integers(5, 90, 2).tolist()
        points = rng.normal(0.5, 0.4, (rng.integers(3, 12), 2)) * size[::-1]
        if i % 3 == 0:
            points = points.round()
            points = np.concatenate([points, points[:1]])
        yield points.ravel().tolist(), size


def even_odd(points, size):
    """(inside, distance to the outline) of the pixels' middles, by geometry alone."""
    y, x = np.mgrid[: size[0], : size[1]] + 0.5
    inside, distance = np.zeros(size, bool), np.full(size, np.inf)
    for (x0, y0), (x1, y1) in zip(points, np.roll(points, -1, axis=0), strict=True):
        if y0 != y1:
            crossed = (y0 > y) != (y1 > y)
            inside ^= crossed & (x < (x1 - x0) * (y - y0) / (y1 - y0) + x0)
        length = max((x1 - x0) ** 2 + (y1 - y0) ** 2, 1e-12)
        along = np.clip(((x - x0) * (x1 - x0) + (y - y0) * (y1 - y0)) / length, 0, 1)
        away = np.hypot(x - x0 - along * (x1 - x0), y - y0 - along * (y1 - y0))
        distance = np.minimum(distance, away)
    return inside, distance


def test_polygons_are_filled_as_by_coco():
    # Checksum and pixels of pycocotools 2.0.11: decode(merge(frPyObjects([numbers], h, w))).
    checksum, pixels = 0, 0
    for numbers, size in some_polygons():
        mask = full(fill([polygon(numbers)], size), size)
        checksum = zlib.crc32(mask.astype(np.uint8).tobytes(), checksum)
        pixels += int(mask.sum())
    assert (checksum, pixels) == (2782579576, 24291)


def test_polygons_differ_from_geometry_only_at_the_border():
    for numbers, size in some_polygons():
        inside, distance = even_odd(np.reshape(numbers, (-1, 2)), size)
        wrong = full(fill([polygon(numbers)], size), size) != inside
        assert not (wrong & (distance > 0.25)).any()


def test_polygons_against_pycocotools():
    coco = pytest.importorskip("pycocotools.mask", reason="the oracle is not installed")
    for numbers, (height, width) in some_polygons():
        both = [numbers, box(2, 3, 4, 30)[0]]
        expected = coco.decode(coco.merge(coco.frPyObjects(both, height, width)))
        got = full(fill([polygon(numbers) for numbers in both], (height, width)), expected.shape)
        np.testing.assert_array_equal(got, expected)


def test_polygons_out_of_bounds_are_clipped():
    everything = full(fill([polygon(box(-1e8, -50, 1e8, 500)[0])], SIZE), SIZE)
    assert everything.all()
    corner = full(fill([polygon(box(-9, -9, 4, 3)[0])], SIZE), SIZE)
    assert corner[:4, :3].all() and corner.sum() == 12
    assert not full(fill([polygon(box(50, 70, 60, 90)[0])], SIZE), SIZE).any()


def test_run_lengths():
    mask = striped()
    lengths = run_lengths(STRIPED)
    # The slow way: walk down the columns.
    flat, value = [], False
    for length in lengths:
        flat += [value] * int(length)
        value = not value
    np.testing.assert_array_equal(np.reshape(flat, SIZE[::-1]).T, mask)
    np.testing.assert_array_equal(full(runs_region(lengths, SIZE), SIZE), mask)
    np.testing.assert_array_equal(run_lengths(lengths.tolist()), lengths)
    assert not full(runs_region(np.array([6]), (2, 3)), (2, 3)).any()


def put(root, annotations, *, categories=CATEGORIES, images=None, **more):
    """Writes COCO's layout: images 1 (a.png) and 2 (b.png), and the JSON."""
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    (root / "train2017").mkdir(exist_ok=True)
    for i, name in enumerate(("a.png", "b.png")):
        write_image(root / "train2017" / name, np.full((*SIZE, 3), i + 1, np.uint8))
    listed = [
        {"id": i + 1, "file_name": name, "height": SIZE[0], "width": SIZE[1]}
        for i, name in enumerate(("a.png", "b.png"))
    ]
    content = {
        "images": listed if images is None else images,
        "annotations": annotations,
        "categories": categories,
        **more,
    }
    (root / "annotations" / "instances_train2017.json").write_text(json.dumps(content))
    return root


def note(id, category, segmentation, **more):
    return {
        "id": id,
        "image_id": 1,
        "category_id": category,
        "segmentation": segmentation,
        "iscrowd": 0,
    } | more


def test_instances(tmp_path):
    runs = {"size": list(SIZE), "counts": STRIPED}
    source = Coco(put(tmp_path, [note(1, 7, runs), note(2, 9, box(10, 4, 15, 40))]), "train")
    assert source.classes == ("background", "cat", "dog", "car")
    assert source.categories == ("all",) and len(source) == 2
    example = source[0]
    expected = striped() * 2
    expected[10:15, 4:40] = 3
    np.testing.assert_array_equal(example["mask"], expected)
    assert example["mask"].dtype == example["image"].dtype == np.uint8
    assert example["image"].shape == (*SIZE, 3) and (example["image"] == 1).all()
    assert example["name"] == "a" and example["category"] == 0
    assert not source[1]["mask"].any() and source[1]["name"] == "b"  # no annotations
    assert source.sizes() == [SIZE, SIZE]


def test_chosen_classes(tmp_path):
    notes = [
        note(1, 2, box(0, 0, 10, 10)),
        note(2, 9, box(20, 20, 30, 30)),
        note(3, 7, box(5, 5, 7, 7)),
    ]
    source = Coco(put(tmp_path, notes), "train", classes=("car", "cat"))
    mask = source[0]["mask"]
    assert source.classes == ("background", "car", "cat")
    assert (mask[20:30, 20:30] == 1).all()
    assert (mask[:10, :10] == 2).all()  # the dog is not drawn over the cat
    assert np.count_nonzero(mask) == 200
    again = Coco(tmp_path, "train", classes=source.classes)
    assert again.classes == source.classes
    for wrong in (("car", "cow"), ("car", "background")):
        with pytest.raises(DataError, match=f"no class {wrong[1]}; available: cat, dog, car"):
            Coco(tmp_path, "train", classes=wrong)
    with pytest.raises(DataError, match="needs each class once"):
        Coco(tmp_path, "train", classes=("car", "car"))


def test_a_category_background_is_background(tmp_path):
    categories = [{"id": 0, "name": "background"}, *CATEGORIES]
    notes = [note(1, 2, box(0, 0, 9, 9)), note(2, 0, box(0, 0, 5, 5))]
    source = Coco(put(tmp_path, notes, categories=categories), "train")
    assert source.classes == ("background", "cat", "dog", "car")
    assert (source[0]["mask"][:9, :9] == 1).all()


def test_overlaps(tmp_path):
    notes = [
        note(3, 2, box(0, 0, 4, 4)),  # small, and last of its size
        note(1, 7, box(2, 2, 6, 6)),  # small
        note(2, 9, box(0, 0, 20, 20)),  # large
    ]
    put(tmp_path, notes)

    def mask(**options):
        return Coco(tmp_path, "train", **options)[0]["mask"]

    smaller = mask()
    assert (smaller[:4, :4] == 1).all() and (smaller[4:6, 2:6] == 2).all()
    assert (smaller == 1).sum() == 16 and (smaller == 2).sum() == 12
    last = mask(overlap="last-on-top")
    assert (last[:4, :4] == 1).all() and (last == 2).sum() == 0
    void = mask(overlap="void")
    assert (void[:4, :4] == 255).all() and (void == 255).sum() == 28
    assert (void == 3).sum() == 400 - 28
    with pytest.raises(DataError, match="data.overlap is 'top': allowed are smaller-on-top, last"):
        mask(overlap="top")


def test_overlap_within_a_class_is_not_void(tmp_path):
    notes = [note(1, 2, box(0, 0, 9, 9)), note(2, 2, box(5, 5, 12, 12))]
    mask = Coco(put(tmp_path, notes), "train", overlap="void")[0]["mask"]
    assert set(np.unique(mask)) == {0, 1}


def test_crowds(tmp_path):
    notes = [
        note(1, 2, box(0, 0, 10, 10)),
        note(2, 7, box(5, 5, 8, 30), iscrowd=1),  # smaller than what it overlaps
    ]
    put(tmp_path, notes)
    mask = Coco(tmp_path, "train")[0]["mask"]
    assert (mask[:10, :10] == 1).all() and (mask[5:8, 10:30] == 255).all()
    assert (Coco(tmp_path, "train", overlap="void")[0]["mask"] == mask).all()
    painted = Coco(tmp_path, "train", crowd="paint")[0]["mask"]
    assert (painted == np.where(mask == 255, 2, mask)).all()
    with pytest.raises(DataError, match="data.crowd is 'drop': allowed are void, paint"):
        Coco(tmp_path, "train", crowd="drop")


BAD_ANNOTATIONS = {
    "odd": ({"segmentation": [[1, 2, 3, 4, 5, 6, 7]]}, "polygon has 7 coordinates: .* at least 6"),
    "short": ({"segmentation": [[1, 2, 3, 4]]}, "polygon has 4 coordinates"),
    "infinite": ({"segmentation": [[1, 2, 3, 4, 5, float("inf")]]}, r"not within \+-1e\+09"),
    "text": ({"segmentation": [[1, 2, 3, 4, 5, "x"]]}, "could not convert"),
    "empty": (
        {"segmentation": []},
        "segmentation is empty: allowed are a list of polygons, and run",
    ),
    "type": ({"segmentation": None}, "segmentation is NoneType: allowed"),
    "size": (
        {"segmentation": {"size": [60, 40], "counts": [2400]}},
        r"run lengths are of size \[60, 40\] but the image is \[40, 60\] \(height, width\)",
    ),
    "sum": (
        {"segmentation": {"size": [40, 60], "counts": [3, 4]}},
        "run lengths add up to 7, not to the 40x60 = 2400 pixels",
    ),
    "negative": (
        {"segmentation": {"size": [40, 60], "counts": [3000, -600]}},
        "run lengths must be whole numbers >= 0",
    ),
    "string": (
        {"segmentation": {"size": [40, 60], "counts": "d0 "}},
        "character ' ' in compressed",
    ),
    "cut": ({"segmentation": {"size": [40, 60], "counts": "d0d"}}, "end within a number"),
    "counts": ({"segmentation": {"size": [40, 60]}}, "key 'counts' is missing"),
    "image": ({"image_id": 77}, "unknown image id 77"),
    "category": ({"category_id": 5}, "unknown category id 5: the file's are 2, 7, 9"),
}


@pytest.mark.parametrize("name", BAD_ANNOTATIONS)
def test_bad_annotations(tmp_path, name):
    change, message = BAD_ANNOTATIONS[name]
    put(tmp_path, [note(1, 2, box(0, 0, 5, 5)), note(31, 7, box(0, 0, 5, 5)) | change])
    with pytest.raises(
        DataError, match=f"instances_train2017.json: annotation 31: .*{message}"
    ) as e:
        Coco(tmp_path, "train")
    assert "\n" not in str(e.value)


def test_malformed_annotations_of_other_classes_are_not_read(tmp_path):
    put(tmp_path, [note(1, 2, box(0, 0, 5, 5)), note(31, 7, [])])
    assert Coco(tmp_path, "train", classes=("cat",))[0]["mask"].sum() == 25


def test_bad_files(tmp_path):
    put(tmp_path, [note(1, 2, box(0, 0, 5, 5))])
    file = tmp_path / "annotations" / "instances_train2017.json"
    whole = file.read_text()

    def fails(message, text=None, **options):
        if text is not None:
            file.write_text(text)
        with pytest.raises(DataError, match=message) as error:
            Coco(tmp_path, "train", **options)
        assert "\n" not in str(error.value)

    for empty in ("", "[]", "{}", '{"images": []}'):
        fails("instances_train2017.json is empty: it lists no images", empty)
    fails("unreadable or damaged JSON", whole[:-9])
    fails(
        "neither COCO's instances nor aggregated annotations: key 'categories'", '{"images": [1]}'
    )
    fails("neither COCO's instances nor aggregated annotations", "5")
    fails("key 'file_name' is missing", json.dumps([{"annotations": {}}]))
    fails("it lists no annotations", put(tmp_path, []) and None)
    fails("key 'annotations' is missing", whole.replace('"annotations"', '"notes"'))
    gone = [{"id": i, "file_name": f"{i}.png"} for i in range(12)]
    put(tmp_path, [], images=gone)
    fails(r"12 of the 12 images that it lists are missing: .*train2017.0\.png, .* \(12 in all\)")
    put(tmp_path, [], images=[{"id": i, "file_name": "a.png"} for i in range(2)])
    fails("images share an id, or a name")
    put(tmp_path, [], categories=[*CATEGORIES, {"id": 8, "name": "dog"}])
    fails(r"categories share an id or a name \(dog\)")
    put(tmp_path, [], categories=[{"id": i, "name": f"c{i}"} for i in range(255)])
    fails(
        "255 classes; allowed are 254 beside background and void: name those to read in data.classes"
    )
    put(tmp_path, [note(1, 2, box(0, 0, 5, 5))])
    write_image(tmp_path / "train2017" / "a.png", np.zeros((9, 8, 3), np.uint8))
    with pytest.raises(DataError, match=r"a\.png is 8x9 but its annotations say 60x40"):
        Coco(tmp_path, "train")[0]
    with pytest.raises(DataError, match=r"a\.png is 8x9 but its annotations say 60x40"):
        Coco(tmp_path, "train").sizes()
    put(tmp_path, [note(1, 2, box(0, 0, 5, 5), iscrowd="0")])
    fails("iscrowd is '0': allowed are 0 and 1")


def test_where_files_are(tmp_path):
    put(tmp_path, [note(1, 2, box(0, 0, 5, 5))])
    with pytest.raises(
        DataError, match="no annotation files of split 'val'.*there are annotations"
    ):
        Coco(tmp_path, "val")
    with pytest.raises(DataError, match="no such annotation file; it holds annotations"):
        Coco(tmp_path, "val", labels="annotations/instances_{split}2017.json")
    with pytest.raises(DataError, match="folder of images"):
        Coco(tmp_path, "train", images="pictures")
    with pytest.raises(DataError, match="no such data folder"):
        Coco(tmp_path / "nowhere", "train")
    with pytest.raises(DataError, match="data.root is empty"):
        Coco("", "train")
    file = tmp_path / "annotations" / "instances_train2017.json"
    (tmp_path / "mine_train.json").write_text(file.read_text())
    (tmp_path / "train2017").rename(tmp_path / "pictures")
    with pytest.raises(DataError, match="no folders of images of split 'train'"):
        Coco(tmp_path, "train")
    assert len(Coco(tmp_path, "train", labels="mine_{split}.json", images="pictures")) == 2
    (tmp_path / "images" / "train2014").mkdir(parents=True)
    (tmp_path / "pictures").rename(tmp_path / "images" / "train2017")
    assert len(Coco(tmp_path, "train")) == 2  # the file's name says which
    file.rename(file.with_name("instances_train.json"))
    with pytest.raises(DataError, match="2 folders of images of split 'train': images.train2014, "):
        Coco(tmp_path, "train")
    (tmp_path / "instances_train2014.json").write_text("{}")
    with pytest.raises(DataError, match="2 annotation files of split 'train'.*or data.labels"):
        Coco(tmp_path, "train")


# What pycocotools 2.0.11 gives for coco5: masks of all annotations, drawn in the order of the class's
# docstring: the checksum of all masks and the pixels of each value.
COCO5 = {
    "train": (
        1006408288,
        {0: 19944195, 1: 3976501, 2: 122407, 3: 39714, 4: 93413, 5: 336561, 255: 13297},
    ),
    "val": (
        4283384263,
        {0: 21738668, 1: 3559978, 2: 82115, 3: 213335, 4: 467691, 5: 51170, 255: 36371},
    ),
}


@pytest.mark.parametrize("split", COCO5)
def test_coco5(split):
    source = Coco(shared_path("data/coco5"), split)
    assert source.classes == ("background", "person", "bicycle", "car", "cat", "dog")
    assert len(source) == {"train": 89, "val": 94}[split]
    with ThreadPoolExecutor(2) as pool:
        examples = list(
            pool.map(pickle.loads(pickle.dumps(source)).__getitem__, range(len(source)))
        )
    assert source.sizes() == [example["image"].shape[:2] for example in examples]
    assert len({example["name"] for example in examples}) == len(source)
    checksum, pixels = 0, np.zeros(256, int)
    for example in examples:
        checksum = zlib.crc32(example["mask"].tobytes(), checksum)
        pixels += np.bincount(example["mask"].ravel(), minlength=256)
    assert {int(i): int(pixels[i]) for i in pixels.nonzero()[0]} == COCO5[split][1]
    assert checksum == COCO5[split][0]


def test_aggregated_and_instances_agree(tmp_path):
    root = shared_path("data/coco5")
    lists = json.loads((root / "aggregated_annotations_val_5classes.json").read_text())[::12]
    images, notes = [], []
    for i, entry in enumerate(lists):
        height, width = image_size(root / "imgs" / "val2014" / entry["file_name"])
        image = {"id": i, "file_name": entry["file_name"], "height": height, "width": width}
        images.append(image)
        for category, records in entry["annotations"].items():
            notes += [
                {
                    "iscrowd": 0,
                    **r,
                    "id": len(notes) + k,
                    "image_id": i,
                    "category_id": int(category),
                }
                for k, r in enumerate(records)
            ]
    names = {3: "car", 1: "person", 2: "bicycle", 18: "dog", 17: "cat", 44: "bottle"}
    categories = [{"id": i, "name": name} for i, name in names.items()]
    content = {"images": images, "annotations": notes[::-1], "categories": categories}
    (tmp_path / "val.json").write_text(json.dumps(content))
    lab = Coco(root, "val", classes=("dog", "person"))
    own = Coco(
        tmp_path,
        "val",
        classes=("dog", "person"),
        labels="val.json",
        images=str(root / "imgs" / "val2014"),
    )
    assert own.classes == lab.classes
    for i in range(len(own)):
        np.testing.assert_array_equal(own[i]["mask"], lab[i * 12]["mask"])
    assert own.sizes() == lab.sizes()[::12]


def test_aggregated(tmp_path):
    (tmp_path / "imgs" / "val2014").mkdir(parents=True)
    write_image(tmp_path / "imgs" / "val2014" / "a.png", np.zeros((*SIZE, 3), np.uint8))
    file = tmp_path / "aggregated_annotations_val_5classes.json"

    def source(annotations):
        file.write_text(json.dumps([{"file_name": "a.png", "annotations": annotations}]))
        return Coco(tmp_path, "val")

    boxes = [{"segmentation": box(0, 0, 9, 9)}, {"segmentation": {"size": [9, 9], "counts": [81]}}]
    assert (source({"1": [], "18": boxes[:1]})[0]["mask"] == 5).sum() == 81
    with pytest.raises(
        DataError, match="of a.png, category 17, no. 1: .*size .9, 9. but the image"
    ):
        source({"17": boxes})
    with pytest.raises(DataError, match="unknown category id 16: the file's are 1, 2, 3, 17, 18"):
        source({"16": boxes})
    with pytest.raises(DataError, match="annotations of a.png: .*'dog'"):
        source({"dog": boxes})
    with pytest.raises(DataError, match="it lists no annotations"):
        source({})


def test_upright(tmp_path):
    """Annotations are of the image as it is seen, turned by its EXIF orientation."""
    put(tmp_path, [note(1, 2, box(0, 0, 5, 5))])
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", SIZE).save(tmp_path / "train2017" / "a.png", exif=exif)  # stored 40 wide
    assert Coco(tmp_path, "train")[0]["image"].shape == (*SIZE, 3)
