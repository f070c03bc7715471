"""Whole runs in this process: what they leave behind, how they resume, and what stops them."""

import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image
from tiny import losses, tiny_config

from jaxseg import run
from jaxseg.checksums import CheckpointError
from jaxseg.data import DataError
from jaxseg.schema import ConfigError
from jaxseg.train import loop
from jaxseg.train.loop import NonFiniteLossError

TRAINED = dict(train__eval_every=3, optim__average=0.5)


# Of runs of which only the end matters.
SHORT = dict(train__steps=3, train__checkpoint_every=0)
RESTING = SHORT | dict(backbone__train="none")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run with a report and validation, shared by the tests that only read it."""
    workdir = tmp_path_factory.mktemp("run") / "w"
    config = tiny_config(eval__report=True, **TRAINED)
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
    config = tiny_config(**TRAINED)

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
    config = tiny_config(eval__report=True, **TRAINED)
    assert run.train(config, tmp_path / "w") == result
    assert losses(tmp_path / "w") == losses(workdir)


def test_a_run_that_has_ended_goes_on_for_longer(trained, tmp_path):
    workdir, result = trained
    shutil.copytree(workdir, tmp_path / "w")
    longer = tiny_config(**TRAINED, train__steps=8)
    found = run.train(longer, tmp_path / "w")
    assert found["step"] == 8 and found["loss"] != result["loss"]
    logged = losses(tmp_path / "w")
    assert len(logged) == 8 and logged[:6] == losses(workdir)
    stored = json.loads((tmp_path / "w" / "config.json").read_text())
    (before,) = stored["history"]
    assert before["steps"] == 6 and before["train"]["steps"] == 6
    assert stored["train"]["steps"] == 8
    rows = [json.loads(x) for x in (tmp_path / "w" / "metrics.jsonl").read_text().splitlines()]
    rates = {row["step"]: row["learning_rate"] for row in rows if "learning_rate" in row}
    # The schedule of the longer run, as it is at these steps.
    schedule = run.make_plan(longer).make_optimizer()[1]
    assert [rates[7], rates[8]] == pytest.approx([float(schedule(i)) for i in (6, 7)])
    # It is a finished run as any other: a second call trains no step, and evaluates it again.
    assert run.train(longer, tmp_path / "w") == found
    with pytest.raises(ConfigError, match="train.steps: 8 there, 6 now"):
        run.train(tiny_config(**TRAINED), tmp_path / "w")
    with pytest.raises(ConfigError, match="(?s)optim.lr: 0.004 there, 0.1 now.*train.steps: 8"):
        run.train(tiny_config(**TRAINED, train__steps=9, optim__lr=0.1), tmp_path / "w")
    assert json.loads((tmp_path / "w" / "config.json").read_text()) == stored


def test_flat_loss_explodes_with_step_and_checkpoint_named(tmp_path):
    config = tiny_config(optim__lr=1e3, optim__name="sgd", optim__clip_norm=0.0, train__steps=40)
    config.optim.warmup = 0.5
    config.train.checkpoint_every = 1
    with pytest.raises(
        NonFiniteLossError, match=r"(loss|norm) is (nan|inf) at step \d+; last good.*step \d+"
    ):
        run.train(config, tmp_path)


@pytest.fixture(scope="module")
def frozen(tmp_path_factory):
    """A run whose backbone rests."""
    workdir, config = tmp_path_factory.mktemp("frozen") / "w", tiny_config(**RESTING)
    return workdir, config, run.train(config, workdir)


def test_frozen_backbone_stays_and_is_saved_once(frozen, tmp_path):
    workdir, config, result = frozen
    shutil.copytree(workdir, tmp_path, dirs_exist_ok=True)
    restored = run.restore(tmp_path, {})
    fresh = run.make_plan(config).task.parameters(config.seed)[1]
    for a, b in zip(*map(jax.tree.leaves, (restored.frozen, fresh)), strict=True):
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


def test_cached_features_give_the_same_run_as_computed_ones(frozen, tmp_path):
    _, _, cached = frozen  # in memory
    disk = tiny_config(**RESTING, data__cache_dir=str(tmp_path / "features"))
    assert run.train(disk, tmp_path / "disk") == cached
    assert len(list((tmp_path / "features").glob("*.npy"))) == 12  # 6 train, 6 test images
    assert run.train(disk, tmp_path / "again") == cached
    computed = tiny_config(**RESTING, data__memory_gigabytes=0.0)
    found = run.train(computed, tmp_path / "computed")
    # The cache keeps float16, so the two agree to its precision.
    np.testing.assert_allclose(found["loss"], cached["loss"], atol=2e-3)


def test_what_will_be_scored_is_looked_at_before_training(tmp_path):
    root = tmp_path / "data"
    for split, size in (("train", (32, 32)), ("test", (32, 16))):
        for kind in ("images", "masks"):
            (root / split / kind).mkdir(parents=True)
            shape = (32, 32) if kind == "images" else size
            Image.new("L", shape[::-1]).save(root / split / kind / "a.png")
    config = tiny_config(data__name="binary_masks", data__root=str(root))
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
        run.train(tiny_config(data__name="binary_masks", data__root="nowhere"), tmp_path)
    assert not list(tmp_path.iterdir())


def test_eval_without_a_run(tmp_path):
    with pytest.raises(ConfigError, match="holds no run"):
        run.evaluate(tmp_path, {})


@pytest.mark.parametrize("train", ["all", "none"])
def test_a_workdir_is_a_source_of_weights(trained, frozen, tmp_path, train):
    first = {"all": trained[0], "none": frozen[0]}[train]
    run.train(tiny_config(backbone__weights=str(first), **SHORT), tmp_path)
    both = (run.restore(folder, {}).params["backbone"] for folder in (first, tmp_path))
    for a, b in zip(*map(jax.tree.leaves, both), strict=True):
        np.testing.assert_array_equal(a, b)
