"""The command line: how it is read, its help, and one clear line for every mistake."""

import re

import pytest
from command import run_here
from PIL import Image
from tiny import tiny_config

from jaxseg import assembly, cli, schema, workdir
from jaxseg.backbones import BACKBONES
from jaxseg.data.formats import FORMATS
from jaxseg.heads import HEADS
from jaxseg.networks import NETWORKS
from jaxseg.tasks import TASKS
from jaxseg.weights.catalog import NAMES

CONFIG = "--config=pac_objseg"


# How it is read.


def test_options_and_overrides():
    command = cli.parse(
        [
            *("--config", "pac_objseg:real,runlocal", "--workdir=W", "-mode=predict"),
            *("--classes=a,b", "--probabilities", "--processes=2", "--inputs", "x y/*.jpg"),
            *("--config.seed=3", "--config.data.root", "a=b", "--config.head.name="),
        ]
    )
    assert command.options["config"] == "pac_objseg:real,runlocal"
    assert command.options["workdir"] == "W" and command.options["mode"] == "predict"
    assert command.options["classes"] == ("a", "b") and command.options["probabilities"] is True
    assert command.options["processes"] == 2 and command.options["process"] == -1
    assert command.options["inputs"] == "x y/*.jpg" and command.options["distributed"] is False
    assert command.overrides == {"seed": "3", "data.root": "a=b", "head.name": ""}


def test_what_is_not_given_is_the_default():
    command = cli.parse([])
    assert command.options == {name: value for name, (value, _) in cli.OPTIONS.items()}
    assert command.overrides == {}


@pytest.mark.parametrize(
    "text, value",
    [("", True), ("=true", True), ("=1", True), ("=False", False), ("=0", False)],
)
def test_switches(text, value):
    assert cli.parse([f"--probabilities{text}"]).options["probabilities"] is value
    both = ["--probabilities", "--noprobabilities"]
    assert cli.parse(both).options["probabilities"] is False


def test_the_last_of_two_counts_but_tuples_are_given_once():
    command = cli.parse(["--config.seed=1", "--config.seed=2", "--mode=eval", "--mode=train"])
    assert command.overrides == {"seed": "2"} and command.options["mode"] == "train"
    twice = ["--config.data.size=(64,64)", "--config.data.size=(32,32)"]
    with pytest.raises(cli.UsageError, match="config.data.size is given twice; allowed is once"):
        cli.parse(twice)


def test_home_in_paths(monkeypatch):
    """Shells do not expand ~ behind an = sign."""
    monkeypatch.setenv("HOME", "/home/me")
    options = cli.parse(["--workdir=~/w", "--inputs=~/a.png", "--outputs=~/o"]).options
    paths = [options[name] for name in ("workdir", "inputs", "outputs")]
    assert paths == ["/home/me/w", "/home/me/a.png", "/home/me/o"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--mode=fly"], "--mode=fly; allowed: train|eval|predict|compare|analyze|export"),
        (["--flags=x"], "unknown option --flags; allowed: --config, .*--process, --help"),
        (["--configs.seed=x"], "unknown option --configs.seed; allowed: "),
        (["stray"], "unexpected argument 'stray'; options begin with --"),
        (["--workdir"], "--workdir needs a value: --workdir=..."),
        (["--config.seed"], "--config.seed needs a value: --config.seed=..."),
        (["--probabilities=maybe"], "--probabilities=maybe; allowed: true, false"),
        (["--processes=two"], "--processes=two; allowed: a whole number"),
        (["--noworkdir"], "unknown option --noworkdir"),
    ],
)
def test_commands_that_cannot_be_understood(arguments, message):
    with pytest.raises(cli.UsageError, match=message.replace("|", r"\|")):
        cli.parse(arguments)


# Help.


def test_help_lists_everything(capsys):
    assert run_here("--help", "--mode=fly") is None
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert lines[0].startswith("usage: jaxseg --config=NAME[:PRESET,...] --workdir=FOLDER")
    for mode, (what, example) in cli.MODES.items():
        assert f"{mode:9s}{what}" in text and f"jaxseg {example}" in text
    for name, (first, presets) in schema.config_summaries().items():
        assert first and f"{name:22s}{first}" in text and ", ".join(presets) in text
    assert all(f"--{option} " in text for option in cli.OPTIONS)
    for key, names in {
        "task": TASKS,
        "data.name": FORMATS,
        "backbone.weights": NAMES,
        "backbone.variant": BACKBONES,
        "head.name": HEADS,
        "network.name": NETWORKS,
        "loss.*": ("bce", "dice", "cross_entropy", "lovasz_softmax"),
    }.items():
        (line,) = (line for line in lines if line.strip().startswith(f"{key} "))
        assert set(names) <= set(line.split(maxsplit=1)[1].split(", ")), key


@pytest.mark.parametrize("mode", cli.MODES)
def test_every_example_of_the_help_can_be_read(mode):
    _, example = cli.MODES[mode]
    command = cli.parse(example.replace("'", "").split())
    assert command.options["mode"] == mode and command.options["workdir"]
    if command.options["config"]:
        schema.validate(schema.read_config(command.options["config"]))


def test_nothing_to_do(capsys):
    assert run_here() == "error: nothing to do; see the examples above"
    assert capsys.readouterr().out.startswith("usage: ")


# Mistakes.


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["--config.data.nope=1"],
            "unknown key 'config.data.nope'; allowed in config.data: .*root",
        ),
        (["--config.seed=x"], "config.seed='x' is no int"),
        (["--config.head.name=nope"], "config.head.name is 'nope'; allowed: "),
        (["--config.eval.split=all"], "allowed: train, val, test"),
        (["--mode=fly"], r"train\|eval\|predict"),
        (["stray"], "stray"),
        (["--nope=1"], "unknown option --nope; allowed: "),
        (["--mode=analyze"], "of the task binary: allowed are configs/dino.py"),
        (["--mode=export"], "--mode=export needs --outputs=FILE.safetensors"),
        (["--mode=predict"], "--mode=predict needs --inputs="),
        (["--workdir="], "--workdir= is empty; give the folder of the run"),
        (["--config.head.guided.guide_widths=()"], r"guide_widths is \(\); allowed: 1 or more"),
        (["--config.backbone.stride=64"], "backbone.stride is 64; allowed: 0, 4, 8, 16, 32"),
        (["--config.data.name=binary_masks", "--config.data.root=nowhere"], "nowhere"),
        (
            ["--config.backbone.weights=shapes_micro8", "--config.backbone.variant=vit_micro16"],
            "variant is vit_micro16, but config.backbone.weights=shapes_micro8 holds a vit_micro8",
        ),
        (
            ["--config.backbone.weights=none.pth"],
            "none.pth.*neither a file nor one of.*dino_vits16",
        ),
        (["--config=configs/no.py:fast"], "no file 'configs/no.py'; .* by name are: .*pac_objseg"),
        (["--config=pac_objseg:fast"], "no preset 'fast'; allowed after the colon: runlocal"),
        (
            ["--config", "configs/pac_objseg.py:no"],
            "no preset 'no'; allowed after the colon: runlo",
        ),
        (["--config="], "--mode=train needs --config=NAME"),
    ],
)
def test_mistakes_are_one_clear_line(tmp_path, arguments, message):
    error = run_here(CONFIG, f"--workdir={tmp_path / 'w'}", *arguments)
    assert re.search(message, error), error
    assert error.startswith("error: ") and error.count("\n") == 0
    assert not (tmp_path / "w").exists()


def test_a_folder_that_holds_no_run(tmp_path):
    folder = f"--workdir={tmp_path}"
    for arguments in (
        ["--mode=eval"],
        ["--mode=eval", "--config.eval.split=val"],
        ["--mode=predict", "--inputs=x", "--outputs=y"],
    ):
        error = run_here(folder, *arguments)
        assert error.startswith("error: ") and ("holds no run" in error or "x" in error), error
    assert "analyse weights give --config=" in run_here(folder, "--mode=analyze")
    assert not list(tmp_path.iterdir())


def test_overrides_of_a_training_need_a_config(tmp_path):
    workdir.begin(tmp_path, tiny_config(), workdir.Description(None, assembly.Facts((32, 32)), ""))
    error = run_here(f"--workdir={tmp_path}", "--config.seed=1")
    assert error == "error: config.seed needs --config=NAME as well"


# Presets for images of one's own.


def _write_images(root):
    for split in ("train", "test"):
        for kind in ("images", "masks"):
            (root / split / kind).mkdir(parents=True)
            Image.new("L", (32, 32), 255).save(root / split / kind / "a.png")
    return root


def test_the_preset_for_real_images_says_that_it_needs_weights(tmp_path):
    root = _write_images(tmp_path / "data")
    arguments = ["--config=pac_objseg:real", f"--config.data.root={root}"]
    error = run_here(*arguments, f"--workdir={tmp_path / 'w'}")
    assert "config.head.guided.prior is 0.0003, which is solved for on pretrained" in error
    assert "give --config.backbone.weights=NAME|FILE|WORKDIR, such as dinov2_vits14" in error
    assert error.count("\n") == 0 and not (tmp_path / "w").exists()


def test_the_preset_for_real_images_takes_layers_by_their_share(caplog):
    config = schema.read_config("pac_objseg:real")
    assert config.backbone.layers == (-7, -4, -1)
    config.backbone.weights = "shapes_micro8"
    network = assembly.make_task(config, ("background", "foreground")).network
    assert network.backbone.variant.depth == 4
    # 6, 9 and 12 of 12 blocks are 2, 3 and 4 of 4.
    assert network.module.layers == (-3, -2, -1)
    assert "vit_micro8 has 4 blocks: in place of the blocks (-7, -4, -1) of 12" in caplog.text
    # Blocks that nobody could mean are an error.
    config.backbone.layers = (-13,)
    with pytest.raises(schema.ConfigError, match="config.backbone.layers .*-13"):
        assembly.make_task(config, ("background", "foreground"))
