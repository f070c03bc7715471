"""Whole runs in this process: what they leave behind, how they resume, and what stops them."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image
from tiny import losses, tiny_config

from jaxseg import run
from jaxseg.checksums import CheckpointError
from jaxseg.config import ConfigError
from jaxseg.data import DataError
from jaxseg.train import loop
from jaxseg.train.loop import NonFiniteLossError


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run with a report and validation, shared by the tests that only read it."""
    workdir = tmp_path_factory.mktemp("run") / "w"
    config = tiny_config(eval__report=True, train__eval_every=3, head__name="guided")
    return workdir, run.train(config, workdir)


def test_workdir_holds_everything(trained):
    workdir, result = trained
    names = {p.name for p in workdir.iterdir()} - {".lock"}
    assert names == {
        *("config.json", "model.json", "metrics.jsonl", "eval.json"),
        *("checkpoints", "tensorboard", "report"),
    }
    assert json.loads((workdir / "eval.json").read_text()) == result
    wanted = "step split loss accuracy iou foreground_iou precision recall boundary_iou categories"
    assert set(wanted.split()) <= set(result)
    assert result["step"] == 6 and result["split"] == "test" and result["images"] == 6
    assert result["categories"]["fish"]["iou"] == result["iou"]
    assert all(np.isfinite(losses(workdir)))


def test_report_shows_pictures(trained):
    workdir, _ = trained
    page = (workdir / "report" / "index.html").read_text()
    for name in ("curves.png", "examples.png", "categories.png"):
        assert f'src="{name}"' in page
        picture = np.asarray(Image.open(workdir / "report" / name).convert("L"))
        assert picture.std() > 5  # not blank
    assert "fish" in page and "foreground iou" in page


def test_eval_repeats_the_numbers_and_other_splits_can_be_asked_for(trained):
    workdir, result = trained
    again = run.evaluate(workdir, {"eval.report": False})
    assert again == result
    best = run.evaluate(workdir, {"eval.report": False, "eval.checkpoint": "best"})
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    scores = {row["step"]: row["val_iou"] for row in rows if "val_iou" in row}
    assert scores.keys() == {3, 6} and scores[best["step"]] == max(scores.values())
    other = run.evaluate(workdir, {"eval.report": False, "eval.split": "val", "eval.batch": 5})
    assert other["split"] == "val" and other["iou"] != result["iou"]
    assert run.evaluate(workdir, {"eval.report": False}) == result


def test_scores_do_not_depend_on_the_batch_size(trained):
    workdir, result = trained
    other = run.evaluate(workdir, {"eval.report": False, "eval.batch": 5})
    assert other["iou"] == pytest.approx(result["iou"], abs=1e-6)
    assert other["loss"] == pytest.approx(result["loss"], abs=1e-5)


def test_resume_is_exact(trained, tmp_path):
    _, result = trained
    config = tiny_config(train__eval_every=3, head__name="guided")

    def stop_at_step_4(self, step):
        return step == 4

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.StopSignal, "raised", stop_at_step_4)
        with pytest.raises(loop.Interrupted, match="step 4"):
            run.train(config, tmp_path)
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 4
    resumed = run.train(config, tmp_path)
    assert resumed == result
    assert losses(tmp_path) == losses(trained[0])


def test_resume_from_an_earlier_checkpoint_repeats_the_steps(trained, tmp_path):
    workdir, result = trained
    shutil.copytree(workdir, tmp_path / "w")
    shutil.rmtree(tmp_path / "w" / "checkpoints" / "6")
    config = tiny_config(eval__report=True, train__eval_every=3, head__name="guided")
    assert run.train(config, tmp_path / "w") == result
    assert losses(tmp_path / "w") == losses(workdir)


def test_flat_loss_explodes_with_step_and_checkpoint_named(tmp_path):
    config = tiny_config(optim__lr=1e3, optim__name="sgd", optim__clip_norm=0.0, train__steps=40)
    config.optim.warmup = 0.5
    config.train.checkpoint_every = 1
    with pytest.raises(
        NonFiniteLossError, match=r"(loss|norm) is (nan|inf) at step \d+; last good.*step \d+"
    ):
        run.train(config, tmp_path)


def test_frozen_backbone_stays_and_is_saved_once(tmp_path):
    config = tiny_config(backbone__train="none")
    result = run.train(config, tmp_path)
    assert (tmp_path / "frozen").exists()
    restored = run.restore(tmp_path, {})
    fresh = run.make_params(restored.task, run.Backbone.load(config), config)[1]
    for a, b in zip(*map(_leaves, (restored.frozen, fresh)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert run.evaluate(tmp_path, {}) == result
    big = max((f for f in (tmp_path / "frozen").rglob("*") if f.is_file()), key=_size)
    big.write_bytes(big.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="frozen is damaged. Start the training again"):
        run.evaluate(tmp_path, {})
    shutil.rmtree(tmp_path / "frozen")
    with pytest.raises(CheckpointError, match="frozen is missing"):
        run.evaluate(tmp_path, {})
    assert run.train(config, tmp_path) == result  # writes it anew


def _size(path):
    return path.stat().st_size


def _leaves(tree):
    import jax

    return jax.tree.leaves(tree)


def test_cached_features_give_the_same_run_as_computed_ones(tmp_path):
    cached = run.train(tiny_config(backbone__train="none"), tmp_path / "memory")
    disk = dict(backbone__train="none", data__cache_dir=str(tmp_path / "features"))
    assert run.train(tiny_config(**disk), tmp_path / "disk") == cached
    assert len(list((tmp_path / "features").glob("*.npy"))) == 12  # 6 train, 6 test images
    assert run.train(tiny_config(**disk), tmp_path / "again") == cached
    computed = run.train(
        tiny_config(backbone__train="none", data__memory_gigabytes=0.0), tmp_path / "computed"
    )
    # The cache keeps float16, so the two agree to its precision.
    np.testing.assert_allclose(computed["loss"], cached["loss"], atol=2e-3)


def test_what_will_be_scored_is_looked_at_before_training(tmp_path):
    root = tmp_path / "data"
    for split, size in (("train", (32, 32)), ("test", (32, 16))):
        for kind in ("images", "masks"):
            (root / split / kind).mkdir(parents=True)
            shape = (32, 32) if kind == "images" else size
            Image.new("L", shape[::-1]).save(root / split / kind / "a.png")
    config = tiny_config(data__name="folder", data__root=str(root))
    with pytest.raises(DataError, match="config.eval.split='test', .*a.png is 16x32 but its image"):
        run.train(config, tmp_path / "w")
    shutil.rmtree(root / "test")
    with pytest.raises(
        DataError, match="config.eval.split='test', .*no split 'test': it has train"
    ):
        run.train(config, tmp_path / "w")
    assert not (tmp_path / "w").exists()


def test_unknown_data_is_named(tmp_path):
    with pytest.raises(ValueError, match="allowed: fish"):
        run.train(tiny_config(data__categories=("dog",)), tmp_path)
    with pytest.raises(DataError, match="nowhere"):
        run.train(tiny_config(data__name="folder", data__root="nowhere"), tmp_path)
    assert not list(tmp_path.iterdir())


def test_eval_without_a_run(tmp_path):
    with pytest.raises(ConfigError, match="holds no run"):
        run.evaluate(tmp_path, {})


@pytest.mark.parametrize("train", ["all", "none"])
def test_a_workdir_is_a_source_of_weights(tmp_path, train):
    run.train(tiny_config(backbone__train=train), tmp_path / "first")
    second = tiny_config(backbone__weights=str(tmp_path / "first"))
    run.train(second, tmp_path / "second")
    first, then = (run.restore(tmp_path / n, {}) for n in ("first", "second"))
    for a, b in zip(*(_leaves(r.params["backbone"]) for r in (first, then)), strict=True):
        np.testing.assert_array_equal(a, b)
