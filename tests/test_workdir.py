"""The folder of a run: what it keeps, which config may go on in it, and what it refuses."""

import json
from pathlib import Path

import pytest

from jaxseg import schema
from jaxseg import workdir as folder
from jaxseg.backbones.vit import VARIANTS
from jaxseg.schema import ConfigError
from jaxseg.tasks import Facts

FACTS = dict(size=(16, 16), categories=("a",), examples=8)


def _config(**changes):
    config = schema.base_config("binary")
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    return config


def _begin(workdir, config, **changes):
    facts = Facts(**(FACTS | changes))
    folder.begin(workdir, config, folder.Description(VARIANTS["vit_micro16"], facts, ""))


def _checkpoint(workdir, step):
    (workdir / "checkpoints" / str(step)).mkdir(parents=True)


def test_a_workdir_of_another_config_is_refused(tmp_path):
    config = _config()
    _begin(tmp_path, config)
    _begin(tmp_path, config)
    config.eval.split = "val"
    _begin(tmp_path, config)
    assert json.loads((tmp_path / "config.json").read_text())["eval"]["split"] == "val"
    _checkpoint(tmp_path, 7)
    config.optim.lr = 0.5
    with pytest.raises(ConfigError, match="(?s)another config.*optim.lr: 0.001 there, 0.5 now"):
        _begin(tmp_path, config)
    with pytest.raises(ConfigError, match="(?s)another model or data.*categories"):
        _begin(tmp_path, _config(), categories=("b",))


def test_what_no_step_depends_on_may_change(tmp_path):
    _begin(tmp_path, _config())
    _checkpoint(tmp_path, 7)
    _begin(tmp_path, _config(train__log_every=1, data__threads=3, eval__batch=2, data__root="x"))
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["train"]["log_every"] == 1 and "history" not in stored


def test_an_attempt_without_a_checkpoint_binds_nothing(tmp_path):
    config = _config()
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


def test_a_run_that_has_ended_may_be_longer(tmp_path):
    _begin(tmp_path, _config(train__steps=20))
    _checkpoint(tmp_path, 20)
    longer = _config(train__steps=30, train__log_every=7)
    folder.check(tmp_path, longer)
    _begin(tmp_path, longer)
    stored = json.loads((tmp_path / "config.json").read_text())
    (before,) = stored["history"]
    assert before["steps"] == 20 and before["train"]["steps"] == 20
    assert stored["train"]["steps"] == 30
    # It is no key of the config, and stays where the run goes on, or is longer still.
    assert "history" not in folder.read_config(tmp_path)
    _checkpoint(tmp_path, 25)
    _begin(tmp_path, longer)
    _checkpoint(tmp_path, 30)
    # Epochs count too: 8 examples, batches of 16.
    _begin(tmp_path, _config(train__epochs=100.0))
    stored = json.loads((tmp_path / "config.json").read_text())
    assert [past["steps"] for past in stored["history"]] == [20, 30]
    assert folder.load(tmp_path, {})[0].train.epochs == 100.0


@pytest.mark.parametrize(
    "step, changes, message",
    [
        (12, dict(train__steps=30), "train.steps: 20 there, 30 now"),  # in the middle of it
        (20, dict(train__steps=10), "train.steps: 20 there, 10 now"),
        (20, dict(train__steps=30, optim__lr=0.5), "optim.lr: 0.001 there, 0.5 now"),
        (20, dict(train__steps=30, train__batch=8), "train.batch: 16 there, 8 now"),
        (20, dict(train__epochs=99.0, train__steps=20), "train.epochs: 20.0 there, 99.0 now"),
    ],
)
def test_other_lengths_are_refused(tmp_path, step, changes, message):
    _begin(tmp_path, _config(train__steps=20))
    _checkpoint(tmp_path, step)
    for call in (folder.check, _begin):
        with pytest.raises(ConfigError, match=f"(?s)another config.*{message}"):
            call(tmp_path, _config(**changes))
    assert "history" not in json.loads((tmp_path / "config.json").read_text())


def test_files_in_the_place_of_folders_are_named(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(ConfigError, match="checkpoints is a file, not a folder"):
        folder.check(tmp_path, _config())
    with pytest.raises(ConfigError, match="checkpoints is a file, not a folder"):
        folder.check(tmp_path / "checkpoints", _config())


def test_stored_config_comes_back(tmp_path):
    config = _config(head__name="guided")
    config.backbone.layers = (2, -1)
    _begin(tmp_path, config)
    loaded, description = folder.load(tmp_path, {"data.limit": 3})
    assert loaded.backbone.layers == (2, -1) and loaded.data.limit == 3
    assert description.variant == VARIANTS["vit_micro16"] and description.facts == Facts(**FACTS)
    with pytest.raises(ConfigError, match="head.name: 'guided' there, 'linear' now"):
        folder.load(tmp_path, {"head.name": "linear"})
    with pytest.raises(ConfigError, match="optim.name: 'adamw' there, 'sgd' now"):
        folder.load(tmp_path, {"optim.name": "sgd"})
    with pytest.raises(ConfigError, match="train.steps: 0 there, 9 now"):
        folder.load(tmp_path, {"train.steps": 9})
    with pytest.raises(ConfigError, match="eval.split is 'all'; allowed: train, val, test"):
        folder.load(tmp_path, {"eval.split": "all"})
    with pytest.raises(ConfigError, match="holds no run: config.json is missing"):
        folder.load(tmp_path / "other", {})
    (tmp_path / "model.json").write_text("{}")
    with pytest.raises(ConfigError, match="model.json is damaged or of another version"):
        folder.load(tmp_path, {})
    (tmp_path / "model.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot read .*model.json"):
        folder.load(tmp_path, {})
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="the config's task is None; allowed: binary"):
        folder.load(tmp_path, {})


def test_objects_and_configs_do_not_go_on_with_each_other(tmp_path):
    (tmp_path / "objects.json").write_text("{}")
    _checkpoint(tmp_path, 3)
    with pytest.raises(ConfigError, match="holds a run that was begun from objects; give another"):
        folder.check(tmp_path, _config())
    with pytest.raises(ConfigError, match=r"only jaxseg.load\(workdir, task=..., data=...\)"):
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
        _begin(tmp_path / "file" / "w", _config())


def test_the_steps_of_checkpoints_are_those_of_finished_ones(tmp_path):
    assert folder.last_step(tmp_path) == -1 and not folder.has_checkpoint(tmp_path)
    for name in ("3", "12", "20.orbax-checkpoint-tmp", "damaged-15"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert folder.last_step(tmp_path) == 12 and folder.has_checkpoint(Path(tmp_path))
