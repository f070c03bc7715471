"""Old names of keys and values: in stored runs, in configs, and on the command line.

`old_runs/` holds `config.json` and `model.json` of four runs of version 0.1, made by its own commands.
"""

import json
import shutil
from pathlib import Path

import pytest

from jaxseg import cli, renames, schema, workdir
from jaxseg.backbones.vit import VARIANTS
from jaxseg.options import Option
from jaxseg.schema import ConfigError

OLD = Path(__file__).parent / "old_runs"
# Of each of them what has another name today, or is a key that there was not.
TODAY = {
    "segmentation": {
        "task": "binary",
        "data.name": "shapes",
        "head.name": "linear",
        "threshold": 0.4,
        "backbone.weights": "shapes_micro8",
        "backbone.layers": [-3, -2, -1],
        "network.name": "",
    },
    "multiclass": {
        "task": "multiclass",
        "data.name": "class_masks",
        "data.root": "/data/blobs",
        "head.name": "linear_norm",
        "class_weights": "median_frequency",
        "network.name": "",
    },
    "attention": {
        "task": "query",
        "data.name": "scenes",
        "head.name": "attention",
        "head.attention.width": 16,
        "network.name": "",
    },
    "dino": {"task": "dino", "data.name": "shapes", "dino.outputs": 64, "views.local_size": 16},
}
NAMES = {
    "segmentation": ("background", "foreground"),
    "multiclass": ("background", "blob", "bar"),
    "dino": (),
}


@pytest.mark.parametrize("name", TODAY)
def test_old_runs_are_read_in_todays_names(name):
    stored = json.loads((OLD / name / "config.json").read_text())
    config, description = workdir.load(OLD / name, {})
    flat, before = schema.flatten(config), schema.flatten(stored)
    schema.validate(config)
    assert TODAY[name].items() <= flat.items()
    assert "eval.threshold" not in flat
    # All else is as it was stored, and keys that it lacks have the value that says what was done then.
    renamed = {renames.KEYS.get(key, key) for key in before}
    assert renamed <= flat.keys()
    for key in renamed & before.keys() - TODAY[name].keys():
        assert flat[key] == before[key], key
    table = schema.table(config.task)
    for key in flat.keys() - renamed:
        value = tuple(flat[key]) if isinstance(flat[key], list) else flat[key]
        assert value == table[key].before, key
    shape = "vit_micro16" if name == "attention" else "vit_micro8"
    assert description.variant == VARIANTS[shape]
    assert description.facts.size == (32, 32) and len(description.frozen_sha256) in (0, 64)
    if name in NAMES:
        assert description.facts.names == NAMES[name]
    if name == "multiclass":
        assert len(description.facts.class_weights) == 3


@pytest.mark.parametrize("name", TODAY)
def test_old_runs_go_on_with_todays_config(name, tmp_path):
    """The old config, in today's names, is no other config; in old names neither."""
    shutil.copytree(OLD / name, tmp_path / "w")
    (tmp_path / "w" / "checkpoints" / "1").mkdir(parents=True)
    config, description = workdir.load(tmp_path / "w", {})
    workdir.check(tmp_path / "w", config)
    config.optim.lr = 0.25
    with pytest.raises(ConfigError, match="optim.lr: .* there, 0.25 now"):
        workdir.check(tmp_path / "w", config)
    config.optim.lr = json.loads((OLD / name / "config.json").read_text())["optim"]["lr"]
    workdir.begin(tmp_path / "w", config, description)
    assert schema.flatten(workdir.read_config(tmp_path / "w")) == schema.flatten(config)


def test_missing_keys_get_neutral_values(monkeypatch):
    """What was done before there was the key, which need not be what new runs do."""
    known = schema.table("binary")
    later = {
        "optim.lookahead": Option(0.5, neutral=0.0),
        "augment.crops": Option((2, 2), neutral=(0, 0)),
        "augment.noise": Option(0.0),
    }
    monkeypatch.setattr(schema, "table", lambda task: known | later)
    stored = json.loads((OLD / "segmentation" / "config.json").read_text())
    config = schema.modernized(stored)
    assert config.optim.lookahead == 0.0 and config.augment.crops == (0, 0)
    assert config.augment.noise == 0.0
    # What was stored since then stays.
    stored["optim"]["lookahead"] = 0.25
    assert schema.modernized(stored).optim.lookahead == 0.25
    fresh = schema.base_config("binary")
    assert fresh.optim.lookahead == 0.5 and fresh.augment.crops == (2, 2)


def test_a_stored_config_that_lacks_keys_is_whole(tmp_path):
    stored = json.loads((OLD / "segmentation" / "config.json").read_text())
    for key in ("sharding", "augment"):
        del stored[key]
    del stored["optim"]["layer_decay"], stored["head"]["pac_joint"]
    config = schema.modernized(stored)
    schema.validate(config)
    assert config.sharding.params == "replicated" and config.optim.layer_decay == 1.0
    assert config.augment.flip == 0.0 and config.optim.lr == stored["optim"]["lr"]


@pytest.mark.parametrize(
    "given, key, value",
    [
        ({"task": "segmentation"}, "task", "binary"),
        ({"task": "attention"}, "task", "query"),
        ({"task": "segmentation", "data.name": "folder"}, "data.name", "binary_masks"),
        ({"task": "binary", "data.name": "folder"}, "data.name", "binary_masks"),
        ({"task": "multiclass", "data.name": "folder"}, "data.name", "class_masks"),
        ({"task": "attention", "data.name": "folder"}, "data.name", "class_masks"),
        ({"task": "segmentation", "data.name": "shapes"}, "data.name", "shapes"),
        ({"task": "dino", "data.name": "shapes"}, "data.name", "shapes"),
        ({"task": "multiclass", "data.name": "shapes"}, "data.name", "scenes"),
        ({"task": "attention", "data.name": "shapes"}, "data.name", "scenes"),
        ({"task": "multiclass", "head.name": "linear"}, "head.name", "linear_norm"),
        ({"task": "segmentation", "head.name": "linear"}, "head.name", "linear"),
        ({"task": "binary", "eval.threshold": 0.3}, "threshold", 0.3),
    ],
)
def test_one_table_of_renames(given, key, value):
    found, changed = renames.renamed(given)
    assert found[key] == value and not found.keys() & renames.KEYS.keys()
    assert renames.renamed(found) == (found, {})
    expected = set(given) - {k for k, v in found.items() if given.get(k) == v}
    assert set(changed) == expected


def _config(*arguments):
    return cli._config(cli.parse([*arguments, "--workdir=w"]))


def test_old_names_on_the_command_line_are_one_warning_line_each(capsys):
    config, values = _config("--config=pac_objseg", "--config.eval.threshold=0.3")
    assert config.threshold == 0.3 and values == {"threshold": 0.3}
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["config.eval.threshold is called config.threshold now"]

    config, values = _config(
        "--config=deeplab_multiclass", "--config.data.name=folder", "--config.head.name=linear"
    )
    assert (config.data.name, config.head.name) == ("class_masks", "linear_norm")
    assert values == {"data.name": "class_masks", "head.name": "linear_norm"}
    lines = capsys.readouterr().err.splitlines()
    assert sorted(lines) == [
        "config.data.name=folder is called class_masks now",
        "config.head.name=linear is called linear_norm now",
    ]

    config, _ = _config("--config=pac_objseg", "--config.data.name=folder")
    assert config.data.name == "binary_masks"
    capsys.readouterr()
    _config("--config=pac_objseg", "--config.threshold=0.3", "--config.data.name=binary_masks")
    assert not capsys.readouterr().err


def test_old_names_in_a_config_file(tmp_path, capsys):
    (tmp_path / "mine.py").write_text(
        "from jaxseg.schema import base_config\n"
        "def get_config(arg):\n"
        "    config = base_config('query')\n"
        "    config.task = 'attention'\n"
        "    config.data.name = 'shapes'\n"
        "    return config\n"
    )
    config, _ = _config(f"--config={tmp_path}/mine.py")
    assert (config.task, config.data.name) == ("query", "scenes")
    assert capsys.readouterr().err.splitlines() == [
        "config.task=attention is called query now",
        "config.data.name=shapes is called scenes now",
    ]


def test_old_names_in_overrides_of_a_stored_run(tmp_path, capsys):
    shutil.copytree(OLD / "segmentation", tmp_path / "w")
    command = ["--mode=eval", f"--workdir={tmp_path / 'w'}"]
    config, values = cli._config(cli.parse([*command, "--config.data.name=folder"]))
    assert config is None and values == {"data.name": "binary_masks"}
    assert capsys.readouterr().err == "config.data.name=folder is called binary_masks now\n"
    # As values of Python too.
    loaded, _ = workdir.load(tmp_path / "w", {"data.name": "folder", "data.root": "x"})
    assert loaded.data.name == "binary_masks"
