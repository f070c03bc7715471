"""`main.py` as a user runs it: train, evaluate, predict, and one clear line for every mistake."""

import os
import resource
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from tiny import ROOT, run_main, tiny_arguments

CONFIG = "--config=configs/pac_objseg.py"


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("main") / "w"
    done = run_main(CONFIG, f"--workdir={folder}", *tiny_arguments())
    assert done.returncode == 0, done.stderr
    assert "train 6/6" in done.stdout and "images/s" in done.stdout
    assert "foreground_iou" in done.stdout
    return folder


def test_eval_gives_the_same_file(workdir):
    before = (workdir / "eval.json").read_bytes()
    (workdir / "eval.json").unlink()
    done = run_main(f"--workdir={workdir}", "--mode=eval")
    assert done.returncode == 0, done.stderr
    assert (workdir / "eval.json").read_bytes() == before


def test_another_config_is_refused(workdir):
    done = run_main(CONFIG, f"--workdir={workdir}", *tiny_arguments(optim__lr=0.5))
    assert done.returncode == 1
    assert "optim.lr: 0.004 there, 0.5 now" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--config.data.nope=1"], "unknown key 'config.data.nope'; allowed in config.data: "),
        (["--config.seed=x"], "config.seed='x' is no int"),
        (["--config.head.name=nope"], "config.head.name is 'nope'; allowed: "),
        (["--config.eval.split=all"], "allowed: train, val, test"),
        (["--mode=fly"], "train\\|eval\\|analyze\\|predict"),
        (["stray"], "stray"),
        (["--mode=analyze"], "of the task segmentation: allowed are configs/dino.py"),
        (["--workdir="], "--workdir= is empty; give the folder of the run"),
        (["--config.head.guided.guide_widths=()"], r"guide_widths is \(\); allowed: channels at"),
        (["--config.backbone.stride=64"], "backbone.stride is 64; allowed: 0, 4, 8, 16, 32"),
        (["--config.data.name=folder", "--config.data.root=nowhere"], "nowhere"),
        (
            ["--config.backbone.weights=shapes_micro8", "--config.backbone.variant=vit_micro16"],
            "variant is vit_micro16, but config.backbone.weights=shapes_micro8 holds a vit_micro8",
        ),
        (
            ["--config.backbone.weights=none.pth"],
            "none.pth.*neither a file nor one of.*dino_vits16",
        ),
    ],
)
def test_mistakes_are_one_clear_line(tmp_path, arguments, message):
    import re

    done = run_main(CONFIG, f"--workdir={tmp_path / 'w'}", *arguments)
    assert done.returncode != 0
    assert re.search(message, done.stderr), done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "w").exists()


def test_home_in_paths(tmp_path, monkeypatch):
    """Shells do not expand ~ behind an = sign."""
    monkeypatch.setenv("HOME", str(tmp_path))
    done = run_main("--mode=eval", "--workdir=~/none")
    assert done.returncode == 1 and f"{tmp_path}/none" in done.stderr


def test_missing_config_file(tmp_path):
    done = run_main("--config=configs/no.py:fast", f"--workdir={tmp_path / 'w'}")
    assert done.returncode != 0 and done.stderr.count("\n") == 1
    assert "no file 'configs/no.py'; here are: " in done.stderr and "pac_objseg" in done.stderr


def test_config_file_after_a_space(tmp_path):
    done = run_main("--config", "configs/pac_objseg.py:no", f"--workdir={tmp_path / 'w'}")
    assert done.stderr.startswith("error: no preset 'no'; allowed after the colon: runlocal")


def test_unknown_preset(tmp_path):
    done = run_main("--config=configs/pac_objseg.py:fast", f"--workdir={tmp_path / 'w'}")
    assert done.returncode != 0 and "allowed after the colon: runlocal" in done.stderr


def test_disk_full_is_one_clear_line_and_loses_nothing(workdir, tmp_path):
    """A limit on the size of files stands in for the full disk."""
    folder = tmp_path / "w"
    arguments = [sys.executable, "main.py", CONFIG, f"--workdir={folder}", *tiny_arguments()]
    limit = 100_000  # config, log and pictures fit; the checkpoint of some megabytes does not
    done = subprocess.run(
        arguments,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert done.returncode != 0
    assert not [p for p in (folder / "checkpoints").iterdir() if p.name.isdigit()]
    again = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr
    assert (folder / "eval.json").read_bytes() == (workdir / "eval.json").read_bytes()


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


def test_predict_on_pictures_of_every_kind(workdir, tmp_path):
    inputs, outputs = tmp_path / "in", tmp_path / "out"
    inputs.mkdir()
    _write_inputs(inputs)
    done = run_main(
        f"--workdir={workdir}", "--mode=predict", f"--inputs={inputs}", f"--outputs={outputs}"
    )
    assert done.returncode == 0, done.stderr
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


def test_predict_goes_on_after_a_broken_image_and_says_so(workdir, tmp_path):
    inputs, outputs = tmp_path / "in", tmp_path / "out"
    inputs.mkdir()
    Image.new("RGB", (40, 40)).save(inputs / "good.png")
    (inputs / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 not a picture")
    done = run_main(
        f"--workdir={workdir}", "--mode=predict", f"--inputs={inputs}", f"--outputs={outputs}"
    )
    assert done.returncode == 1 and "broken.jpg" in done.stderr and "Traceback" not in done.stderr
    assert sorted(p.name for p in outputs.iterdir()) == ["good_mask.png", "good_overlay.jpg"]


def test_predict_without_images(workdir, tmp_path):
    done = run_main(f"--workdir={workdir}", "--mode=predict", f"--inputs={tmp_path}", "--outputs=x")
    assert done.returncode == 1 and str(tmp_path) in done.stderr and "Traceback" not in done.stderr
    done = run_main(f"--workdir={workdir}", "--mode=predict")
    assert done.returncode == 1 and "--inputs=" in done.stderr
    assert not (ROOT / "x").exists() and os.path.exists(workdir)


def test_overrides_need_a_config(workdir):
    done = run_main(f"--workdir={workdir}", "--mode=eval", "--config.eval.split=val")
    assert done.returncode == 1 and "needs --config=" in done.stderr


def test_eval_takes_overrides(workdir, tmp_path):
    import shutil

    shutil.copytree(workdir, tmp_path / "w")
    arguments = [f"--workdir={tmp_path / 'w'}", "--mode=eval", "--config.eval.split=val"]
    done = run_main(CONFIG, *arguments)
    assert done.returncode == 0, done.stderr
    assert '"split": "val"' in (tmp_path / "w" / "eval.json").read_text()


def test_eval_of_a_folder_that_holds_no_run(tmp_path):
    done = run_main(f"--workdir={tmp_path}", "--mode=eval")
    assert done.returncode == 1 and "holds no run" in done.stderr
    assert not list(tmp_path.iterdir())
