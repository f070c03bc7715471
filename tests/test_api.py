"""The library as a script uses it: parts of its own, runs that are stopped and loaded, and clear errors.

Everything is tiny: what is asked is whether the parts meet, not what they learn.
"""

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image
from tiny import ROOT, losses, tiny_config

import jaxseg
from jaxseg import objects, run
from jaxseg.data import DataError
from jaxseg.options import OptionError
from jaxseg.predict import predict
from jaxseg.schema import ConfigError
from jaxseg.tasks.dino import DinoViews
from jaxseg.tasks.rotation import RotationViews
from jaxseg.train import loop

NAMES = ("ground", "square", "bar")


class Backbone(nn.Module):
    """With batch norm and dropout, and `train` required."""

    width: int = 8

    @nn.compact
    def __call__(self, image, train):
        x = nn.Conv(self.width, (4, 4), strides=4)(image)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        x = nn.Dropout(0.2, deterministic=not train)(x)
        return {"cls": x.mean((1, 2)), "patches": x, "whatever": None}


class Stages(nn.Module):
    """Two maps, as a mapping; nothing that is trained, and no `train`."""

    patch: int = 8

    @nn.compact
    def __call__(self, image):
        x = nn.Conv(4, (4, 4), strides=4)(image)
        y = nn.Conv(6, (2, 2), strides=2)(x)
        return {"cls": y.mean((1, 2)), "patches": y, "stages": {8: y, 4: x}}


def resized(x, image):
    return jax.image.resize(x, (*image.shape[:3], x.shape[-1]), "bilinear")


class Head(nn.Module):
    """Dropout; the logits alone."""

    outputs: int = 3

    @nn.compact
    def __call__(self, features, image, train):
        return resized(nn.Dense(self.outputs)(nn.Dropout(0.3)(features, not train)), image)


class HeadWithoutTrain(nn.Module):
    @nn.compact
    def __call__(self, features, image):
        return resized(nn.Dense(3)(features), image), {"mean": features.mean()}


class HeadWithDefault(nn.Module):
    @nn.compact
    def __call__(self, features, image, train=True):
        norm = nn.BatchNorm(use_running_average=not train)
        return resized(nn.Dense(3)(norm(features)), image), None


class HeadWithKeywords(nn.Module):
    @nn.compact
    def __call__(self, features, image, **options):
        assert set(options) == {"train"}
        return resized(nn.Dense(3)(features), image)


class HeadOfSeveralMaps(nn.Module):
    several_maps = True

    @nn.compact
    def __call__(self, features, image, *, train):
        maps = {k: x for k, x in features.items() if k != "auxiliary"}
        assert all(image.shape[1] == k * x.shape[1] for k, x in maps.items())
        return sum(resized(nn.Dense(3)(x), image) for _, x in sorted(maps.items()))


class Net(nn.Module):
    """A whole network."""

    outputs: int = 3

    @nn.compact
    def __call__(self, image, train=False):
        x = nn.BatchNorm(use_running_average=not train)(nn.Conv(4, (3, 3))(image))
        return nn.Conv(self.outputs, (1, 1))(nn.relu(x))


class Source:
    """Images of three sizes; no optional attribute."""

    def __init__(self, length, seed=0):
        self.length, self.seed = length, seed

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        rng = np.random.default_rng((self.seed, index))
        mask = np.zeros([(32, 32), (24, 32), (30, 21)][index % 3], np.int64)
        mask[4:14, 4:14], mask[16:20] = 1, 2
        image = np.array([100, 200, 20])[mask, None] + rng.integers(0, 50, (*mask.shape, 3))
        return {"image": image.astype(np.uint8), "mask": mask}


class Objects(Source):
    """With masks of one object, boolean."""

    def __getitem__(self, index):
        example = super().__getitem__(index)
        return {"image": example["image"], "mask": example["mask"] == 1}


class Unlabelled(Source):
    def __getitem__(self, index):
        return {"image": super().__getitem__(index)["image"]}


def entropy(logits, labels, valid):
    """One number."""
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return (loss * valid).sum() / valid.sum()


class Sharp:
    """A loss with a value, one of each image."""

    def __init__(self, gamma):
        self.gamma = gamma

    def __call__(self, logits, labels, valid):
        likely = jnp.take_along_axis(jax.nn.softmax(logits), labels[..., None], -1)[..., 0]
        return ((1 - likely) ** self.gamma).mean((1, 2), where=valid)


def own_task(backbone=None, head=None, weights=None):
    weights = {"entropy": entropy, "sharp": (Sharp(2.0), 0.5)} if weights is None else weights
    net = jaxseg.Segmenter(backbone or Backbone(), head or Head())
    return jaxseg.tasks.Multiclass(net, list(NAMES), losses=weights)


TRAIN, VAL = Source(6), Source(4, seed=1)
OFTEN = jaxseg.Intervals(log_every=1, eval_every=3, checkpoint_every=2)


def fit_own(workdir, task=None, data=TRAIN, **changes):
    options = dict(steps=6, batch=4, validation=VAL, intervals=OFTEN, average=0.9)
    return jaxseg.fit(task or own_task(), data, workdir=workdir, **(options | changes))


def fit_briefly(task, workdir, data=TRAIN, **options):
    options = dict(steps=2, batch=2, scoring=task.scoring(report=False)) | options
    return jaxseg.fit(task, data, workdir=workdir, **options)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run of parts of one's own, which tests only read."""
    return fit_own(str(tmp_path_factory.mktemp("own") / "w"))


def assert_same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


# A run of parts of one's own.


def test_a_run_leaves_what_the_program_leaves(trained):
    assert {p.name for p in trained.workdir.iterdir()} - {".lock"} == {
        *("objects.json", "model.json", "metrics.jsonl", "eval.json"),
        *("checkpoints", "tensorboard", "report"),
    }
    assert (trained.workdir / "report" / "index.html").exists()
    stored = json.loads((trained.workdir / "eval.json").read_text())
    assert stored == trained.evaluate() and stored["split"] == "val" and trained.step == 6
    rows = map(json.loads, (trained.workdir / "metrics.jsonl").read_text().splitlines())
    assert [row["step"] for row in rows if "val_miou" in row] == [3, 6]
    assert trained.config["run"]["steps"] == 6 and trained.config["task"]["class"] == "Multiclass"


def test_a_stopped_run_ends_with_the_same_bits(trained, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.StopSignal, "raised", lambda self, step: step == 4)
        with pytest.raises(loop.Interrupted, match="step 4"):
            fit_own(tmp_path)
    assert not (tmp_path / "eval.json").exists()
    resumed = fit_own(tmp_path)
    assert_same(resumed.state, trained.state)
    assert losses(tmp_path) == losses(trained.workdir) and len(losses(tmp_path)) == 6
    assert resumed.evaluate() == trained.evaluate()


def test_it_is_loaded_with_the_same_objects(trained):
    # As in another process, where initial values may have been drawn otherwise.
    loaded = jaxseg.load(str(trained.workdir), task=own_task(), data=TRAIN, validation=VAL)
    assert_same(loaded.params, trained.params)
    image = VAL[0]["image"]
    np.testing.assert_array_equal(loaded.predict(image), trained.predict(image))
    assert loaded.evaluate("val") == trained.evaluate("val")
    assert loaded.evaluate("train")["images"] == 6
    assert jaxseg.load(trained.workdir, task=own_task(), checkpoint="best").step in (3, 6)


def test_predictions(trained):
    for index in range(3):
        image = VAL[index]["image"]
        mask, chances = trained.predict(image), trained.probabilities(image)
        assert mask.dtype == np.uint8 and mask.shape == image.shape[:2] and mask.max() < 3
        assert chances.dtype == np.float32 and chances.shape == (*image.shape[:2], 3)
        np.testing.assert_allclose(chances.sum(-1), 1, atol=1e-3)
        np.testing.assert_array_equal(chances.argmax(-1), mask)
    images = np.stack([VAL[0]["image"]] * 2)
    scores = jax.jit(trained.scores)(trained.variables, images)
    np.testing.assert_array_equal(scores[0].argmax(-1), trained.predict(images[0]))
    for wrong in (images, images[0] / 255.0, images[0, ..., 0], None):
        with pytest.raises(OptionError, match="image is .* allowed: uint8 H x W x 3"):
            trained.predict(wrong)


def test_predictions_of_any_size_in_few_shapes_from_eight_threads(trained):
    loaded = jaxseg.load(trained.workdir, task=own_task())
    sizes = [(1, 1), (5, 90), (90, 5), (20, 30), (33, 32), (64, 40), (300, 100), (47, 50)]
    images = [np.random.default_rng(0).integers(0, 256, (*s, 3), np.uint8) for s in sizes]
    found = {}

    def work(number):
        found[number] = [loaded.predict(images[(number + i) % 8]) for i in range(8)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(8):
        for i in range(8):
            np.testing.assert_array_equal(found[number][i], found[(number + i) % 8][0])
    assert [mask.shape for mask in found[0]] == sizes
    assert len(loaded._predictor._compiled) <= 12


def _settings():
    loggers = {
        name: (one.level, one.disabled, list(one.handlers), list(one.filters))
        for name, one in logging.root.manager.loggerDict.items()
        if isinstance(one, logging.Logger)
    }
    root = logging.root
    loggers[""] = (root.level, root.disabled, list(root.handlers), list(root.filters))
    signals = {number: signal.getsignal(number) for number in signal.valid_signals()}
    return dict(jax.config.values), loggers, signals, logging.root.manager.disable


def test_a_call_leaves_config_logging_and_signals_as_they_were(trained, tmp_path):
    shutil.copytree(trained.workdir, tmp_path / "w")
    before = _settings()
    again = fit_own(tmp_path / "w")
    again.predict(VAL[0]["image"])
    jaxseg.load(tmp_path / "w", task=own_task(), data=VAL).evaluate("train")
    after = _settings()
    assert after[0] == before[0] and after[2:] == before[2:]
    assert {k: v for k, v in after[1].items() if k in before[1]} == before[1]


@pytest.mark.slow
def test_an_import_leaves_logging_as_it_was():
    code = """if True:
        import logging, os, signal
        before = dict(os.environ), logging.root.level, logging.getLoggerClass()
        import jax
        import jaxseg.run, jaxseg.train.checkpoint
        assert (dict(os.environ), logging.root.level, logging.getLoggerClass()) == before
        assert not logging.root.handlers and not logging.getLogger("absl").filters
        assert not jax._src.xla_bridge.backends_are_initialized()
    """
    path = str(Path(jaxseg.__file__).parents[1])
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": path})


def test_evaluate_writes_only_when_it_is_asked_to(trained, tmp_path):
    shutil.copytree(trained.workdir, tmp_path / "w")
    loaded = jaxseg.load(tmp_path / "w", task=own_task(), data={"train": TRAIN, "late": VAL})
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "w").rglob("*")}
    result = loaded.evaluate("late")
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "w").rglob("*")} == before
    assert loaded.evaluate("late", write=True) == result
    assert json.loads((tmp_path / "w" / "eval.json").read_text()) == result
    with pytest.raises(DataError, match="no split 'test'; those there are: train, late"):
        loaded.evaluate("test")


def test_a_finished_run_is_fitted_again_and_grows(trained, tmp_path):
    shutil.copytree(trained.workdir, tmp_path / "w")
    again = fit_own(tmp_path / "w")
    assert_same(again.state, trained.state)
    longer = fit_own(tmp_path / "w", steps=8)
    assert longer.step == 8 and len(losses(tmp_path / "w")) == 8
    assert losses(tmp_path / "w")[:6] == losses(trained.workdir)
    stored = json.loads((tmp_path / "w" / "objects.json").read_text())
    assert stored["run"]["steps"] == 8 and stored["history"] == [{"steps": 6}]
    with pytest.raises(ConfigError, match="run.steps: 8 there, 6 now"):
        fit_own(tmp_path / "w")


# Other objects.


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        (dict(task=own_task(head=Head(outputs=3, name=None), weights="dice")), "task.losses"),
        (dict(task=own_task(Backbone(width=9))), "backbone.width: 8 there, 9 now"),
        (dict(task=own_task(head=HeadWithoutTrain())), "head.class: 'Head' there"),
        (
            dict(task=own_task(weights={"entropy": entropy, "sharp": (Sharp(3.0), 0.5)})),
            "Sharp.of.gamma: 2.0 there, 3.0 now",
        ),
        (dict(seed=1), "run.seed: 0 there, 1 now"),
        (dict(batch=2), "run.batch: 4 there, 2 now"),
        (dict(steps=5), "run.steps: 6 there, 5 now"),
        (dict(optimizer=optax.sgd(0.1)), "run.optimizer.class: 'Recipe' there"),
        (dict(optimizer=jaxseg.Recipe(lr=0.1)), "run.optimizer.lr: 0.001 there, 0.1 now"),
        (dict(augmentation=jaxseg.Augmentation(flip=0.5)), "run.augmentation"),
        (dict(data=Source(7)), "examples: 6 there, 7 now"),
        (dict(reading=jaxseg.Reading(size=(64, 64))), "run.reading.size"),
    ],
)
def test_other_objects_are_refused_by_name(trained, changes, difference):
    before = (trained.workdir / "objects.json").read_bytes()
    with pytest.raises(ConfigError, match=f"holds a run .*\n(.*\n)*.*{re.escape(difference)}"):
        fit_own(trained.workdir, **changes)
    assert (trained.workdir / "objects.json").read_bytes() == before


def test_optimizers_are_told_apart_by_what_they_close_over():
    def described(make):
        return objects.describe(make)

    assert described(optax.adam(1e-3)) == described(optax.adam(1e-3))
    assert described(optax.adam(1e-3)) != described(optax.adam(1e-2))
    schedules = [optax.linear_schedule(rate, 0.0, 5) for rate in (0.1, 0.1, 0.2)]
    first, same, other = (described(optax.adamw(schedule)) for schedule in schedules)
    assert first == same != other
    assert json.loads(json.dumps(first)) == first
    assert described(Sharp(1.0)) == {"class": "Sharp", "gamma": 1.0}
    weights = {"a": {"kernel": np.ones(3)}}
    assert described(weights) == described({"a": {"kernel": np.ones(3)}})
    assert described(weights) != described({"a": {"kernel": np.zeros(3)}})


def test_what_may_be_otherwise_when_a_run_goes_on(trained, tmp_path):
    shutil.copytree(trained.workdir, tmp_path / "w")
    scoring = own_task().scoring(split="val", batch=3, report=False)
    changes = dict(intervals=jaxseg.Intervals(), scoring=scoring, sharding="fsdp")
    changes |= dict(reading=jaxseg.Reading(threads=1, memory_gigabytes=0.0))
    again = fit_own(tmp_path / "w", **changes)
    assert_same(again.params, trained.params)
    assert again.evaluate()["miou"] == pytest.approx(trained.evaluate()["miou"], abs=1e-6)
    # How it is scored is kept, for those who load it.
    assert jaxseg.load(tmp_path / "w", task=own_task()).scoring == scoring


def test_a_run_of_objects_is_loaded_with_them(trained, tmp_path):
    with pytest.raises(ConfigError, match="Multiclass that was begun from objects: load it with"):
        jaxseg.load(trained.workdir)
    with pytest.raises(ConfigError, match="only jaxseg.load.* can restore it"):
        run.restore(trained.workdir, {})
    with pytest.raises(ConfigError, match="begun from objects; give another --workdir"):
        run.train(tiny_config(), trained.workdir)
    with pytest.raises(ConfigError, match=r"head.outputs: 3 there, 4 now"):
        jaxseg.load(trained.workdir, task=own_task(head=Head(outputs=4)))
    with pytest.raises(OptionError, match="data is None"):
        jaxseg.load(trained.workdir, task=own_task()).evaluate()
    with pytest.raises(OptionError, match="checkpoint is 'first'; allowed: latest, best"):
        jaxseg.load(trained.workdir, task=own_task(), checkpoint="first")
    with pytest.raises(ConfigError, match="holds no run"):
        jaxseg.load(tmp_path)
    with pytest.raises(ValueError, match="none of ours: take it from the run"):
        jaxseg.backbone(trained.workdir)


# What is taken for a head, a backbone, a network.


def bound_loss(task, data=TRAIN):
    """Shapes of a training step's loss, without compiling it."""
    bound = task.bind(data, steps=2, batch=2)
    params = jax.eval_shape(bound.init, jax.random.key(0))
    size = bound.facts.size
    batch = {
        "image": np.zeros((2, *size, 3), np.uint8),
        "mask": np.zeros((2, *size), np.uint8),
        "extent": np.array([size, size], np.int32),
        "row": np.arange(2),
        "valid": np.ones(2, bool),
    }
    extra = jax.eval_shape(bound.init_extra, params)
    key, step = jax.random.key(0), jnp.zeros((), jnp.int32)
    loss, changed = jax.eval_shape(lambda p, e: bound.loss(p, e, batch, key, step), params, extra)
    assert loss.shape == ()
    return bound, changed


HEADS = (Head(), HeadWithoutTrain(), HeadWithDefault(), HeadWithKeywords())


@pytest.mark.parametrize(
    ("backbone", "head"),
    [
        *((Backbone(), head) for head in HEADS),
        *((Stages(), head) for head in (*HEADS, HeadOfSeveralMaps())),
    ],
)
def test_heads_on_backbones(backbone, head):
    net = jaxseg.Segmenter(backbone, head=head)
    assert net.multiple == (4 if isinstance(backbone, Backbone) else 8)
    bound, changed = bound_loss(own_task(backbone, head))
    learns = isinstance(backbone, Backbone) or isinstance(head, HeadWithDefault)
    assert bound.learns_batch_norm() == learns == bool(jax.tree.leaves(changed))


def test_variables_of_a_backbone_and_what_rests(tmp_path):
    variables = Backbone().init(jax.random.key(5), jnp.zeros((1, 16, 16, 3)), train=False)
    image = np.stack([VAL[0]["image"]] * 2)
    expected = Backbone().apply(variables, image / 255.0, train=False)
    made = jaxseg.backbone(Backbone(), variables, normalization="none", train=True)
    for images in (image, image / 255.0, (image / 255.0).astype(np.float32)):
        np.testing.assert_allclose(made(images)["cls"], expected["cls"], atol=1e-5)
    assert made.trained and not jaxseg.backbone(Backbone(), variables).trained
    assert jaxseg.backbone(Backbone()).trained
    assert not jaxseg.Segmenter(made, Head(), train="none").backbone.trained
    for both in ((Backbone(), variables), Backbone().bind(variables)):
        np.testing.assert_array_equal(
            jaxseg.backbone(both, normalization="none")(image)["cls"], made(image)["cls"]
        )
    # Without statistics they are those of the first step.
    only = {"params": variables["params"]}
    np.testing.assert_allclose(
        jaxseg.backbone(Backbone(), only)(image)["cls"],
        jaxseg.backbone(Backbone(), variables)(image)["cls"],
    )
    rests = own_task(jaxseg.backbone(Backbone(), variables), HeadWithoutTrain())
    trained = fit_briefly(rests, tmp_path / "a")
    assert_same(trained.params["backbone"], variables["params"])
    assert_same(trained.backbone().params, variables["params"])
    moved = fit_briefly(own_task(made), tmp_path / "b")
    kernels = (r.params["backbone"]["Conv_0"]["kernel"] for r in (trained, moved))
    assert not np.array_equal(*kernels)
    means = (moved.backbone().statistics["BatchNorm_0"]["mean"], np.zeros(8))
    assert not np.array_equal(*means)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: jaxseg.backbone(Backbone), "source is a .*; allowed: a name"),
        (
            lambda: jaxseg.backbone(Backbone(), {"Conv_0": {}}),
            r"variables are \['Conv_0'\]; allowed",
        ),
        (lambda: jaxseg.backbone("shapes_micro8", {"params": {}}), "variables are given"),
        (lambda: jaxseg.backbone(variant="vgg"), "variant is 'vgg'; allowed: "),
        (
            lambda: jaxseg.backbone(variant="vit_micro8", frozen=True),
            "frozen is no option; allowed: ",
        ),
        (lambda: jaxseg.backbone(Backbone(), train="some"), "train is 'some'; allowed: auto, none"),
        (lambda: jaxseg.backbone(Backbone(), freeze=2), "freeze is 2; Backbone allows 0 to 0"),
        (lambda: jaxseg.backbone(Backbone(), normalization="x"), "normalization is 'x'; allowed: "),
        (lambda: jaxseg.backbone(Backbone())(VAL[0]["image"][None]), "params is None"),
        (
            lambda: jaxseg.backbone("shapes_micro8")(VAL[0]["image"]),
            "images are uint8 .*B x H x W x 3",
        ),
        (lambda: jaxseg.Segmenter(Backbone(), Head), "head is the class Head; allowed: a Flax"),
        (
            lambda: jaxseg.Segmenter(Backbone(), nn.Dense(3)),
            "head is Dense.*called with .features, im",
        ),
        (lambda: jaxseg.Segmenter(Head(), Head()), "missing|backbone Head"),
        (
            lambda: jaxseg.Segmenter(Backbone(), Head(), stride=8),
            "stride is 8; the backbone .* has 4",
        ),
        (lambda: jaxseg.Segmenter(Backbone(), Head(), layers=(1,)), "layers is .1,.; the backbone"),
        (
            lambda: jaxseg.tasks.Multiclass(Net, NAMES),
            "network is a type; allowed: jaxseg.Segmenter",
        ),
        (lambda: jaxseg.tasks.Multiclass(Net(), 3), "names is 3; allowed: the names"),
        (
            lambda: jaxseg.tasks.Multiclass(Net(), NAMES, "ce"),
            "losses has 'ce'; allowed: cross_entr",
        ),
        (
            lambda: jaxseg.tasks.Multiclass(Net(), NAMES, {"dice": -1}),
            "losses gives dice the weight -1",
        ),
        (
            lambda: bound_loss(own_task(weights=lambda a, b, c: a)),
            "losses has <lambda>, which gives",
        ),
        (
            lambda: bound_loss(own_task(weights=lambda a, b: a)),
            "losses has <lambda>.a, b.; allowed",
        ),
        (
            lambda: bound_loss(own_task(head=Head(outputs=4))),
            r"logits \(1, 32, 32, 4\) .*allowed for",
        ),
        (
            lambda: bound_loss(own_task(head=jaxseg.heads.ClassAttention())),
            "needs query_B, which Multi",
        ),
        (lambda: bound_loss(jaxseg.tasks.Query(Net(), NAMES)), "no head that takes query_B"),
        (lambda: jaxseg.tasks.Dino(jaxseg.backbone(variant="vit_micro8", freeze=1)), "freeze is 1"),
        (
            lambda: jaxseg.tasks.Dino(jaxseg.backbone(variant="vit_micro8"), outputs=1),
            "outputs is 1",
        ),
    ],
)
def test_one_error_names_the_field(make, message):
    with pytest.raises((OptionError, TypeError), match=message):
        make()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(steps=0), "steps is 0; allowed: whole numbers from 1"),
        (dict(batch=2.5), "batch is 2.5; allowed"),
        (dict(seed=-1), "seed is -1; allowed"),
        (dict(accumulate=3), "accumulate is 3; allowed on 1 devices: divisors of 4"),
        (dict(optimizer="adam"), "optimizer is a str; allowed: an optax optimizer"),
        (dict(optimizer=lambda steps, layers: steps), "optimizer is a int; allowed"),
        (dict(optimizer=jaxseg.Recipe(name="lion")), "optimizer.name is 'lion'; allowed: adam, "),
        (dict(intervals=jaxseg.Intervals(log_every=0)), "intervals.log_every is 0; allowed: 1 to"),
        (dict(reading=5), "reading is a int; allowed: Reading"),
        (
            dict(scoring=jaxseg.tasks.Dino.scoring()),
            "scoring is a FeatureScoring; allowed: ClassSc",
        ),
        (dict(data="camvid"), "the data are str 'camvid': allowed are a source"),
        (dict(data={"val": VAL}), "no split 'train'; those there are: val"),
        (dict(data=[]), "the data have no examples"),
        (dict(data=Unlabelled(4)), "example 0 has no mask, which Multiclass"),
        (dict(data=Source(4), validation=Unlabelled(4)), "example 0 has no mask"),
    ],
)
def test_fit_says_what_does_not_fit_before_it_writes(tmp_path, options, message):
    with pytest.raises((OptionError, DataError), match=message):
        fit_own(tmp_path / "w", **options)
    assert not (tmp_path / "w").exists()


def _with(change):
    """Examples that `change(image, mask, index)` makes of those of `Source`."""

    class Changed(Source):
        def __getitem__(self, index):
            example = super().__getitem__(index)
            return change(example["image"], example["mask"], index)

    return Changed(4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda image, mask, i: {"image": np.random.default_rng().permuted(image), "mask": mask},
            "example 0 was read twice and differs in image: a source must be a function of its index",
        ),
        (lambda image, mask, i: (image, mask), "example 0 is tuple: allowed is a dict with image"),
        (
            lambda image, mask, i: {"image": image / 255, "mask": mask},
            "image is float64 .*allowed is",
        ),
        (lambda image, mask, i: {"image": image, "mask": mask / 2}, "mask is float64 of shape"),
        (lambda image, mask, i: {"image": image, "mask": mask[:5]}, "mask is int64 of shape"),
        (lambda image, mask, i: {"image": image, "mask": mask + 1}, r"masks hold \[3\]; allowed"),
        (
            lambda image, mask, i: {"image": image, "mask": mask, "category": i},
            "example 1 has the category 1; the categories are object",
        ),
    ],
)
def test_a_source_that_is_none(tmp_path, change, message):
    with pytest.raises(DataError, match=message):
        fit_own(tmp_path / "w", data=_with(change))
    assert not (tmp_path / "w").exists()


def test_names_of_the_data_and_of_the_task(caplog):
    data = Source(2)
    data.names = ["ground", "square", "circle"]
    with pytest.raises(OptionError, match="names is ground, square, bar; the data have .*circle"):
        own_task().bind(data, steps=1, batch=1)
    data.names = list(NAMES)
    assert own_task().bind(data, steps=1, batch=1).facts.names == NAMES
    data = Objects(2)
    data.names = ("other", "square")
    binary = jaxseg.tasks.Binary(Net(outputs=1))
    assert binary.bind(data, steps=1, batch=1).names == ("other", "square")
    # 255 is what others write for an object.
    binary.check_data(_with(lambda image, mask, i: {"image": image, "mask": (mask > 0) * 255}))
    assert "255 says that nobody knows" in caplog.text


# Tasks.


def test_data_and_optimizers_as_they_come(tmp_path):
    task = jaxseg.tasks.Multiclass(Net(), NAMES, losses=[Sharp(1.0), "dice"])
    examples = [TRAIN[i] for i in range(3)]  # a list is a source
    splits = {"train": examples, "test": VAL}
    made = []

    def recipe(steps, layers):
        made.append((steps, layers))
        return optax.adamw(optax.linear_schedule(1e-3, 0.0, steps))

    trained = fit_briefly(task, tmp_path / "a", splits, optimizer=recipe, scoring=None)
    assert trained.evaluate()["split"] == "test" and set(made) == {(2, ())}
    chain = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1, momentum=0.9))
    limited = jaxseg.Reading(size=(16, 24), limit=2)
    other = fit_briefly(task, tmp_path / "b", splits, optimizer=chain, reading=limited)
    assert other.task.size == (16, 24) and other.evaluate("test")["images"] == 2
    assert other.predict(TRAIN[0]["image"]).shape == (32, 32)
    again = jaxseg.load(tmp_path / "b", task=task, data=splits)
    assert again.evaluate("test") == other.evaluate("test")
    # Without anything to be scored on there are curves.
    alone = fit_briefly(task, tmp_path / "c", examples, accumulate=2, scoring=None)
    assert not (alone.workdir / "eval.json").exists()
    assert (alone.workdir / "report" / "curves.png").exists()


def test_one_object(tmp_path):
    def missed(logits, labels, valid):
        return ((jax.nn.sigmoid(logits) - labels) ** 2).mean((1, 2), where=valid)

    net = jaxseg.networks.UNet(outputs=1, width=4, depth=2)
    task = jaxseg.tasks.Binary(net, losses={"bce": 1, "missed": missed}, threshold=0.4)
    trained = fit_briefly(task, tmp_path, Objects(4), validation=Objects(2, seed=1))
    assert 0 <= trained.evaluate("val")["iou"] <= 1
    image = VAL[1]["image"]
    mask, chances = trained.predict(image), trained.probabilities(image)
    assert set(np.unique(mask)) <= {0, 1} and chances.shape == (*image.shape[:2], 2)
    np.testing.assert_array_equal(mask, chances[..., 1] >= 0.4)
    # The threshold is free.
    strict = jaxseg.tasks.Binary(net, losses={"bce": 1, "missed": missed}, threshold=1.0)
    assert not jaxseg.load(tmp_path, task=strict).predict(image).any()
    with pytest.raises(OptionError, match="UNet has no backbone"):
        trained.backbone()


def test_a_whole_network_of_several_classes(tmp_path):
    net = jaxseg.networks.UNet(outputs=3, width=4, depth=2, dropout=0.2)
    trained = fit_briefly(
        jaxseg.tasks.Multiclass(net, NAMES, class_weights="inverse_log"), tmp_path
    )
    assert trained.predict(TRAIN[0]["image"]).shape == (32, 32)
    assert len(trained.task.facts.class_weights) == 3


@pytest.mark.slow
def test_a_class_that_is_asked_for(tmp_path):
    head = jaxseg.heads.ClassAttention(classes=3, width=8, channels=8, low_channels=8)
    task = jaxseg.tasks.Query(jaxseg.Segmenter(Backbone(), head), NAMES, losses=entropy)
    trained = fit_briefly(task, tmp_path)
    result = trained.evaluate("train")
    assert result["queries"]["pairs"] and np.isfinite(result["loss"])
    assert trained.probabilities(VAL[1]["image"]).shape == (24, 32, 3)
    few = jaxseg.Segmenter(Backbone(), jaxseg.heads.ClassAttention(classes=2))
    with pytest.raises(OptionError, match="classes of the head is 2; allowed for .*: 3"):
        bound_loss(jaxseg.tasks.Query(few, NAMES))


VIEWS = dict(global_size=32, local_size=16, local_count=1)
DINO = dict(views=DinoViews(**VIEWS), outputs=16, hidden=8, bottleneck=4)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(
            lambda backbone: jaxseg.tasks.Dino(backbone, **DINO), marks=pytest.mark.slow, id="dino"
        ),
        pytest.param(
            lambda backbone: jaxseg.tasks.Rotation(backbone, views=RotationViews(size=16)),
            id="rotation",
        ),
    ],
)
def test_learning_without_labels_with_a_backbone_of_ones_own(tmp_path, make):
    options = dict(data=Unlabelled(4), validation=Unlabelled(3, seed=1), batch=4)
    trained = fit_briefly(make(Backbone()), tmp_path, **options)
    result = trained.evaluate("val")
    assert result["images"] == 3 and np.isfinite(result["loss"]) and "knn" not in result
    with pytest.raises(OptionError, match="predicts no masks"):
        trained.predict(VAL[0]["image"])
    learnt = trained.backbone()
    out = learnt(np.zeros((2, 16, 16, 3), np.uint8))
    assert out["cls"].shape == (2, 8) and not learnt.trained
    loaded = jaxseg.load(tmp_path, task=make(Backbone()), data=Unlabelled(4))
    assert_same(loaded.backbone().params, learnt.params)
    bound_loss(own_task(learnt, HeadWithoutTrain()))


def test_a_teacher_is_the_average(tmp_path):
    task = jaxseg.tasks.Dino(Backbone(), **DINO)
    with pytest.raises(OptionError, match="average is 0.9; allowed: 0 .its teacher is"):
        fit_briefly(task, tmp_path / "w", Unlabelled(4), average=0.9)
    assert not (tmp_path / "w").exists()


@pytest.mark.slow
def test_a_backbone_of_ours_is_read_from_the_folder(tmp_path):
    start = jaxseg.backbone(variant="vit_micro8", normalization="none")
    trained = fit_briefly(
        jaxseg.tasks.Rotation(start, views=RotationViews(size=16)), tmp_path, Unlabelled(4)
    )
    read = jaxseg.backbone(tmp_path)
    assert read.normalization == "none" and not read.trained
    assert_same(read.params, trained.backbone().params)
    with pytest.raises(OptionError, match="normalization is 'imagenet'; the run in"):
        jaxseg.backbone(tmp_path, normalization="imagenet")


# Runs of the program.


def test_a_run_of_the_program_is_loaded_without_anything(tmp_path):
    config = tiny_config(train__steps=2, head__name="bilinear")
    result = run.train(config, tmp_path / "w")
    loaded = jaxseg.load(str(tmp_path / "w"))
    assert loaded.config.head.name == "bilinear" and loaded.evaluate() == result
    image = Objects(1)[0]["image"]
    Image.fromarray(image).save(tmp_path / "a.png")
    (written,) = predict(tmp_path / "w", str(tmp_path / "a.png"), tmp_path / "out", {})
    np.testing.assert_array_equal(loaded.predict(image), np.asarray(Image.open(written)) // 255)
    assert loaded.evaluate("val", write=False)["split"] == "val"
    assert jaxseg.load(tmp_path / "w", data={"test": Objects(3)}).evaluate()["images"] == 3
    with pytest.raises(ConfigError, match="task is given, but the run in .* has its own"):
        jaxseg.load(tmp_path / "w", task=own_task())
    with pytest.raises(ConfigError, match="begun from a config; give another workdir"):
        fit_own(tmp_path / "w")


@pytest.mark.slow
@pytest.mark.parametrize("task", ["binary", "multiclass"])
def test_a_whole_network_in_a_config(tmp_path, task):
    config = jaxseg.schema.base_config(task)
    config.update_from_flattened_dict(
        {
            "network.name": "unet",
            "network.unet.width": 4,
            "network.unet.depth": 2,
            "data.size": (32, 32),
            "data.limit": 4,
            "train.steps": 2,
            "train.batch": 2,
            "eval.batch": 2,
            "eval.report": False,
        }
    )
    result = run.train(config, tmp_path)
    assert np.isfinite(result["loss"])
    loaded = jaxseg.load(tmp_path)
    assert "contracting" in loaded.params and loaded.predict(TRAIN[0]["image"]).shape == (32, 32)


# The page.

# What the page says -> what makes it quick.
QUICK = {
    "jaxseg.data.Scenes()": "jaxseg.data.Scenes(size=(32, 32), length=6)",
    "outputs=len(data.names))": "outputs=len(data.names), channels=8, reduce=8, low_width=8)",
    "steps=2000": "steps=2, batch=2, reading=LIMITED",
    "steps=500, ": "steps=2, batch=2, reading=LIMITED, ",
    "steps=500,\n": "steps=2,\n",
    "batch=16": "batch=2",
    "outputs=1024": "outputs=16, hidden=8, bottleneck=4",
    "global_size=64": "global_size=32",
    "local_size=32": "local_size=16, local_count=1",
    "size=(128, 128), limit=500": "size=(32, 32), limit=4",
}


@pytest.mark.slow
def test_the_page_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "api.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    code = "\n".join(blocks)
    for said, quick in QUICK.items():
        assert said in code
        code = code.replace(said, quick)
    namespace = {"__file__": "api.py", "LIMITED": jaxseg.Reading(limit=4)}
    exec(compile(code, "docs/api.md", "exec"), namespace)
    assert namespace["mask"].shape == (32, 32) and Path("S/eval.json").exists()
    assert namespace["scores"].shape == (1, 32, 32, len(namespace["data"].names))


def test_every_public_name_is_there():
    for name in jaxseg.__all__:
        assert getattr(jaxseg, name) is not None and name in dir(jaxseg)
    for name in (
        "jaxseg.losses.dice",
        "jaxseg.losses.binary.dice",
        "jaxseg.metrics.multiclass.summarize",
    ):
        assert callable(_named(name))
    for name in ("jaxseg.ops.pac.pac_conv", "jaxseg.heads.DeepLabV3Plus", "jaxseg.networks.UNet"):
        assert callable(_named(name))
    for module in (jaxseg, jaxseg.losses, jaxseg.metrics, jaxseg.ops, jaxseg.data, jaxseg.tasks):
        with pytest.raises(AttributeError, match="no attribute 'nothing'"):
            _ = module.nothing


def _named(path):
    value = jaxseg
    for name in path.split(".")[1:]:
        value = getattr(value, name)
    return value


def test_a_loss_of_two_kinds_goes_by_the_shape():
    labels, valid = np.array([[[0, 1]]]), np.ones((1, 1, 2), bool)
    one, several = np.ones((1, 1, 2), np.float32), np.ones((1, 1, 2, 3), np.float32)
    both = jaxseg.losses
    np.testing.assert_array_equal(
        both.dice(one, labels, valid), both.binary.dice(one, labels, valid)
    )
    np.testing.assert_array_equal(
        both.dice(several, labels, valid), both.multiclass.dice(several, labels, valid)
    )
