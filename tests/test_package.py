"""What is installed, and what a start of it costs."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from tiny import ROOT, tiny_arguments

import jaxseg
from jaxseg.schema import config_files

# Each takes a tenth of a second to seconds to import, and has a use of its own.
HEAVY = {
    *("grain", "matplotlib", "optax", "orbax", "pyvips", "scipy", "sklearn", "tensorboardX"),
    *("tensorflow", "tensorflow_datasets", "tqdm"),
}
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
# Ends the process that huge pages are asked for in, and says so.
WATCH = """
import os
if "hugetlb" in os.environ.get("GLIBC_TUNABLES", ""):
    print("with huge pages", flush=True)
    os._exit(0)
"""


def loaded(code: str, folder: Path) -> set[str]:
    """The packages that a process has loaded once it ran `code` in a folder."""
    # Last, so that it hides nothing: in a checkout it may not be installed.
    path = f"import sys; sys.path.append({str(Path(jaxseg.__file__).parents[1])!r})\n"
    tell = "\nprint('\\nloaded', *{name.split('.')[0] for name in sys.modules})"
    process = subprocess.run(
        [sys.executable, "-c", path + code + tell],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    return set(process.stdout.splitlines()[-1].split()[1:])


def command(*arguments: str) -> str:
    """Code that runs a command and goes on after it."""
    return (
        f"from jaxseg import cli\ntry: cli.main({list(arguments)!r})\n"
        "except SystemExit as end: print(end)"
    )


def build(tmp_path: Path) -> Path:
    """The wheel of the checkout; no network is needed."""
    pytest.importorskip("setuptools", minversion="77")
    # A build leaves files behind, and packs what it finds of an earlier one.
    tree = tmp_path / "tree"
    for name in ("jaxseg", "configs"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "requirements.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--quiet", "--wheel-dir", tmp_path, tree], check=True, timeout=300)
    return next(tmp_path.glob("jaxseg-*.whl"))


@pytest.mark.slow
def test_the_wheel_holds_code_configs_and_weights_and_nothing_else(tmp_path):
    if (ROOT / "jaxseg").is_dir():
        with zipfile.ZipFile(build(tmp_path)) as wheel:
            names = set(wheel.namelist())
    else:  # what these tests run on is one that is installed
        files = importlib.metadata.files("jaxseg")
        names = {str(f) for f in files if f.suffix != ".pyc" and f.parts[0] != ".."}
    assert {name.split("/")[0].split("-")[0] for name in names} == {"jaxseg"}
    code = Path(jaxseg.__file__).parent
    modules = {f"jaxseg/{path.relative_to(code).as_posix()}" for path in code.rglob("*.py")}
    configs = {f"jaxseg/configs/{path.name}" for path in config_files().values()}
    assert {name for name in names if name.endswith(".py")} == modules | configs
    assert {"jaxseg/weights/shapes_micro8.safetensors", "jaxseg/weights/shapes_micro8.md"} <= names


def test_configs_are_found_by_name():
    assert {"dino", "pac_objseg", "rotation"} <= config_files().keys()


def test_the_process_of_an_import_loads_nothing_heavy(tmp_path):
    assert not loaded("import jaxseg", tmp_path) & {*HEAVY, "jax", "flax", "numpy", "PIL"}
    assert not loaded("import jaxseg.data", tmp_path) & {*HEAVY, "jax", "flax"}


@pytest.mark.parametrize("module", [jaxseg, jaxseg.data], ids=["jaxseg", "jaxseg.data"])
def test_every_public_name_is_there(module):
    for name in module.__all__:
        assert getattr(module, name) is not None and name in dir(module)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        module.nothing  # noqa: B018


def test_the_process_of_help_and_of_a_mistake_loads_nothing_heavy(tmp_path):
    mistake = command("--config=pac_objseg", "--workdir=W", "--config.nothing=1")
    found = loaded(f"{command('--help')}\n{mistake}", tmp_path)
    # Most of the time is theirs: `jaxseg --help` takes 1.2 times as long as they do.
    assert {"jax", "flax"} <= found and not found & HEAVY
    assert not (tmp_path / "W").exists()


@pytest.mark.slow
def test_the_processes_of_training_and_prediction_load_what_they_use(tmp_path):
    run = command("--config=pac_objseg", "--workdir=W", *tiny_arguments(train__steps=1))
    found = loaded(run, tmp_path)
    assert "grain" in found
    assert not found & {"pyvips", "sklearn", "matplotlib", "tensorflow_datasets"}
    assert (tmp_path / "W" / "eval.json").exists()
    picture = (
        "import numpy as np; from jaxseg.data import write_image; from pathlib import Path\n"
        "write_image(Path('a.png'), np.zeros((40, 50, 3), np.uint8))\n"
    )
    run = command("--mode=predict", "--workdir=W", "--inputs=a.png", "--outputs=masks")
    found = loaded(picture + run, tmp_path)
    assert not found & {"grain", "sklearn", "matplotlib", "tensorboardX", "tensorflow_datasets"}
    assert (tmp_path / "masks" / "a_mask.png").exists()


@pytest.mark.parametrize("start", ["jaxseg", "python -m jaxseg", "python main.py"])
def test_a_process_is_started_again_for_huge_pages(start, tmp_path):
    if not HUGE_PAGES.exists() or "[madvise]" not in HUGE_PAGES.read_text():
        pytest.skip("this kernel gives huge pages unasked or not at all")
    script = Path(sys.executable).with_name("jaxseg")
    if start == "jaxseg" and not script.exists():
        pytest.skip("jaxseg is not installed in this environment")
    words = {
        "jaxseg": [script],
        "python -m jaxseg": [sys.executable, "-m", "jaxseg"],
        "python main.py": [sys.executable, "main.py"],
    }[start]
    (tmp_path / "sitecustomize.py").write_text(WATCH)
    env = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    paths = [str(tmp_path), *filter(None, [env.get("PYTHONPATH")])]
    process = subprocess.run(
        [*words, "--mode=eval", "--workdir=W"],
        env=env | {"PYTHONPATH": os.pathsep.join(paths)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert process.stdout == "with huge pages\n", process.stderr
