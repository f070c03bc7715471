"""Whole runs with several classes: train, evaluate, compare and predict, and what stops them."""

import json

import numpy as np
import pytest
from PIL import Image

from jaxseg import assembly, compare, predict, run
from jaxseg import predictor as predictor_module
from jaxseg.data import DataError
from jaxseg.options import OptionError
from jaxseg.predictor import Predictor
from jaxseg.schema import ConfigError, read_config

CLASSES = ("background", "blob", "bar", "never")
TINY = {
    "data.size": (32, 32),
    "backbone.variant": "vit_micro8",
    "optim.name": "adamw",  # as in `tiny.OVERRIDES`
    "train.eval_every": 0,
    "train.steps": 4,
    "train.batch": 4,
    "train.log_every": 1,
    "eval.batch": 4,
    "augment.flip": 0.0,
}
HEADS = {
    "deeplab": {
        "head.deeplabv3plus.channels": 16,
        "head.deeplabv3plus.reduce": 16,
        "head.deeplabv3plus.low_width": 8,
    },
    "attention": {"head.attention.width": 16, "head.attention.channels": 8},
}


def _config(kind, root, **changes):
    config = read_config(
        {"deeplab": "deeplab_multiclass", "attention": "attention_singleclass"}[kind]
    )
    changes = {k.replace("__", "."): v for k, v in changes.items()}
    data = {"data.name": "class_masks", "data.root": str(root)}
    config.update_from_flattened_dict(TINY | HEADS[kind] | data | changes)
    return config


def _write_data(root, count=6, classes=CLASSES, size=(32, 32)):
    """Images of a red square and a green bar at random places, ids as masks, a void corner."""
    rng = np.random.default_rng(0)
    (root / "classes.txt").parent.mkdir(parents=True, exist_ok=True)
    (root / "classes.txt").write_text("\n".join(classes))
    for split in ("train", "val"):
        for folder in ("images", "labels"):
            (root / split / folder).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            image = rng.integers(90, 120, (*size, 3)).astype(np.uint8)
            mask = np.zeros(size, np.uint8)
            y, x = rng.integers(0, 16, 2)
            mask[y : y + 10, x : x + 10] = 1
            mask[24:28] = 2
            image[mask == 1], image[mask == 2] = (200, 40, 40), (40, 200, 40)
            mask[:2, :2] = 255
            Image.fromarray(image).save(root / split / "images" / f"{i}.png")
            Image.fromarray(mask).save(root / split / "labels" / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return _write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """{kind: (workdir, result)} of a short run of each method."""
    folder = tmp_path_factory.mktemp("runs")
    config = {kind: _config(kind, data, train__eval_every=2) for kind in HEADS}
    return {kind: (folder / kind, run.train(config[kind], folder / kind)) for kind in HEADS}


@pytest.mark.parametrize("kind", HEADS)
def test_results_and_report(trained, kind):
    workdir, result = trained[kind]
    assert json.loads((workdir / "eval.json").read_text()) == result
    wanted = (
        "miou miou_without_background pixel_accuracy mean_accuracy fwiou boundary_iou per_class"
    )
    assert set(wanted.split()) <= set(result)
    assert tuple(result["per_class"]) == CLASSES and result["images"] == 6
    assert np.sum(result["confusion"]) == 6 * (32 * 32 - 4)  # void pixels count nowhere
    if result["per_class"]["never"]["iou"] is None:
        assert result["absent"] == ["never"]
    page = (workdir / "report" / "index.html").read_text()
    pictures = ["curves.png", "examples.png", "classes.png", "confusion.png"]
    for name in pictures + (["queries.png"] if kind == "attention" else []):
        assert f'src="{name}"' in page
        assert np.asarray(Image.open(workdir / "report" / name).convert("L")).std() > 5


@pytest.mark.parametrize("kind", HEADS)
def test_the_best_checkpoint_is_that_of_the_mean_iou(trained, kind):
    workdir, _ = trained[kind]
    best = run.restore(workdir, {"eval.checkpoint": "best"}).evaluate()
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    scores = {row["step"]: row["val_miou"] for row in rows if "val_miou" in row}
    assert scores.keys() == {2, 4} and scores[best["step"]] == max(scores.values())


@pytest.mark.parametrize("kind", HEADS)
def test_eval_repeats_the_numbers_on_any_batch_size(trained, kind):
    workdir, result = trained[kind]
    assert run.evaluate(workdir, {"eval.report": False}) == result
    other = run.restore(workdir, {"eval.batch": 5}).evaluate()
    assert other["confusion"] == result["confusion"]


def test_batch_norm_is_evaluated_with_what_it_has_seen(trained):
    """With fresh statistics (mean 0, variance 1) the loss would be another."""
    workdir, result = trained["deeplab"]
    restored = run.restore(workdir, {})
    means = [
        np.abs(leaf).max()
        for path, leaf in _leaves(restored.host(restored.variables["batch_stats"]))
        if path[-1] == "mean"
    ]
    assert means and min(means) > 0


def _leaves(tree, path=()):
    for key, value in tree.items():
        yield from (
            _leaves(value, (*path, key)) if isinstance(value, dict) else [((*path, key), value)]
        )


def test_windows_scales_and_flips_are_averaged(trained):
    workdir, result = trained["deeplab"]

    def evaluated(**how):
        return run.restore(workdir, {f"eval.{k}": v for k, v in how.items()}).evaluate()

    same = evaluated(window=(32, 32))
    assert same["miou"] == pytest.approx(result["miou"], abs=1e-6)
    assert same["loss"] == pytest.approx(result["loss"], abs=1e-4)
    more = evaluated(scales=(1.0, 1.5), flip=True)
    assert np.sum(more["confusion"]) == np.sum(result["confusion"])
    mirrored = evaluated(flip=True)
    assert "inference" not in result and mirrored["inference"]["flip"] is True
    assert more["inference"]["scales"] == [1.0, 1.5]
    restored = run.restore(workdir, {})
    predictor, confusion = Predictor(restored), np.zeros((len(CLASSES),) * 2, int)
    source = restored.data.split("val")
    for example in (source[i] for i in range(len(source))):
        image, mask = example["image"][None], example["mask"]
        both = predictor.windows(image) + predictor.windows(image[:, :, ::-1])[:, :, ::-1]
        np.add.at(confusion, (mask[mask != 255], both[0].argmax(-1)[mask != 255]), 1)
    assert mirrored["confusion"] == confusion.tolist()


def test_how_answers_follow_is_counted_by_windows_too(trained):
    workdir, result = trained["attention"]
    same = run.restore(workdir, {"eval.window": (32, 32)}).evaluate()
    assert same["queries"] == pytest.approx(result["queries"], abs=1e-6)


def test_compare(trained, tmp_path):
    folders = [trained[kind][0] for kind in HEADS]
    result = compare.compare(folders, {}, tmp_path / "c")
    assert json.loads((tmp_path / "c" / "comparison.json").read_text()) == result
    methods = result["methods"]
    assert list(methods) == ["always background", "deeplab", "attention"]
    for kind in HEADS:  # the same images at the same size: the run's own scores
        assert methods[kind]["miou"] == pytest.approx(trained[kind][1]["miou"], abs=1e-6)
    constant = methods["always background"]
    assert constant["per_class"]["background"]["recall"] == 1.0
    assert constant["per_class"]["blob"]["iou"] == 0.0
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot write to --workdir"):
        compare.compare(folders, {}, tmp_path / "file")
    page = (tmp_path / "c" / "report" / "comparison.html").read_text()
    assert "always background" in page and 'src="comparison.png"' in page


def test_compare_takes_segmenters_alone(trained, tmp_path):
    (tmp_path / "p").mkdir()
    config = read_config("dino")
    (tmp_path / "p" / "config.json").write_text(json.dumps(config.to_dict()))
    (tmp_path / "p" / "model.json").write_text((trained["deeplab"][0] / "model.json").read_text())
    with pytest.raises(ConfigError, match="p holds a run of dino, which predicts no masks"):
        compare.compare([trained["deeplab"][0], tmp_path / "p"], {}, tmp_path / "c")


def test_compare_refuses_other_classes_and_single_runs(trained, tmp_path):
    one = trained["deeplab"][0]
    with pytest.raises(ConfigError, match="at least two runs"):
        compare.compare([one], {}, tmp_path)
    with pytest.raises(ConfigError, match="names a run twice"):
        compare.compare([one, one], {}, tmp_path)
    root = _write_data(tmp_path / "data", count=2, classes=("background", "blob", "bar"))
    quick = dict(head__name="linear_norm", train__steps=1, eval__report=False)
    run.train(_config("deeplab", root, **quick), tmp_path / "other")
    with pytest.raises(ConfigError, match="only runs of the same classes can be compared"):
        compare.compare([one, tmp_path / "other"], {}, tmp_path)
    with pytest.raises(
        ConfigError, match="data are background, blob, bar; the run was trained for"
    ):
        run.evaluate(one, {"data.root": str(root)})


def test_predict_classes(trained, data, tmp_path):
    workdir = trained["attention"][0]
    image = str(data / "val" / "images" / "0.png")
    (path,) = predict.predict(workdir, image, tmp_path / "all", {}, probabilities=True)
    opened = Image.open(path)
    assert opened.mode == "P" and opened.size == (32, 32)
    scores = np.load(tmp_path / "all" / "0_probabilities.npy")
    assert scores.shape == (32, 32, 4) and scores.dtype == np.float16
    # Each class asked for is answered by itself, whatever the others are.
    paths = predict.predict(workdir, image, tmp_path / "some", {}, classes=("bar", "blob"))
    assert [p.name for p in paths] == ["0_bar_mask.png", "0_blob_mask.png"]
    for path, value in zip(paths, (2, 1), strict=True):
        got = np.asarray(Image.open(path)) == 255
        sure = np.abs(scores[..., value].astype(float) - 0.5) > 1e-3
        np.testing.assert_array_equal(got[sure], (scores[..., value] >= 0.5)[sure])
    paths = predict.predict(trained["deeplab"][0], image, tmp_path / "d", {}, classes=("bar",))
    (all_classes,) = predict.predict(trained["deeplab"][0], image, tmp_path / "d", {})
    want = np.asarray(Image.open(all_classes)) == 2
    np.testing.assert_array_equal(np.asarray(Image.open(paths[0])) == 255, want)
    with pytest.raises(
        OptionError, match="--classes has 'cow'; the run in --workdir knows the classes"
    ):
        predict.predict(workdir, image, tmp_path / "no", {}, classes=("cow",))


def test_large_images_are_predicted_like_others(trained, data, tmp_path, monkeypatch):
    """A window that holds the whole image: tile by tile is then the same as at once."""
    workdir = trained["deeplab"][0]
    image = str(data / "val" / "images" / "1.png")
    (small,) = predict.predict(workdir, image, tmp_path / "small", {}, probabilities=True)
    monkeypatch.setattr(predict, "_LARGE", 1)
    (large,) = predict.predict(workdir, image, tmp_path / "large", {}, probabilities=True)
    np.testing.assert_array_equal(*(np.asarray(Image.open(p)) for p in (small, large)))
    a, b = (np.load(p.parent / "1_probabilities.npy").astype(float) for p in (small, large))
    np.testing.assert_allclose(a, b, atol=2e-3)
    assert (tmp_path / "large" / "1_overlay.jpg").exists()


def test_bands_are_those_of_the_whole(trained, monkeypatch):
    restored = run.restore(trained["deeplab"][0], {"eval.flip": True})
    image = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)
    predictor = Predictor(restored)
    (whole,) = predictor.bands(image)
    monkeypatch.setattr(predictor_module, "_BAND", 70 * 4 * 7)
    bands = list(predictor.bands(image))
    assert whole.shape == (50, 70, 4) and [len(b) for b in bands] == [7] * 7 + [1]
    np.testing.assert_allclose(np.concatenate(bands), whole, atol=1e-6)
    # Predicted as `config.eval` says: the mirrored image gets the mirrored scores, which it would not
    # without the flip.
    mirrored, straight = (
        np.concatenate(list(predictor.bands(np.ascontiguousarray(x))))
        for x in (image[:, ::-1], image)
    )
    np.testing.assert_allclose(mirrored[:, ::-1], straight, atol=1e-4)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"data.categories": ("a",)}, r"data.categories is \('a',\); allowed with .*: \(\)"),
        ({"eval.window": (32, 0)}, r"config.eval.window is \(32, 0\)"),
        ({"eval.scales": ()}, r"config.eval.scales is \(\); allowed: 1 or more"),
        ({"class_weights": "some"}, "allowed: none, median_frequency, inverse_log"),
        ({"data.overlap": "above"}, "config.data.overlap is 'above'; allowed: smaller-on-top"),
        (
            {"backbone.freeze": 9, "backbone.train": "all"},
            "config.backbone.freeze is 9; .* allows 0 to",
        ),
        ({"backbone.variant": "resnet18", "backbone.stride": 4}, r"allows \(8, 16, 32\)"),
        ({"loss.cross_entropy": 0.0}, "all of config.loss is 0"),
        ({"backbone.freeze": 1, "backbone.train": "none"}, "config.backbone.freeze is 1; with"),
        (
            {"eval.window": (20, 20)},
            r"config.eval.window is \(20, 20\); allowed: multiples of .* 8",
        ),
        (
            {"data.void": (3,), "data.name": "coco"},
            r"data.void is \(3,\); allowed with .*'coco', which has no such option: \(\)",
        ),
        (
            {"data.classes": ("fish",), "data.name": "scenes", "data.root": ""},
            "which has no such option",
        ),
        ({"head.deeplabv3plus.rates": (0, 6)}, r"rates is \(0, 6\); allowed: .* 1 or more"),
        ({"head.deeplabv3plus.reduce": -1}, "reduce is -1; allowed: 0 or more"),
        (
            {"backbone.norm": "group", "backbone.weights": "x"},
            "norm is 'group'; allowed with config",
        ),
        ({"head.deeplabv3plus.dropout": 2.0}, "config.head.deeplabv3plus.dropout is 2.0; allowed"),
    ],
)
def test_bad_configs(data, tmp_path, changes, message):
    changes = {k.replace(".", "__"): v for k, v in changes.items()}
    with pytest.raises(ConfigError, match=message):
        run.train(_config("deeplab", data, **changes), tmp_path / "w")
    assert not (tmp_path / "w").exists()


def test_undeclared_ids_are_named(data, tmp_path):
    root = _write_data(tmp_path / "data", count=2, classes=("background", "blob"))
    with pytest.raises(DataError, match="ids 2 are not declared"):
        run.train(_config("deeplab", root), tmp_path / "w")


@pytest.mark.slow
@pytest.mark.parametrize("head", ["linear_norm", "guided", "deeplabv3"])
def test_other_heads_on_a_resnet(data, tmp_path, head):
    changes = dict(head__name=head, class_weights="median_frequency", eval__report=False)
    changes |= dict(head__deeplabv3__channels=16, head__guided__width=8)
    changes |= dict(backbone__variant="resnet10_mini", backbone__stride=8)
    if head == "deeplabv3":
        changes |= dict(head__deeplabv3__auxiliary=True, train__accumulate=2)
    result = run.train(_config("deeplab", data, **changes), tmp_path / "w")
    assert np.isfinite(result["loss"]) and 0 <= result["miou"] <= 1
    assert run.evaluate(tmp_path / "w", {"eval.report": False}) == result


def test_one_class_is_too_few(tmp_path):
    root = _write_data(tmp_path / "data", count=2, classes=("background",))
    for kind in HEADS:
        with pytest.raises(ConfigError, match="the classes background; allowed are at least two"):
            run.train(_config(kind, root, data__void=(1, 2)), tmp_path / "w")
    assert not (tmp_path / "w").exists()


def test_layers_after_the_frozen_ones_are_trained(trained):
    weights = str(trained["deeplab"][0])
    config = _config("deeplab", "x", backbone__weights=weights, backbone__freeze=1)
    paths = assembly.make_task(config, CLASSES).frozen
    assert "backbone/patch_embed" in paths and "backbone/blocks_0" in paths
    assert "backbone/blocks_1" not in paths and "backbone" not in paths
    config.backbone.freeze = 0
    assert assembly.make_task(config, CLASSES).frozen == ("backbone",)


def _prior(workdir):
    restored = run.restore(workdir, {})
    return restored.host(restored.frozen["head"]["prior"])


@pytest.mark.slow
def test_a_frozen_backbone_gets_a_prior_that_resuming_keeps(trained, data, tmp_path):
    """The prior is solved for once: the features are frozen, and so is it.

    It is the same without a cache: with an augmentation beside flips, or too little memory, features
    are computed as they are needed.
    """
    changes = dict(head__name="guided", head__guided__width=8, head__guided__prior=1e-2)
    changes |= dict(
        backbone__weights=str(trained["deeplab"][0]), eval__report=False, train__steps=1
    )
    config = _config("deeplab", data, **changes)
    result = run.train(config, tmp_path / "cached")
    cached = _prior(tmp_path / "cached")
    assert np.abs(cached["kernel"]).max() > 0
    assert run.train(config, tmp_path / "cached") == result
    run.train(
        _config("deeplab", data, data__memory_gigabytes=1e-6, **changes), tmp_path / "computed"
    )
    computed = _prior(tmp_path / "computed")
    assert cached.keys() == computed.keys()
    for name in cached:
        np.testing.assert_allclose(cached[name], computed[name], rtol=1e-3, atol=1e-3)


def test_a_prior_needs_a_frozen_vit(trained, data, tmp_path):
    changes = dict(head__name="guided", head__guided__width=8, head__guided__prior=1e-2)
    weights = dict(backbone__weights=str(trained["deeplab"][0]), backbone__train="all")
    with pytest.raises(
        ConfigError, match="prior is 0.01; allowed with a backbone that is trained: 0"
    ):
        run.train(_config("deeplab", data, **changes, **weights), tmp_path / "w")
    frozen = _config("deeplab", data, **changes, backbone__train="none")
    frozen.backbone.variant = "resnet18"
    with pytest.raises(ConfigError, match="guided.prior is 0.01; allowed with a resnet18: 0"):
        assembly.make_task(frozen, CLASSES)
