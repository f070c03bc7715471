"""The schema: every shipped config is valid, overrides have their types, mistakes name what is allowed."""

import pytest

from jaxseg import assembly, schema
from jaxseg.data.formats import FORMATS
from jaxseg.schema import ConfigError
from jaxseg.tasks import TASKS

SHIPPED = [
    (name, preset)
    for name, (_, presets) in schema.config_summaries().items()
    for preset in ("", *presets)
]


@pytest.mark.parametrize("name, preset", SHIPPED, ids=":".join)
def test_every_experiment_and_preset_is_valid(name, preset):
    config = schema.read_config(f"{name}:{preset}")
    data = FORMATS[config.data.name]
    if not data.drawn and not data.section:
        config.data.root = "somewhere"
    schema.validate(config)
    assert set(schema.flatten(config)) == set(schema.table(config.task))


@pytest.mark.parametrize("name", list(schema.config_files()))
def test_unknown_presets_are_named(name):
    with pytest.raises(ValueError, match="no preset 'fast'; allowed after the colon: .*runlocal"):
        schema.read_config(f"{name}:fast")


def test_the_shipped_configs_are_found_by_name_and_as_in_the_checkout():
    assert {"pac_objseg", "deeplab_multiclass", "attention_singleclass", "dino", "rotation"} <= set(
        schema.config_files()
    )
    by_name = schema.read_config("pac_objseg:course").to_dict()
    assert schema.read_config("configs/pac_objseg.py:course").to_dict() == by_name
    with pytest.raises(
        ConfigError, match="no file 'configs/no.py'; the configs by name are: .*dino"
    ):
        schema.read_config("configs/no.py:fast")


def test_an_existing_file_goes_before_a_shipped_name(tmp_path, monkeypatch):
    (tmp_path / "dino").write_text(
        "from jaxseg.schema import base_config\n"
        "def get_config(arg):\n"
        "    config = base_config('binary')\n"
        "    config.seed = len(arg or '')\n"
        "    return config\n"
    )
    (tmp_path / "empty.py").write_text("")
    assert schema.read_config("dino").task == "dino"
    monkeypatch.chdir(tmp_path)
    config = schema.read_config("dino:abc")
    assert config.task == "binary" and config.seed == 3
    with pytest.raises(ConfigError, match="empty.py has no function get_config"):
        schema.read_config("empty.py")


@pytest.mark.parametrize("task", TASKS)
def test_every_default_is_allowed(task):
    config = schema.base_config(task)
    schema.validate(config)
    assert all(one.fits(one.before) for one in schema.table(task).values())


@pytest.mark.parametrize(
    "key, text, message",
    [
        ("nope", "1", "unknown key 'config.nope'; allowed in config: .*backbone.*train"),
        ("data.rooot", "a", "unknown key 'config.data.rooot'; allowed in config.data: .*root"),
        ("data", "a", "config.data is a section; allowed in it: .*root"),
        ("seed.x", "1", "unknown key 'config.seed.x'; allowed in config.seed: nothing"),
        ("seed", "a", "config.seed='a' is no int"),
        ("seed", "1.5", "config.seed='1.5' is no int"),
        ("seed", "True", "config.seed='True' is no int"),
        ("optim.lr", "fast", "config.optim.lr='fast' is no float"),
        ("optim.lr", "true", "config.optim.lr='true' is no float"),
        ("eval.report", "2", "config.eval.report='2' is no bool"),
    ],
)
def test_wrong_overrides_are_named(key, text, message):
    config = schema.base_config("binary")
    before = config.to_dict()
    with pytest.raises(ConfigError, match=message):
        schema.override(config, {"optim.warmup": "0.5", key: text})
    assert config.to_dict() == before


@pytest.mark.parametrize(
    "key, text, value",
    [
        ("seed", "3", 3),
        ("optim.lr", "1", 1.0),
        ("optim.lr", "1e-3", 1e-3),
        ("eval.report", "false", False),
        ("eval.report", "True", True),
        ("data.categories", "('a','b')", ("a", "b")),
        ("data.categories", "['a','b']", ("a", "b")),
        ("data.categories", "a,b", ("a", "b")),
        ("data.categories", "2016", (2016,)),
        ("data.categories", "()", ()),
        ("data.size", "(32, 48)", (32, 48)),
        ("data.size", "32,48", (32, 48)),
        ("backbone.layers", "-1", (-1,)),
        ("data.root", "1", "1"),
        ("data.root", "", ""),
        ("data.root", "a=b", "a=b"),
    ],
)
def test_right_overrides_have_the_type_of_the_default(key, text, value):
    config = schema.base_config("binary")
    assert schema.override(config, {key: text}) == {key: value}
    found = schema.flatten(config)[key]
    found = tuple(found) if isinstance(found, list) else found
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    "key, value, allowed",
    [
        ("data.name", "coco", "data.name is 'coco'; allowed: shapes, kinds, .*images, tfds"),
        ("views.blur", ("a", 0, 0), "views.blur is .*; allowed: 3 values, each 0 to 1"),
        ("data.size", (0, 32), "two sizes above 0"),
        ("data.size", (True, True), "2 values, each 0"),
        ("data.root", "x", "draws its own images; add .*images.* or tfds"),
    ],
)
def test_values_that_pretraining_cannot_take_are_named(key, value, allowed):
    config = schema.base_config("dino")
    config.update_from_flattened_dict({key: value})
    with pytest.raises(ConfigError, match=allowed):
        schema.validate(config)


@pytest.mark.parametrize(
    "key, value, allowed",
    [
        ("data.name", "imagenet", "shapes, kinds, binary_masks, .*tfds"),
        ("head.name", "best", "linear.*pac_course"),
        ("eval.split", "validation", "train, val, test"),
        ("backbone.variant", "vit", "dino_vits16"),
        ("backbone.normalization", "none at all", "imagenet, none"),
        ("optim.lr", float("nan"), "0 to"),
        ("train.batch", 0, "1 to"),
        ("augment.flip", 1.5, "0 to 1"),
        ("data.size", (480,), "2 values"),
        ("data.root", "x", "data.name=binary_masks.* or tfds"),
        ("data.name", "binary_masks", "data.name='binary_masks' needs --config.data.root"),
        ("loss.bce", 0.0, "bce, dice"),
        ("head.guided.dropout", 2.0, "0 to 0.99"),
        ("head.guided.width", 12, "multiples of 8"),
        ("data.mask_values", "soft", "auto, 0/255, 0/1"),
        ("threshold", 1.5, "threshold is 1.5; allowed: 0"),
        ("optim.average", 1.0, "average is 1.0; allowed: 0 to"),
        ("train.accumulate", 3, "divisors of config.train.batch=16"),
        ("train.epochs", 0.0, "steps and config.train.epochs are both 0"),
    ],
)
def test_values_outside_their_set_are_named(key, value, allowed):
    config = schema.base_config("binary")
    config.update_from_flattened_dict({key: value})
    with pytest.raises(ConfigError, match=allowed):
        schema.validate(config)


@pytest.mark.parametrize(
    "task, key, value, message",
    [
        ("binary", "augment.scale", (2.0, 1.0), "config.augment.scale is .*low <= high"),
        ("binary", "backbone.layers", (), r"config.backbone.layers is \(\); .*block numbers"),
        ("binary", "backbone.layers", ("a",), "config.backbone.layers is .*block numbers"),
        ("dino", "views.local_scale", (0.5, 0.2), "config.views.local_scale is .*low <= high <= 1"),
    ],
)
def test_values_that_an_object_refuses_are_named_by_their_key(task, key, value, message):
    config = schema.base_config(task)
    config.update_from_flattened_dict({key: value, "backbone.variant": "vit_micro8"})
    schema.validate(config)
    with pytest.raises(ConfigError, match=message):
        assembly.make_settings(config)
        assembly.make_task(config, TASKS[task].usual_names)


def test_a_config_without_a_task_or_a_key_is_named():
    flat = schema.flatten(schema.base_config("binary"))
    with pytest.raises(ConfigError, match="the config lacks a task"):
        schema.validate(schema.nested({**flat, "task": "colour"}))
    del flat["seed"], flat["optim.lr"]
    with pytest.raises(ConfigError, match="the config lacks optim.lr, seed: it is damaged"):
        schema.validate(schema.nested(flat))
