"""Pretraining, its evaluation and analysis, and the use of what it learnt, on the smallest run."""

import json
import pickle

import jax
import numpy as np
import pytest
from PIL import Image
from tiny import DINO_OVERRIDES, run_main, tiny_arguments, tiny_config

from configs import dino, rotation
from jaxseg import analyze, modes, pretrain, run, weights
from jaxseg.config import ConfigError, check_crops
from jaxseg.report import report
from jaxseg.experiment import check_batch, make_source
from jaxseg.backbones import BACKBONES

LABELLED = {
    "data.name": "kinds",
    "data.limit": 22,
    "eval.limit": 12,
    "eval.k": 5,
    "train.eval_every": 3,
}


def _config(module=dino, **changes):
    config = module.get_config()
    known = {k: v for k, v in (DINO_OVERRIDES | LABELLED).items() if _has(config, k)}
    config.update_from_flattened_dict(known | {k.replace("__", "."): v for k, v in changes.items()})
    return config


def _has(config, key):
    section, name = key.split(".")
    return section in config and name in config[section]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("dino") / "w"
    pretrain.train(_config(), workdir)
    return workdir


def test_what_a_run_leaves(workdir):
    result = json.loads((workdir / "eval.json").read_text())
    assert result["step"] == 6 and result["images"] == 12
    for key in ("loss", "knn", "rankme", "embedding_std", "teacher_entropy"):
        assert np.isfinite(result[key])
    assert result["k"] == 5 and result["train_images"] == 12
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert {row["step"] for row in rows if "val_knn" in row} == {0, 3, 6}
    logged = [row for row in rows if "loss" in row]
    assert {"teacher_kl", "center_norm"} <= logged[0].keys() and "images_per_second" in logged[1]
    assert len(list((workdir / "features").glob("*.npz"))) == 3
    assert (workdir / "report/curves.png").exists()


def test_evaluation_repeats_the_numbers(workdir):
    before = (workdir / "eval.json").read_text()
    pretrain.evaluate(workdir, {})
    assert (workdir / "eval.json").read_text() == before


def test_the_teacher_is_the_backbone_that_others_load(workdir, tmp_path):
    loaded = weights.load(workdir)
    state = pretrain.restore(workdir, {}).state
    teacher = state.extra["teacher"]["backbone"]
    np.testing.assert_array_equal(loaded.params["cls_token"], teacher["cls_token"])
    assert not np.array_equal(loaded.params["cls_token"], state.params["backbone"]["cls_token"])
    config = tiny_config(backbone__weights=str(workdir), train__steps=2)
    run.train(config, tmp_path / "w")
    frozen = run.restore(tmp_path / "w", {}).frozen["backbone"]
    np.testing.assert_array_equal(frozen["cls_token"], teacher["cls_token"])


def test_analysis_of_a_run(workdir):
    result = analyze.analyze(None, {}, workdir)
    assert result == json.loads((workdir / "analysis.json").read_text())
    assert set(result["beside"]) == {"backbone", "untrained", "pixels"}
    for row in result["beside"].values():
        assert 0 <= row["knn"] <= 1 and 0 <= row["linear"] <= 1 and row["rankme"] > 0
    # `kinds` has masks, so the attention is compared with them.
    assert 0 < result["attention_jaccard"]["best_head"] < 1
    pictures = {path.name for path in (workdir / "report").glob("*.png")}
    assert {"tsne.png", "attention.png", "pca.png", "confusion.png", "curves.png"} <= pictures
    page = (workdir / "report/analysis.html").read_text()
    assert all(name in page for name in pictures)


@pytest.mark.parametrize(
    "overrides", [{"eval.split": "val"}, {"eval.crop": 0.5}, {"eval.resolution": 40}]
)
def test_tsne_is_of_the_images_looked_at(workdir, monkeypatch, caplog, overrides):
    """As many images of the same classes, but others, or seen otherwise than in training."""
    shown = []
    monkeypatch.setattr(analyze.embedding, "plot_tsne", lambda rows, *_: shown.append(rows))
    analyze.analyze(None, {}, workdir)
    assert [label for label, *_ in shown[0]] == ["step 0", "step 3", "step 6"]
    found = np.load(workdir / "features/00000006.npz")["cls"].astype(np.float32)
    np.testing.assert_array_equal(shown[0][2][1], found)
    assert "leaves out" not in caplog.text
    analyze.analyze(None, overrides, workdir)
    ((label, features, _),) = shown[1]
    assert label.startswith("the run in") and not np.allclose(features, found, rtol=1e-2)
    assert "t-SNE leaves out 3 snapshots of other images" in caplog.text


def test_neighbours_show_the_images_that_they_are(workdir, tmp_path, monkeypatch):
    """12 of the 22 images are looked at: an image's place among them is not that in the split."""
    shown = []
    monkeypatch.setattr(analyze.neighbors, "plot_neighbors", lambda *a, **k: shown.append((a, k)))
    analyze.analyze(_config(backbone__weights=str(workdir)), {}, tmp_path)
    source = make_source(_config(), "test")
    places = np.linspace(0, len(source) - 1, 12).astype(int)
    (images, *_), options = shown[0]
    assert len(source) > 12 and sum(image is not None for image in images) > 5
    for place, image, label in zip(places, images, options["labels"], strict=True):
        assert label == source[int(place)]["category"]
        if image is not None:
            np.testing.assert_array_equal(image, source[int(place)]["image"])


def test_numbers_outlive_a_picture_that_fails(workdir, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no picture")

    monkeypatch.setattr(analyze.embedding, "plot_tsne", fail)
    with pytest.raises(RuntimeError, match="no picture"):
        analyze.analyze(_config(backbone__weights=str(workdir)), {}, tmp_path)
    assert "knn" in json.loads((tmp_path / "analysis.json").read_text())


def test_masks_without_objects_cost_only_the_overlap(workdir, tmp_path, monkeypatch, caplog):
    fit = analyze.sources.fit

    def without_objects(*arguments, **options):
        example = fit(*arguments, **options)
        return example | {"mask": np.zeros_like(example["mask"])}

    monkeypatch.setattr(analyze.sources, "fit", without_objects)
    result = analyze.analyze(_config(backbone__weights=str(workdir)), {}, tmp_path)
    assert "attention_jaccard" not in result and "knn" in result
    assert "none of 12 masks has any" in caplog.text


def test_a_folder_that_cannot_be_made_ends_an_analysis_before_its_work(
    workdir, tmp_path, monkeypatch
):
    monkeypatch.setattr(analyze.features.Gatherer, "__call__", lambda *_, **__: pytest.fail("work"))
    (tmp_path / "report").write_text("a file")
    with pytest.raises(OSError, match="report"):
        analyze.analyze(_config(backbone__weights=str(workdir)), {}, tmp_path)


def test_a_collapse_is_kept_in_the_log(tmp_path):
    watch = pretrain._monitor(_config(), tmp_path)
    values = dict(teacher_temperature=0.04, center_norm=1.0, teacher_distance=0.1)
    values |= dict(teacher_momentum=0.996, update_ratio=1e-3, teacher_kl=0.1, teacher_entropy=0.5)
    assert watch(5, values) == {}
    broken = values | {"center_norm": 0.0}
    assert watch(6, broken) == watch(7, broken) == {"collapse": "centre"}
    rows = [{"step": s, "loss": 1.0, **broken, "collapse": "centre"} for s in (6, 7)]
    assert report.plot_curves(rows, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").exists()


def test_images_are_not_compared_with_themselves(workdir, caplog):
    found = pretrain.evaluate(workdir, {"eval.split": "train"})
    assert "knn" not in found and "every image would find itself" in caplog.text
    pretrain.evaluate(workdir, {})


def test_a_worker_process_gets_what_reads_images():
    reader = pretrain.Reader(_config(), make_source(_config(), "test"), (32, 32))
    prepared = reader._source
    before = prepared.read(3)["image"]
    copy = pickle.loads(pickle.dumps(prepared))
    np.testing.assert_array_equal(copy.read(3)["image"], before)


def test_batches_that_devices_and_parts_do_not_divide(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    config = _config(train__batch=100, train__accumulate=5)
    with pytest.raises(ConfigError, match="accumulate is 5; allowed on 8 devices: divisors of 104"):
        check_batch(config, batch_norm=False)
    with pytest.raises(
        ConfigError, match="batch is 100; allowed with batch norm on 8 devices: mult"
    ):
        check_batch(config, batch_norm=True)
    check_batch(_config(train__batch=96, train__accumulate=4), batch_norm=True)


def test_analysis_of_weights(workdir, tmp_path):
    config = _config(backbone__weights=str(workdir))
    result = analyze.analyze(config, {}, tmp_path / "a")
    again = analyze.analyze(None, {}, workdir)
    for key in ("knn", "rankme", "embedding_std"):
        assert result[key] == pytest.approx(again[key], rel=1e-4)
    with pytest.raises(ConfigError, match="holds no run; to analyse weights give"):
        analyze.analyze(_config(), {}, tmp_path / "b")
    dense = tiny_config(backbone__weights=str(workdir))
    with pytest.raises(ConfigError, match="of the task segmentation: allowed are configs/dino.py"):
        analyze.analyze(dense, {}, tmp_path / "b")


@pytest.mark.slow
def test_rotation(tmp_path):
    config = _config(rotation, views__size=32, train__steps=3, backbone__variant="resnet10_mini")
    result = pretrain.train(config, tmp_path)
    assert 0 <= result["rotation_accuracy"] <= 1 and np.isfinite(result["loss"])
    # Batch norm uses its running statistics, so that what is scored beside an image is nothing to it.
    again = pretrain.evaluate(tmp_path, {"eval.batch": 5})
    assert again["rotation_accuracy"] == pytest.approx(result["rotation_accuracy"], abs=1e-6)
    assert again["loss"] == pytest.approx(result["loss"], rel=1e-5)
    found = analyze.analyze(None, {}, tmp_path)
    assert "attention_jaccard" not in found and found["knn"] == pytest.approx(
        result["knn"], abs=1e-6
    )
    # What fills up a batch is nothing to the batch norm of the untrained network either.
    larger = analyze.analyze(None, {"eval.batch": 100}, tmp_path)["beside"]["untrained"]
    exact = analyze.analyze(None, {"eval.batch": 22}, tmp_path)["beside"]["untrained"]
    assert larger == pytest.approx(exact, rel=1e-4)


@pytest.mark.slow
def test_batch_norm_and_every_crop_size(tmp_path):
    config = _config(
        backbone__variant="resnet10_mini",
        dino__batch_norm=True,
        views__local_size=24,
        train__steps=2,
        train__eval_every=0,
    )
    result = pretrain.train(config, tmp_path / "a")
    again = pretrain.evaluate(tmp_path / "a", {"eval.batch": 5})
    assert again["loss"] == pytest.approx(result["loss"], rel=1e-5)
    # Another run goes on from these weights and statistics: its features are the same at first.
    config.backbone.weights, config.train.eval_every = str(tmp_path / "a"), 1
    pretrain.train(config, tmp_path / "b")
    first = json.loads((tmp_path / "b" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["step"] == 0
    assert first["val_rankme"] == pytest.approx(result["rankme"], rel=1e-3)
    assert first["val_knn"] == result["knn"]


@pytest.mark.slow
def test_unlabelled_images_have_no_knn(tmp_path):
    config = _config(data__name="shapes", train__steps=2)
    result = pretrain.train(config, tmp_path)
    assert "knn" not in result and np.isfinite(result["rankme"])


@pytest.mark.slow
def test_a_folder_without_splits_trains_and_says_that_it_is_not_scored(tmp_path, caplog):
    (tmp_path / "images").mkdir()
    for i in range(4):
        noise = np.random.default_rng(i).integers(0, 256, (32, 32, 3), np.uint8)
        Image.fromarray(noise).save(tmp_path / f"images/{i}.png")
    config = _config(data__name="images", data__root=str(tmp_path / "images"), train__steps=1)
    config.eval.split = "val"
    assert pretrain.train(config, tmp_path / "w") == {}
    assert "the run is saved, but not scored" in caplog.text and "no split 'val'" in caplog.text
    result = pretrain.evaluate(tmp_path / "w", {"eval.split": "train"})
    assert result["images"] == 4 and np.isfinite(result["loss"])


def test_modes_that_do_not_fit(workdir, tmp_path):
    options = dict(config=None, overrides={}, inputs="x", outputs="y")
    with pytest.raises(ConfigError, match="a run of dino, which predicts no masks"):
        modes.main("predict", workdir=workdir, **options)
    config = tiny_config(train__steps=1)
    run.train(config, tmp_path / "s")
    with pytest.raises(ConfigError, match="holds a run of segmentation; to analyse its backbone"):
        modes.main("analyze", workdir=tmp_path / "s", **options)


@pytest.mark.parametrize(
    "key, value, message",
    [
        (
            "views.global_size",
            33,
            "config.views.global_size is 33; allowed: multiples of the patch 8",
        ),
        ("views.local_scale", (0.5, 0.2), "config.views.local_scale is .* 0 < low <= high <= 1"),
        ("views.blur", (0.5, 2.0, 0.0), "config.views.blur is .*three probabilities"),
        ("train.accumulate", 3, "config.train.accumulate is 3; allowed: divisors of .*batch=8"),
        ("dino.teacher_temperature", 0.0, "config.dino.teacher_temperature is 0.0; allowed"),
        ("backbone.variant", "vgg", "config.backbone.variant is 'vgg'; allowed: .*resnet18"),
        ("optim.average", 0.9, "config.optim.average is 0.9; allowed for dino: 0"),
        ("eval.train_split", "all", "config.eval.train_split is 'all'; allowed: train, val, test"),
    ],
)
def test_wrong_values_are_named(tmp_path, key, value, message):
    config = _config()
    config.update_from_flattened_dict({key: value})
    with pytest.raises(ConfigError, match=message):
        pretrain.train(config, tmp_path)
    assert not any(tmp_path.iterdir())


def test_crops_must_fit_the_patches_of_the_weights():
    config = dino.get_config()
    with pytest.raises(ConfigError, match="local_size is 96; allowed: multiples of the patch 14"):
        check_crops(config, BACKBONES["dinov2_vits14"])
    config.views.local_size = 98
    check_crops(config, BACKBONES["dinov2_vits14"])


@pytest.mark.slow
def test_from_the_command_line(tmp_path):
    arguments = tiny_arguments(DINO_OVERRIDES, train__steps=2)
    done = run_main("--config=configs/dino.py:small_batch", f"--workdir={tmp_path}", *arguments)
    assert done.returncode == 0, done.stderr
    assert "test at step 2, 8 images" in done.stdout
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["dino"]["momentum"] == 0.9995
