"""What adding a thing costs: one file and one line, counted on trial commits that are kept as patches.

Each is applied to a copy of the tree, and there it trains by name, goes on, is evaluated, predicts, stands in
the help, and passes the tests of everything that is listed.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import ROOT

import jaxseg
from jaxseg import schema

HERE = Path(__file__).parent
TREE = {
    # Where they are installed, as in a checkout.
    "jaxseg": Path(jaxseg.__file__).parent,
    "configs": next(iter(schema.config_files().values())).parent,
    "tests": ROOT / "tests",
    "pyproject.toml": ROOT / "pyproject.toml",
}
# Of everything that is listed.
TESTS = ("tests/test_contract.py", "tests/losses")
TINY = {
    "data.size": (32, 32),
    "data.limit": 4,
    "optim.name": "adamw",
    "train.batch": 2,
    "train.log_every": 1,
    "train.checkpoint_every": 2,
    "train.eval_every": 0,
    "eval.batch": 2,
    "eval.split": "val",
    "eval.report": False,
}
# File of the patch -> (name in configs, values of its runs; `config` is for --config).
RUNS = {
    "head": (
        "pyramid",
        {
            "config": "multiclass",
            "head.name": "pyramid",
            "head.pyramid.channels": 8,
            "head.pyramid.dropout": 0.2,
            "backbone.variant": "resnet10_mini",
        },
    ),
    "network": (
        "segnet",
        {
            "config": "multiclass",
            "network.name": "segnet",
            "network.segnet.width": 4,
            "network.segnet.depth": 2,
        },
    ),
    "data": ("labelme", {"config": "multiclass", "data.name": "labelme", "data.root": "{data}"}),
    "backbone": (
        "vgg16",
        {"config": "binary", "backbone.weights": "{weights}", "head.name": "deeplabv3plus"},
        {"config": "binary", "backbone.weights": "{weights}", "backbone.freeze": 4},
    ),
    "loss": ("tversky", {"config": "binary", "loss.bce": 0.0, "loss.tversky": 1.0}),
    "task": ("autoencoder", {"config": "autoencoder", "eval.report": True}),
}
# What these tests call it, where that is not its name.
LISTED = {"backbone": "vgg"}


def test_every_patch_is_tried():
    assert {path.stem for path in HERE.glob("*.patch")} == RUNS.keys()


@pytest.mark.parametrize("kind", RUNS)
def test_costs_one_file_and_one_line(kind):
    changes = re.split(r"^diff --git ", (HERE / f"{kind}.patch").read_text(), flags=re.M)[1:]
    changes = [change for change in changes if not change.startswith("a/tests/")]
    new = [change for change in changes if "\nnew file mode" in change]
    (registry,) = (change for change in changes if change not in new)
    lines = re.findall(r"^[+-](?![+-]{2} ).*$", registry, flags=re.M)
    assert len(new) == 1 and len(lines) == 1 and lines[0].startswith("+")


@pytest.mark.slow
@pytest.mark.parametrize("kind", RUNS)
def test_added_by_a_patch(kind, tmp_path):
    name, *runs = RUNS[kind]
    tree, data = tmp_path / "tree", tmp_path / "data"
    tree.mkdir()
    for name_there, part in TREE.items():
        copy = shutil.copytree if part.is_dir() else shutil.copy
        copy(part, tree / name_there)
    # Its parents are no repository, whatever lies above them.
    outside = os.environ | {"GIT_CEILING_DIRECTORIES": str(tmp_path)}
    patch = HERE / f"{kind}.patch"
    subprocess.run(["git", "apply", str(patch)], cwd=tree, env=outside, check=True)
    write_labelme(data)
    places = {"data": str(data), "weights": weights()}
    what = dict(
        name=name,
        workdir=str(tmp_path / "runs"),
        runs=[arguments({**TINY, **run}, places) for run in runs],
        inputs=str(data),
        tests=TESTS,
        listed=LISTED.get(kind, name),
    )
    done = subprocess.run(
        [sys.executable, str(HERE / "trial.py"), json.dumps(what)],
        cwd=tree,
        env=os.environ | {"PYTHONPATH": str(tree)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def arguments(values, places) -> list[str]:
    values = {key: str(value).format(**places) for key, value in values.items()}
    config = values.pop("config")
    return [f"--config={config}", *(f"--config.{key}={value}" for key, value in values.items())]


def weights() -> str:
    """VGG-16's, or nothing: it then starts from scratch."""
    path = Path(os.environ.get("JAXSEG_SHARED", ROOT.parent / "shared"))
    path = path / "weights" / "vgg16_features_fp16.safetensors"
    return str(path) if path.exists() else ""


def write_labelme(folder: Path) -> None:
    """Ten images of 32 x 32 with a rectangle and a triangle, as LabelMe stores them."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(10):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(folder / f"{i}.png")
        shapes = [
            {"label": "box", "points": [[2, 3], [12 + i, 20]], "shape_type": "rectangle"},
            {"label": "tent", "points": [[8, 30], [28, 30], [18, 8 + i]], "shape_type": "polygon"},
        ]
        content = {"imagePath": f"{i}.png", "imageData": None, "shapes": shapes}
        (folder / f"{i}.json").write_text(json.dumps(content))
