"""`main.py` as a user runs it: train, evaluate, predict, and one clear line for every mistake.

A process of its own has what is about the process; the rest runs the same commands in this one.
"""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from command import run_here
from PIL import Image
from tiny import ROOT, run_main, tiny_arguments

from jaxseg import run

CONFIG = "--config=pac_objseg"


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("main") / "w"
    done = run_main("--config=configs/pac_objseg.py", f"--workdir={folder}", *tiny_arguments())
    assert done.returncode == 0, done.stderr
    assert "train 6/6" in done.stdout and "images/s" in done.stdout
    assert "foreground_iou" in done.stdout
    return folder


@pytest.fixture
def copy(workdir, tmp_path):
    """A run that a test may change."""
    return shutil.copytree(workdir, tmp_path / "w")


def test_eval_gives_the_same_file(workdir):
    before = (workdir / "eval.json").read_bytes()
    (workdir / "eval.json").unlink()
    done = run_main(f"--workdir={workdir}", "--mode=eval")
    assert done.returncode == 0, done.stderr
    assert (workdir / "eval.json").read_bytes() == before


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--config.seed=x"], "config.seed='x' is no int"),  # before anything is imported
        (["--config.data.categories=dog"], "allowed: fish"),  # as the run begins
    ],
)
def test_mistakes_are_one_line_without_a_traceback(tmp_path, arguments, message):
    done = run_main(CONFIG, f"--workdir={tmp_path / 'w'}", *arguments)
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.startswith("error: ") and message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "w").exists()


def test_without_arguments_there_is_help():
    done = run_main()
    assert done.returncode == 1
    assert done.stdout.startswith("usage: ") and "jaxseg --mode=eval --workdir=W" in done.stdout
    assert done.stderr == "error: nothing to do; see the examples above\n"


# Limits the size of files, and becomes the program that its arguments name.
_LIMITED = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
os.execv(sys.argv[2], sys.argv[2:])
"""


@pytest.mark.slow
def test_disk_full_is_one_clear_line_and_loses_nothing(workdir, tmp_path):
    """A limit on the size of files stands in for the full disk."""
    folder = tmp_path / "w"
    arguments = [sys.executable, "main.py", CONFIG, f"--workdir={folder}", *tiny_arguments()]
    limit = "100000"  # config, log and pictures fit; the checkpoint of some megabytes does not
    limited = [sys.executable, "-c", _LIMITED, limit, *arguments]
    options = dict(cwd=ROOT, capture_output=True, text=True, timeout=300)
    done = subprocess.run(limited, **options)
    assert done.returncode != 0
    assert not [p for p in (folder / "checkpoints").iterdir() if p.name.isdigit()]
    again = subprocess.run(arguments, **options)
    assert again.returncode == 0, again.stderr
    assert (folder / "eval.json").read_bytes() == (workdir / "eval.json").read_bytes()


# In this process.


def test_another_config_is_refused(workdir):
    error = run_here(CONFIG, f"--workdir={workdir}", *tiny_arguments(optim__lr=0.5))
    assert "optim.lr: 0.004 there, 0.5 now" in error


def test_eval_takes_overrides_without_a_config(copy):
    before = json.loads((copy / "eval.json").read_text())
    assert before["split"] == "test"
    assert run_here(f"--workdir={copy}", "--mode=eval", "--config.eval.split=val") is None
    other = json.loads((copy / "eval.json").read_text())
    assert other["split"] == "val" and other["iou"] != before["iou"]
    # What was asked for once is not kept.
    assert run.restore(copy, {}).config.eval.split == "test"
    with_config = [CONFIG, f"--workdir={copy}", "--mode=eval", "--config.eval.split=test"]
    assert run_here(*with_config) is None
    assert json.loads((copy / "eval.json").read_text()) == before
    error = run_here(f"--workdir={copy}", "--mode=eval", "--config.head.name=guided")
    assert "head.name: 'linear' there, 'guided' now" in error
    error = run_here(f"--workdir={copy}", "--mode=eval", "--config.eval.splits=val")
    assert "unknown key 'config.eval.splits'; allowed in config.eval: batch, " in error


def test_export_says_that_it_is_the_backbone_alone(workdir, tmp_path, capsys):
    outputs = f"--outputs={tmp_path}/x.safetensors"
    assert run_here("--mode=export", f"--workdir={workdir}", outputs) is None
    out = capsys.readouterr().out
    assert out.startswith("vit_micro16, ") and "x.safetensors, sha256 " in out
    assert "this is the backbone alone: the head of the run is not in it" in out
    assert (tmp_path / "x.safetensors").stat().st_size > 100_000
    error = run_here("--mode=export", f"--workdir={workdir}", outputs, "--config.seed=1")
    assert "--mode=export takes no config.seed" in error


def _write_inputs(folder):
    """One picture in every disguise: the mask must come out alike wherever the content is alike."""
    rng = np.random.default_rng(0)
    photo = Image.fromarray(rng.integers(0, 256, (9, 12, 3), np.uint8)).resize((120, 90))
    photo.save(folder / "plain.png")
    photo.convert("L").save(folder / "grey.png")
    photo.convert("RGBA").save(folder / "alpha.png")
    Image.fromarray(np.asarray(photo.convert("L"), np.uint16) * 257).save(folder / "deep.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees when shown
    photo.transpose(Image.Transpose.ROTATE_90).save(folder / "turned.png", exif=exif)
    photo.resize((1, 1)).save(folder / "dot.png")
    photo.resize((5000, 3000)).save(folder / "LARGE.JPG")
    (folder / "sub").mkdir()
    photo.resize((33, 470)).save(folder / "sub" / "tall.jpeg")


def _predict(workdir, inputs, outputs):
    return run_here(
        f"--workdir={workdir}", "--mode=predict", f"--inputs={inputs}", f"--outputs={outputs}"
    )


def test_predict_on_pictures_of_every_kind(workdir, tmp_path, capsys):
    inputs, outputs = tmp_path / "in", tmp_path / "out"
    inputs.mkdir()
    _write_inputs(inputs)
    assert _predict(workdir, inputs, outputs) is None
    assert f"8 predictions in {outputs}" in capsys.readouterr().out
    sizes = {
        **{name: (120, 90) for name in ("plain", "grey", "alpha", "deep", "turned")},
        **{"dot": (1, 1), "LARGE": (5000, 3000), "tall": (33, 470)},
    }
    assert {p.name for p in outputs.iterdir()} == {
        f"{name}_{kind}" for name in sizes for kind in ("mask.png", "overlay.jpg")
    }
    masks = {name: np.asarray(Image.open(outputs / f"{name}_mask.png")) for name in sizes}
    for name, size in sizes.items():
        assert masks[name].shape == size[::-1] and set(np.unique(masks[name])) <= {0, 255}
        assert Image.open(outputs / f"{name}_overlay.jpg").size == size
    np.testing.assert_array_equal(masks["plain"], masks["alpha"])
    np.testing.assert_array_equal(masks["plain"], masks["turned"])
    np.testing.assert_array_equal(masks["grey"], masks["deep"])


def test_predict_goes_on_after_a_broken_image_and_says_so(workdir, tmp_path, caplog):
    inputs, outputs = tmp_path / "in", tmp_path / "out"
    inputs.mkdir()
    Image.new("RGB", (40, 40)).save(inputs / "good.png")
    (inputs / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 not a picture")
    error = _predict(workdir, inputs, outputs)
    assert error.startswith("error: ") and "broken.jpg" in error + caplog.text
    assert sorted(p.name for p in outputs.iterdir()) == ["good_mask.png", "good_overlay.jpg"]


def test_predict_without_images(workdir, tmp_path):
    assert str(tmp_path) in _predict(workdir, tmp_path, tmp_path / "x")
    assert "--inputs=" in run_here(f"--workdir={workdir}", "--mode=predict")
    assert not (tmp_path / "x").exists() and workdir.exists()
