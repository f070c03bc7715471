"""Pretraining, its evaluation and analysis, and the use of what it learnt, on the smallest run."""

import json
import pickle
import shutil

import jax
import numpy as np
import pytest
from command import run_here
from PIL import Image
from tiny import DINO_OVERRIDES, tiny_arguments, tiny_config

from jaxseg import analyze, assembly, run, schema, workdir
from jaxseg.backbones import BACKBONES, pretrained
from jaxseg.options import OptionError
from jaxseg.report import pictures
from jaxseg.run import check_batch
from jaxseg.schema import ConfigError
from jaxseg.tasks import Facts

LABELLED = {
    "data.name": "kinds",
    "data.limit": 22,
    "eval.limit": 12,
    "eval.k": 5,
    "train.eval_every": 3,
    "train.checkpoint_every": 0,
}


def _config(name="dino", **changes):
    config = schema.read_config(name)
    flat = schema.flatten(config)
    known = {k: v for k, v in (DINO_OVERRIDES | LABELLED).items() if k in flat}
    config.update_from_flattened_dict(known | {k.replace("__", "."): v for k, v in changes.items()})
    return config


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a finished run, shared by the tests that only read it."""
    folder = tmp_path_factory.mktemp("dino") / "w"
    run.train(_config(), folder)
    return folder


def test_what_a_run_leaves(trained):
    result = json.loads((trained / "eval.json").read_text())
    assert result["step"] == 6 and result["images"] == 12
    for key in ("loss", "knn", "rankme", "embedding_std", "teacher_entropy"):
        assert np.isfinite(result[key])
    assert result["k"] == 5 and result["train_images"] == 12
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert {row["step"] for row in rows if "val_knn" in row} == {0, 3, 6}
    logged = [row for row in rows if "loss" in row]
    assert {"teacher_kl", "center_norm"} <= logged[0].keys()
    assert {"images_per_second", "share_of_peak"} <= logged[1].keys()
    assert len(list((trained / "features").glob("*.npz"))) == 3
    assert (trained / "report/curves.png").exists()


def test_evaluation_repeats_the_numbers(trained):
    before = (trained / "eval.json").read_text()
    run.evaluate(trained, {})
    assert (trained / "eval.json").read_text() == before


def test_the_teacher_is_the_backbone_that_others_load(trained, tmp_path):
    loaded = pretrained.load(trained)
    state = run.restore(trained, {}).state
    teacher = state.extra["teacher"]["backbone"]
    np.testing.assert_array_equal(loaded.params["cls_token"], teacher["cls_token"])
    assert not np.array_equal(loaded.params["cls_token"], state.params["backbone"]["cls_token"])
    config = tiny_config(backbone__weights=str(trained), train__steps=1)
    run.train(config, tmp_path / "w")
    frozen = run.restore(tmp_path / "w", {}).frozen["backbone"]
    np.testing.assert_array_equal(frozen["cls_token"], teacher["cls_token"])


# What a backbone has learnt.

PARTS = {"_classes", "_neighbors", "_tsne", "_dense"}


def _only(monkeypatch, *parts):
    """Leaves the other parts of an analysis out: each takes seconds."""
    for name in PARTS - set(parts):
        monkeypatch.setattr(analyze._Analysis, name, lambda *_: None)


def _shown(monkeypatch, name):
    """The arguments of the calls of a function that draws."""
    calls = []
    monkeypatch.setattr(analyze.pictures, name, lambda *a, **k: calls.append((a, k)))
    return calls


@pytest.fixture(scope="module")
def analyzed(trained):
    """(what an analysis of the run found, the snapshots that its t-SNE shows, its warnings)."""
    shown, warnings, draw = [], [], analyze.pictures.plot_tsne
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(analyze.pictures, "plot_tsne", lambda *a: (shown.append(a[0]), draw(*a)))
        patch.setattr(analyze.log, "warning", lambda text, *a: warnings.append(text % a))
        result = analyze.analyze(None, {}, trained)
    return result, shown[0], warnings


def test_analysis_of_a_run(trained, analyzed):
    result, shown, warnings = analyzed
    assert result == json.loads((trained / "analysis.json").read_text())
    assert set(result["beside"]) == {"backbone", "untrained", "pixels"}
    for row in result["beside"].values():
        assert 0 <= row["knn"] <= 1 and 0 <= row["linear"] <= 1 and row["rankme"] > 0
    # `kinds` has masks, so the attention is compared with them.
    assert 0 < result["attention_jaccard"]["best_head"] < 1
    drawn = {path.name for path in (trained / "report").glob("*.png")}
    assert {"tsne.png", "attention.png", "pca.png", "confusion.png", "curves.png"} <= drawn
    page = (trained / "report/analysis.html").read_text()
    assert all(name in page for name in drawn)
    # Of all that the run has seen, and of the same images.
    assert [label for label, *_ in shown] == ["step 0", "step 3", "step 6"]
    assert not any("leaves out" in text for text in warnings)


@pytest.mark.parametrize(
    "overrides", [{"eval.split": "val"}, {"eval.crop": 0.5}, {"eval.resolution": 40}]
)
def test_tsne_is_of_the_images_looked_at(trained, analyzed, monkeypatch, caplog, overrides):
    """As many images of the same classes, but others, or seen otherwise than in training."""
    found = np.load(trained / "features/00000006.npz")["cls"].astype(np.float32)
    np.testing.assert_array_equal(analyzed[1][2][1], found)
    _only(monkeypatch, "_tsne")
    shown = _shown(monkeypatch, "plot_tsne")
    analyze.analyze(None, overrides, trained)
    (snapshots, *_), _ = shown[0]
    ((label, features, _),) = snapshots
    assert label.startswith("the run in") and not np.allclose(features, found, rtol=1e-2)
    assert "t-SNE leaves out 3 snapshots of other images" in caplog.text


def test_neighbours_show_the_images_that_they_are(trained, tmp_path, monkeypatch):
    """12 of the 22 images are looked at: an image's place among them is not that in the split."""
    _only(monkeypatch, "_neighbors")
    shown = _shown(monkeypatch, "plot_neighbors")
    analyze.analyze(_config(backbone__weights=str(trained)), {}, tmp_path)
    source = assembly.make_data(_config()).split("test")
    places = np.linspace(0, len(source) - 1, 12).astype(int)
    (images, *_), options = shown[0]
    assert len(source) > 12 and sum(image is not None for image in images) > 5
    for place, image, label in zip(places, images, options["labels"], strict=True):
        assert label == source[int(place)]["category"]
        if image is not None:
            np.testing.assert_array_equal(image, source[int(place)]["image"])


def test_a_failed_picture_or_masks_without_objects_cost_no_other_number(
    trained, tmp_path, monkeypatch, caplog
):
    def fail(*_, **__):
        raise RuntimeError("no picture")

    fit = analyze.fit

    def without_objects(*arguments, **options):
        example = fit(*arguments, **options)
        return example | {"mask": np.zeros_like(example["mask"])}

    monkeypatch.setattr(analyze.pictures, "plot_tsne", fail)
    monkeypatch.setattr(analyze, "fit", without_objects)
    with pytest.raises(RuntimeError, match="no picture"):
        analyze.analyze(_config(backbone__weights=str(trained)), {}, tmp_path)
    result = json.loads((tmp_path / "analysis.json").read_text())
    assert "attention_jaccard" not in result and "knn" in result
    assert "none of 12 masks has any" in caplog.text


def test_a_folder_that_cannot_be_made_ends_an_analysis_before_its_work(
    trained, tmp_path, monkeypatch
):
    monkeypatch.setattr(analyze.features.Gatherer, "__call__", lambda *_, **__: pytest.fail("work"))
    (tmp_path / "report").write_text("a file")
    with pytest.raises(OSError, match="report"):
        analyze.analyze(_config(backbone__weights=str(trained)), {}, tmp_path)


def test_analysis_of_weights(trained, analyzed, tmp_path, monkeypatch):
    _only(monkeypatch, "_classes")
    config = _config(backbone__weights=str(trained))
    result, (again, *_) = analyze.analyze(config, {}, tmp_path / "a"), analyzed
    for key in ("knn", "rankme", "embedding_std"):
        assert result[key] == pytest.approx(again[key], rel=1e-4)
    with pytest.raises(ConfigError, match="holds no run; to analyse weights give"):
        analyze.analyze(_config(), {}, tmp_path / "b")
    masks = tiny_config(backbone__weights=str(trained))
    with pytest.raises(ConfigError, match="of the task binary: allowed are configs/dino.py"):
        analyze.analyze(masks, {}, tmp_path / "b")


def test_a_collapse_is_kept_in_the_log(tmp_path):
    watch = assembly.make_task(_config(), ()).watch(tmp_path)
    values = dict(teacher_temperature=0.04, center_norm=1.0, teacher_distance=0.1)
    values |= dict(teacher_momentum=0.996, update_ratio=1e-3, teacher_kl=0.1, teacher_entropy=0.5)
    assert watch(5, values) == {}
    broken = values | {"center_norm": 0.0}
    assert watch(6, broken) == watch(7, broken) == {"collapse": "centre"}
    rows = [{"step": s, "loss": 1.0, **broken, "collapse": "centre"} for s in (6, 7)]
    assert pictures.plot_curves(rows, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").exists()


def test_images_are_not_compared_with_themselves(trained, caplog):
    found = run.restore(trained, {}).evaluate("train")
    assert "knn" not in found and "every image would find itself" in caplog.text


def test_a_worker_process_gets_what_reads_images():
    plan = run.make_plan(_config())
    reader = plan.task.reader(
        plan.data.split("test"), reading=plan.reading, batch=8, seed=0, frozen={}, digest=""
    )
    prepared = reader._source
    before = prepared.read(3)["image"]
    copy = pickle.loads(pickle.dumps(prepared))
    np.testing.assert_array_equal(copy.read(3)["image"], before)


def test_batches_that_devices_and_parts_do_not_divide(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    with pytest.raises(OptionError, match="accumulate is 5; allowed on 8 devices: divisors of 104"):
        check_batch(100, 5, batch_norm=False)
    with pytest.raises(
        OptionError, match="batch is 100; allowed with batch norm on 8 devices: mult"
    ):
        check_batch(100, 5, batch_norm=True)
    check_batch(96, 4, batch_norm=True)


@pytest.mark.slow
def test_rotation(tmp_path, monkeypatch):
    config = _config("rotation", views__size=32, train__steps=3)
    config.backbone.variant = "resnet10_mini"
    result = run.train(config, tmp_path)
    assert 0 <= result["rotation_accuracy"] <= 1 and np.isfinite(result["loss"])
    # Batch norm uses its running statistics, so that what is scored beside an image is nothing to it.
    again = run.evaluate(tmp_path, {"eval.batch": 5})
    assert again["rotation_accuracy"] == pytest.approx(result["rotation_accuracy"], abs=1e-6)
    assert again["loss"] == pytest.approx(result["loss"], rel=1e-5)
    with monkeypatch.context() as patch:
        _only(patch, "_dense", "_classes")
        found = analyze.analyze(None, {}, tmp_path)
    assert "attention_jaccard" not in found and found["knn"] == pytest.approx(
        result["knn"], abs=1e-6
    )
    # What fills up a batch is nothing to the batch norm of the untrained network either.
    _only(monkeypatch, "_classes")
    larger = analyze.analyze(None, {"eval.batch": 100}, tmp_path)["beside"]["untrained"]
    exact = analyze.analyze(None, {"eval.batch": 22}, tmp_path)["beside"]["untrained"]
    assert larger == pytest.approx(exact, rel=1e-4)


@pytest.mark.slow
def test_batch_norm_and_every_crop_size(tmp_path):
    config = _config(
        backbone__variant="resnet10_mini",
        dino__batch_norm=True,
        views__local_size=24,
        views__local_count=1,
        train__steps=2,
        train__eval_every=0,
    )
    result = run.train(config, tmp_path / "a")
    again = run.evaluate(tmp_path / "a", {"eval.batch": 5})
    assert again["loss"] == pytest.approx(result["loss"], rel=1e-5)
    # Another run goes on from these weights and statistics: its features are the same at first.
    config.backbone.weights, config.train.eval_every = str(tmp_path / "a"), 2
    run.train(config, tmp_path / "b")
    first = json.loads((tmp_path / "b" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["step"] == 0
    assert first["val_rankme"] == pytest.approx(result["rankme"], rel=1e-3)
    assert first["val_knn"] == result["knn"]


# Both with the steps, the examples and the sizes of `trained`: so the programs are compiled already.


def test_unlabelled_images_have_no_knn(trained, tmp_path):
    result = run.train(_config(data__name="shapes", train__eval_every=0), tmp_path)
    assert "knn" not in result and np.isfinite(result["rankme"])


def test_a_folder_without_splits_trains_and_says_that_it_is_not_scored(trained, tmp_path, caplog):
    (tmp_path / "images").mkdir()
    for i in range(30):  # of which a tenth are for validation, and 22 are read
        noise = np.random.default_rng(i).integers(0, 256, (32, 32, 3), np.uint8)
        Image.fromarray(noise).save(tmp_path / f"images/{i}.png")
    config = _config(data__name="images", data__root=str(tmp_path / "images"))
    config.eval.split, config.train.eval_every = "test", 0
    assert run.train(config, tmp_path / "w") == {}
    assert "the run is saved, but not scored" in caplog.text and "no split 'test'" in caplog.text
    result = run.evaluate(tmp_path / "w", {"eval.split": "train"})
    assert result["images"] == 12 and np.isfinite(result["loss"])


def test_modes_that_do_not_fit(trained, tmp_path):
    error = run_here("--mode=predict", f"--workdir={trained}", "--inputs=x", "--outputs=y")
    assert "x" in error  # no such images
    (tmp_path / "x").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "x" / "a.png")
    arguments = [f"--inputs={tmp_path / 'x'}", f"--outputs={tmp_path / 'y'}"]
    error = run_here("--mode=predict", f"--workdir={trained}", *arguments)
    assert "a run of dino, which predicts no masks" in error
    config = tiny_config()
    variant = BACKBONES[config.backbone.variant]
    description = workdir.Description(variant, Facts((32, 32)), "")
    (tmp_path / "s").mkdir()
    workdir.begin(tmp_path / "s", config, description)
    error = run_here("--mode=analyze", f"--workdir={tmp_path / 's'}")
    assert "holds a run of segmentation; to analyse its backbone" in error


@pytest.mark.parametrize(
    "key, value, message",
    [
        (
            "views.global_size",
            33,
            "config.views.global_size is 33; allowed: multiples of the patch 8",
        ),
        ("views.local_scale", (0.5, 0.2), "config.views.local_scale is .* 0 < low <= high <= 1"),
        ("views.blur", (0.5, 2.0, 0.0), "config.views.blur is .*allowed: 3 values, each 0 to 1"),
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
        run.train(config, tmp_path)
    assert not any(tmp_path.iterdir())


def test_crops_must_fit_the_patches_of_the_weights():
    config = schema.read_config("dino")
    config.backbone.variant = "dinov2_vits14"
    with pytest.raises(ConfigError, match="local_size is 96; allowed: multiples of the patch 14"):
        assembly.make_task(config, ())
    config.views.local_size = 98
    assembly.make_task(config, ())


def test_from_the_command_line(trained, tmp_path, capsys):
    """The same run: it goes on where it ended."""
    folder = shutil.copytree(trained, tmp_path / "w")
    before = (folder / "eval.json").read_text()
    arguments = tiny_arguments(DINO_OVERRIDES | LABELLED)
    error = run_here("--config=configs/dino.py", f"--workdir={folder}", *arguments)
    assert error is None and "test at step 6, 12 images" in capsys.readouterr().out
    assert (folder / "eval.json").read_text() == before
    # The preset makes it another one.
    arguments = ["--config=configs/dino.py:small_batch", f"--workdir={folder}", *arguments]
    assert "dino.momentum: 0.996 there, 0.9995 now" in run_here(*arguments)
