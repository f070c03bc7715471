"""Configs: every experiment is valid, and mistakes are named with what is allowed."""

import importlib
import json
from pathlib import Path

import pytest

from configs import dino
from configs.common import get_segmentation_config
from jaxseg import config as checks
from jaxseg import workdir as folder
from jaxseg.config import ConfigError
from jaxseg.backbones.vit import VARIANTS

EXPERIMENTS = [
    p.stem for p in (Path(__file__).parents[1] / "configs").glob("*.py") if p.stem != "common"
]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_and_preset_is_valid(name):
    module = importlib.import_module(f"configs.{name}")
    for arg in (None, *module.PRESETS):
        config = module.get_config(arg)
        if config.data.name in ("folder", "coco", "images"):
            config.data.root = "somewhere"
        checks.validate(config)
        assert set(checks.flatten(config)) == set(checks.flatten(module.get_config()))
    with pytest.raises(ValueError, match="allowed after the colon: .*runlocal"):
        module.get_config("no_such_preset")


@pytest.mark.parametrize(
    "argument, message",
    [
        ("--config.nope=1", "unknown key 'config.nope'; allowed in config: .*backbone.*train"),
        (
            "--config.data.rooot=a",
            "unknown key 'config.data.rooot'; allowed in config.data: .*root",
        ),
        ("--config.data=a", "config.data is a section"),
        ("--config.seed.x=1", "unknown key 'config.seed.x'"),
        ("--config.seed=a", "config.seed='a' is no int"),
        ("--config.seed=1.5", "config.seed='1.5' is no int"),
        ("--config.optim.lr=fast", "config.optim.lr='fast' is no float"),
        ("--config.eval.report=2", "config.eval.report='2' is no bool"),
    ],
)
def test_wrong_overrides_are_named(argument, message):
    with pytest.raises(ConfigError, match=message):
        checks.check_overrides([argument], get_segmentation_config())


def test_right_overrides_pass():
    good = ["--config.seed=3", "--config.optim.lr=1", "--config.eval.report=false", "--workdir=x"]
    checks.check_overrides([*good, "--config.data.categories=('a','b')"], get_segmentation_config())


def test_tuples_are_given_once():
    twice = ["--config.data.size=(64,64)", "--config.data.size=(32,32)"]
    with pytest.raises(ConfigError, match="config.data.size is given twice"):
        checks.check_overrides(twice, get_segmentation_config())
    checks.check_overrides(["--config.seed=1", "--config.seed=2"], get_segmentation_config())


@pytest.mark.parametrize(
    "key, value, allowed",
    [
        ("data.name", "coco", "images, which takes"),
        ("views.blur", ("a", 0, 0), "three probabilities"),
        ("data.size", (0, 32), "two sizes above 0"),
        ("data.size", (True, True), "two numbers"),
        ("data.name", "tfds", "data.tfds.name=NAME"),
    ],
)
def test_values_that_pretraining_cannot_take_are_named(key, value, allowed):
    config = dino.get_config()
    config.data.root = "x"
    config.update_from_flattened_dict({key: value})
    with pytest.raises(ConfigError, match=allowed):
        checks.validate(config)


@pytest.mark.parametrize(
    "key, value, allowed",
    [
        ("data.name", "imagenet", "shapes, kinds, folder, coco, images, tfds"),
        ("head.name", "best", "linear.*pac_course"),
        ("eval.split", "validation", "train, val, test"),
        ("backbone.variant", "vit", "dino_vits16"),
        ("optim.lr", float("nan"), "0 to"),
        ("train.batch", 0, "1 to"),
        ("augment.flip", 1.5, "0 to 1"),
        ("augment.scale", (2.0, 1.0), "low <= high"),
        ("data.size", (480,), "two numbers"),
        ("data.root", "x", "data.name=folder, coco or tfds"),
        ("loss.bce", 0.0, "bce, dice"),
        ("head.guided.dropout", 2.0, "0 to 0.99"),
        ("head.guided.width", 12, "multiples of 8"),
        ("backbone.layers", (), "block numbers"),
        ("backbone.layers", ("a",), "block numbers"),
        ("data.mask_values", "soft", "auto, 0/255, 0/1"),
    ],
)
def test_values_outside_their_set_are_named(key, value, allowed):
    config = get_segmentation_config()
    config.update_from_flattened_dict({key: value})
    with pytest.raises(ConfigError, match=allowed):
        checks.validate(config)


def _begin(workdir, config, **changes):
    values = dict(
        variant=VARIANTS["vit_micro16"], size=(16, 16), categories=("a",), frozen_sha256=""
    )
    folder.begin(workdir, config, folder.Description(**(values | changes)))


def test_a_workdir_of_another_config_is_refused(tmp_path):
    config = get_segmentation_config()
    _begin(tmp_path, config)
    _begin(tmp_path, config)
    config.eval.split = "val"
    _begin(tmp_path, config)
    assert json.loads((tmp_path / "config.json").read_text())["eval"]["split"] == "val"
    (tmp_path / "checkpoints" / "7").mkdir(parents=True)
    config.optim.lr = 0.5
    with pytest.raises(ConfigError, match="(?s)another config.*optim.lr: 0.001 there, 0.5 now"):
        _begin(tmp_path, config)
    with pytest.raises(ConfigError, match="(?s)another model or data.*categories"):
        _begin(tmp_path, get_segmentation_config(), categories=("b",))


def test_an_attempt_without_a_checkpoint_binds_nothing(tmp_path):
    config = get_segmentation_config()
    for name in ("frozen", "features"):
        (tmp_path / name).mkdir()
    _begin(tmp_path, config)
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "model.json"}
    _begin(tmp_path, config)
    (tmp_path / "frozen").mkdir()
    config.optim.lr = 0.5
    _begin(tmp_path, config, categories=("b",))
    assert json.loads((tmp_path / "config.json").read_text())["optim"]["lr"] == 0.5
    assert not (tmp_path / "frozen").exists()


def test_files_in_the_place_of_folders_are_named(tmp_path):
    config = get_segmentation_config()
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(ConfigError, match="checkpoints is a file, not a folder"):
        folder.check(tmp_path, config)
    with pytest.raises(ConfigError, match="checkpoints is a file, not a folder"):
        folder.check(tmp_path / "checkpoints", config)


def test_stored_config_comes_back(tmp_path):
    config = get_segmentation_config()
    config.backbone.layers = (2, -1)
    _begin(tmp_path, config)
    loaded, description = folder.load(tmp_path, {"data.limit": 3})
    assert loaded.backbone.layers == (2, -1) and loaded.data.limit == 3
    assert description.variant == VARIANTS["vit_micro16"] and description.size == (16, 16)
    with pytest.raises(ConfigError, match="head.name: 'guided' there, 'linear' now"):
        folder.load(tmp_path, {"head.name": "linear"})
    with pytest.raises(ConfigError, match="optim.name: 'adamw' there, 'sgd' now"):
        folder.load(tmp_path, {"optim.name": "sgd"})
    with pytest.raises(ConfigError, match="train.steps: 0 there, 9 now"):
        folder.load(tmp_path, {"train.steps": 9})
    with pytest.raises(ConfigError, match="holds no run"):
        folder.load(tmp_path / "other", {})
    (tmp_path / "model.json").write_text("{}")
    with pytest.raises(ConfigError, match="model.json is damaged"):
        folder.load(tmp_path, {})
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="the config lacks .*seed"):
        folder.load(tmp_path, {})


def test_a_workdir_is_held_by_one_training(tmp_path):
    with folder.lock(tmp_path), pytest.raises(ConfigError, match="in use by another"):
        with folder.lock(tmp_path):
            pass
    with folder.lock(tmp_path):
        pass


def test_unwritable_workdir(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write to --workdir"):
        _begin(tmp_path / "file" / "w", get_segmentation_config())
