"""Whether two versions of the library compute the same numbers, bit for bit: before and after a change.

    git worktree add /tmp/old COMMIT
    python benchmarks/same_numbers.py --old=/tmp/old --new=. --shared=../shared --workdir=/tmp/numbers

Runs every case by public commands alone (`python main.py ...` in the checkout), and prints one markdown
table: what was compared, and `same` or the first differences. Exits with 1 where there are any. Three
sides are compared with `<workdir>/old`, where finished cases are kept and not run again:

  new        the new version does everything
  mixed      the new version evaluates, and works on, copies of the old version's runs
  continued  the old version is stopped (SIGTERM) within a run, and the new version goes on with it

`eval.json`, `comparison.json`, `analysis.json`: all that the old version wrote must be there; what the new
one adds is listed. `metrics.jsonl`: the same, less times and rates. Parameters, average and extra state
of the last checkpoint, and `frozen/`: every byte. Masks: every pixel of images of the trained size; of
others 99 % of the pixels, since the size at which they are seen may change.

Only on one machine, with the same packages: other cores round differently.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from PIL import Image

SIDES = ("new", "mixed", "continued")
TRAINED = ("eval.json", "metrics.jsonl", "parameters", "frozen")
MEASURED = ("time", "images_per_second", "share_of_peak")  # differ between any two runs
STOP_AFTER = 2  # once this step is logged, a run is stopped
AGREEMENT = 0.99  # of the pixels of masks of images that have another size than those of training
FINISHED, OUTPUT = "same_numbers.json", "same_numbers.log"
INPUTS = {  # name of an image: (folder below data/ whose first image it is, (height, width))
    "128x128": ("obj_seg/test/dog/images", (128, 128)),  # the size of drawn images
    "96x128": ("camvid/val/images", (96, 128)),  # that of `camvid_finetune`
    "96x256": ("camvid/val/images", (96, 256)),
    "61x47": ("obj_seg/test/libby/images", (61, 47)),
    "333x250": ("obj_seg/test/camel/images", (333, 250)),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A command, and what is compared of what it leaves in its workdir.

    Attributes:
      arguments: of the program, less `--workdir`; with the folders `{shared}`, `{inputs}`, `{workdir}`
        and `{side}`, which holds all workdirs of a side.
      base: the case whose workdir is copied first; "" for an empty one.
      needs: other cases that come before it.
      compared: files of the workdir, `parameters` and `frozen`, or `masks`.
      stopped: whether it is also stopped by the old version and continued by the new one.
    """

    arguments: str
    base: str = ""
    needs: tuple[str, ...] = ()
    compared: tuple[str, ...] = TRAINED
    stopped: bool = False

    @property
    def before(self) -> tuple[str, ...]:
        return (self.base, *self.needs) if self.base else self.needs


_DINOV2 = "--config.backbone.weights={shared}/weights/dinov2_vits14_derived_fp16.pth "
_NO_REPORT = "--config.eval.report=false "
_DOG = (
    "--config.data.root={shared}/data/obj_seg --config.data.categories=dog --config.data.limit=8 "
    "--config.train.batch=2 --config.train.log_every=1 " + _DINOV2 + _NO_REPORT
)
_RUNLOCAL = "--config=configs/deeplab_multiclass.py:runlocal " + _NO_REPORT
_FROZEN = (
    "--config.backbone.weights=shapes_micro8 --config.backbone.layers='(-3,-1)' --config.data.limit=64 "
    "--config.train.steps=60 --config.train.log_every=10 --config.train.eval_every=0 "
    "--config.optim.average=0.9 " + _NO_REPORT
)
_INFERENCE = (
    "--mode=eval --config.eval.flip=true --config.eval.window='(64,64)' "
    "--config.eval.scales='(0.75,1.0)' " + _NO_REPORT
)


def _predict(base: str, more: str = "") -> Case:
    """Masks of the photographs by the run of a case, in `masks/` of a copy of its workdir."""
    arguments = "--mode=predict --inputs={inputs}/*.png --outputs={workdir}/masks " + more
    return Case(arguments.strip(), base=base, compared=("masks",))


CASES = {
    "default": Case(
        "--config=configs/pac_objseg.py --config.train.steps=20 --config.train.log_every=1 "
        "--config.train.eval_every=10 --config.data.length=64 --config.data.limit=32",
        stopped=True,
    ),
    "course": Case("--config=configs/pac_objseg.py:course --config.train.steps=4 " + _DOG),
    "real": Case("--config=configs/pac_objseg.py:real --config.train.steps=6 " + _DOG),
    "multiclass_runlocal": Case(_RUNLOCAL),
    "camvid_finetune": Case(
        "--config=configs/deeplab_multiclass.py:camvid,finetune --config.train.steps=5 "
        "--config.train.log_every=1 --config.data.root={shared}/data/camvid --config.data.limit=16 "
        "--config.data.size='(96,128)' " + _DINOV2 + _NO_REPORT
    ),
    "resnet": Case(
        _RUNLOCAL + "--config.backbone.variant=resnet18 --config.data.size='(96,96)' "
        "--config.class_weights=median_frequency",
        stopped=True,
    ),
    "freeze": Case(
        _RUNLOCAL + "--config.backbone.weights=shapes_micro8 --config.backbone.train=auto "
        "--config.backbone.freeze=2"
    ),
    "attention_runlocal": Case("--config=configs/attention_singleclass.py:runlocal " + _NO_REPORT),
    # Of ten steps nothing but background comes; these two find something that can be compared.
    "multiclass": Case(
        "--config=configs/deeplab_multiclass.py --config.head.name=guided " + _FROZEN
    ),
    "attention": Case("--config=configs/attention_singleclass.py " + _FROZEN),
    "rotation_runlocal": Case(
        "--config=configs/rotation.py:runlocal --config.data.size='(128,128)' --config.views.size=96 "
        "--config.backbone.variant=resnet10_mini " + _NO_REPORT
    ),
    "dino_runlocal": Case(
        "--config=configs/dino.py:runlocal --config.backbone.variant=vit_micro16 "
        "--config.data.size='(128,128)' --config.views.global_size=96 --config.views.local_size=48 "
        + _NO_REPORT,
        stopped=True,
    ),
    # With classes, and so with k-NN and a probe.
    "dino_kinds": Case(
        "--config=configs/dino.py:shapes,runlocal --config.data.limit=66 --config.eval.limit=66 "
        + _NO_REPORT
    ),
    "inference": Case(
        "--config=configs/deeplab_multiclass.py " + _INFERENCE,
        base="multiclass",
        compared=("eval.json",),
    ),
    "inference_default": Case(
        "--config=configs/pac_objseg.py --config.eval.checkpoint=best " + _INFERENCE,
        base="default",
        compared=("eval.json",),
    ),
    "compare": Case(
        "--mode=compare --workdirs={side}/multiclass,{side}/attention,{side}/freeze",
        needs=("multiclass", "attention", "freeze"),
        compared=("comparison.json",),
    ),
    "analyze": Case("--mode=analyze", base="dino_kinds", compared=("analysis.json",)),
    "predict_default": _predict("default"),
    "predict_multiclass": _predict("multiclass"),
    "predict_attention": _predict("attention", "--classes=fish,leaf"),
    "predict_camvid": _predict("camvid_finetune"),
}


class Failed(Exception):
    """A command that ended otherwise than it should."""


@dataclasses.dataclass(frozen=True)
class Version:
    """A version of the program: its checkout, and how it is started there."""

    checkout: Path
    command: tuple[str, ...]

    def start(self, arguments: Iterable[str], log: Path) -> subprocess.Popen:
        with log.open("a") as file:
            return subprocess.Popen(
                [*self.command, *arguments], cwd=self.checkout, stdout=file, stderr=file
            )

    def run(self, arguments: Iterable[str], log: Path) -> None:
        """Runs it to its end; raises Failed with the last line that it printed."""
        if code := self.start(arguments, log).wait():
            raise Failed(f"exit {code}: {_last_line(log)}")

    def run_and_stop(self, arguments: Iterable[str], workdir: Path, log: Path) -> None:
        """Stops a training once it has logged step `STOP_AFTER`."""
        process = self.start(arguments, log)
        while process.poll() is None:
            rows = read_rows(workdir / "metrics.jsonl")
            if rows and rows[-1]["step"] >= STOP_AFTER:
                process.send_signal(signal.SIGTERM)
                break
            time.sleep(0.02)
        if process.wait() == 0:
            raise Failed("the run was over before it could be stopped")
        if not steps(workdir):
            raise Failed(f"stopped without a checkpoint: {_last_line(log)}")


def _last_line(log: Path) -> str:
    lines = log.read_text().strip().splitlines() or ["no output"]
    return lines[-1]


@dataclasses.dataclass(frozen=True)
class Bench:
    """The folder of all runs, `root`, and the two versions."""

    root: Path
    shared: Path
    old: Version
    new: Version | None

    def arguments(self, case: Case, side: str, workdir: Path) -> list[str]:
        folders = dict(shared=self.shared, inputs=self.root / "inputs", side=self.root / side)
        folders |= dict(workdir=workdir)
        # Split first, so that folders may have spaces in their names.
        given = [a.format(**folders) for a in shlex.split(case.arguments)]
        return [*given, f"--workdir={workdir}"]

    def begin(self, workdir: Path, copied: Path | None = None) -> Path:
        """Makes a new workdir, or a copy of one; returns the path of its log."""
        shutil.rmtree(workdir, ignore_errors=True)
        if copied:
            ours = shutil.ignore_patterns(FINISHED, OUTPUT, "report")
            shutil.copytree(copied, workdir, ignore=ours)
        # What a command is to write anew must not be there.
        for name in ("eval.json", "analysis.json"):
            (workdir / name).unlink(missing_ok=True)
        workdir.mkdir(parents=True, exist_ok=True)
        return workdir / OUTPUT

    def run(self, name: str, side: str) -> None:
        """Runs a case by the version of that side, `old`, `new` or `mixed`, into `<root>/<side>/<name>`."""
        case, workdir = CASES[name], self.root / side / name
        version = self.old if side == "old" else self.new
        arguments = self.arguments(case, side, workdir)
        if side == "mixed" and case.compared == TRAINED:
            log = self.begin(workdir, self.root / "old" / name)
            arguments = ["--mode=eval", f"--workdir={workdir}"]
        else:
            log = self.begin(workdir, self.root / side / case.base if case.base else None)
        version.run(arguments, log)

    def run_old(self, name: str) -> None:
        """The same for the old version, unless that is done."""
        workdir = self.root / "old" / name
        if not _is_done(workdir, name):
            self.run(name, "old")
            _note_done(workdir, name)

    def run_continued(self, name: str) -> None:
        """Stops a run of the old version, which is kept, and continues a copy with the new one."""
        half, workdir = self.root / "old" / f"{name}-stopped", self.root / "continued" / name
        if not _is_done(half, name):
            log = self.begin(half)
            self.old.run_and_stop(self.arguments(CASES[name], "old", half), half, log)
            _note_done(half, name)
        log = self.begin(workdir, half)
        self.new.run(self.arguments(CASES[name], "continued", workdir), log)


def _is_done(workdir: Path, name: str) -> bool:
    """Whether this case, by the same commands, was run there to its end."""
    file = workdir / FINISHED
    return file.exists() and json.loads(file.read_text()) == _recipe(name)


def _note_done(workdir: Path, name: str) -> None:
    (workdir / FINISHED).write_text(json.dumps(_recipe(name), indent=2) + "\n")


def _recipe(name: str) -> list[str]:
    """The commands that lead to a case."""
    case = CASES[name]
    return [*(line for b in case.before for line in _recipe(b)), case.arguments]


def steps(workdir: Path) -> list[int]:
    """Those with a checkpoint."""
    return sorted(int(p.name) for p in (workdir / "checkpoints").glob("*") if p.name.isdigit())


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of `metrics.jsonl`, less what is measured; a last line that is being written is left out."""
    text = path.read_text() if path.exists() else ""
    rows = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [{k: v for k, v in row.items() if k not in MEASURED} for row in rows]


def read_parameters(folder: Path, only: tuple[str, ...] = ()) -> dict[str, str]:
    """{path: digest} of the arrays that one of our Orbax folders holds, of all or of some branches."""
    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.restore(folder.absolute())["tree"]
    tree = {k: v for k, v in tree.items() if not only or k in only}

    def digest(leaf) -> str:
        array = np.ascontiguousarray(leaf)
        head = f"{array.dtype} {array.shape} ".encode()
        return hashlib.sha256(head + array.tobytes()).hexdigest()

    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(k, simple=True, separator="/"): digest(v) for k, v in leaves}


def differences(old: Any, new: Any, path: str = "") -> Iterator[tuple[str, bool]]:
    """(what differs, whether that is allowed: something new in a dict) of two trees of parsed JSON."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in [*old, *(k for k in new if k not in old)]:
            below = f"{path}.{key}" if path else str(key)
            if key not in old:
                yield below, True
            elif key not in new:
                yield f"{below} is missing", False
            else:
                yield from differences(old[key], new[key], below)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, (a, b) in enumerate(zip(old, new, strict=True)):
            yield from differences(a, b, f"{path}[{index}]")
    elif isinstance(old, list) and isinstance(new, list):
        yield f"{path or 'rows'}: {len(old)} before, {len(new)} now", False
    elif old != new and not (old != old and new != new):  # NaN is the same as NaN
        yield f"{path}: {old!r} before, {new!r} now", False


def compare_masks(old: Path, new: Path) -> Iterator[tuple[str, bool]]:
    """As `differences`, of the masks in two folders."""
    there, here = ({p.name: p for p in folder.glob("*.png")} for folder in (old, new))
    if not there:
        yield "no masks before", False
    trained = tuple(json.loads((old.parent / "model.json").read_text())["size"])
    for name in sorted(there):
        if name not in here:
            yield f"{name} is missing", False
            continue
        a, b = (np.asarray(Image.open(files[name])) for files in (there, here))
        if a.shape != b.shape or a.dtype != b.dtype:
            yield f"{name}: {a.dtype}{a.shape} before, {b.dtype}{b.shape} now", False
        elif (share := float((a == b).mean())) < 1:
            enough = AGREEMENT if a.shape != trained else 1
            yield f"{name}: {share:.2%} of the pixels agree", share >= enough


def compare(what: str, old: Path, new: Path) -> tuple[str, bool]:
    """(cell of the table, whether all is the same) of one of the things that a `Case` compares."""
    note = ""
    if what == "masks":
        found = list(compare_masks(old / "masks", new / "masks"))
        note = f" ({len(list((old / 'masks').glob('*.png')))})"
    elif what in ("parameters", "frozen"):
        a, b = (_saved(folder, what) for folder in (old, new))
        # The names alone, without digests; and there may be no array more either.
        found = [(text.split(":")[0], False) for text, _ in differences(a, b)]
        note = f" ({len(a)} arrays, {hashlib.sha256(str(sorted(a.items())).encode()).hexdigest()[:12]})"
    elif what == "metrics.jsonl":
        a, b = read_rows(old / what), read_rows(new / what)
        found, note = list(differences(a, b)), f" ({len(a)} rows)"
    else:
        found = list(differences(*(json.loads((f / what).read_text()) for f in (old, new))))
    differing = [text for text, allowed in found if not allowed]
    added = sorted({text.rpartition("].")[2] for text, allowed in found if allowed})
    cell = _first(differing) if differing else f"same{note}"
    label = "allowed" if what == "masks" else "new"
    return cell + (f"; {label}: {_first(added)}" if added else ""), not differing


def _saved(workdir: Path, what: str) -> dict[str, str]:
    if what == "frozen":
        return read_parameters(workdir / "frozen") if (workdir / "frozen").exists() else {}
    if not steps(workdir):
        raise FileNotFoundError(f"no checkpoint in {workdir}")
    last = workdir / "checkpoints" / str(max(steps(workdir))) / "default"
    return read_parameters(last, ("params", "average", "extra"))


def _first(texts: list[str], count: int = 3) -> str:
    more = f", and {len(texts) - count} more" if len(texts) > count else ""
    return ", ".join(texts[:count]) + more


def make_inputs(shared: Path, folder: Path) -> None:
    """Photographs of several sizes, to be predicted."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (source, (height, width)) in INPUTS.items():
        first = min((shared / "data" / source).iterdir())
        with Image.open(first) as image:
            image.convert("RGB").resize((width, height)).save(folder / f"{name}.png")


def chosen(names: list[str]) -> list[str]:
    """The cases of these names and those before them, in order; all for none."""
    if unknown := set(names) - CASES.keys():
        sys.exit(f"error: no case {', '.join(sorted(unknown))}; allowed: {', '.join(CASES)}")
    wanted = set(names or CASES)
    for name in reversed(CASES):  # what a case needs stands above it
        if name in wanted:
            wanted |= set(CASES[name].before)
    return [name for name in CASES if name in wanted]


def results(
    bench: Bench, names: list[str], sides: list[str]
) -> Iterator[tuple[str, str, str, str, bool]]:
    """(side, case, what, result, whether it is the same), each as soon as it is known."""
    worked: set[tuple[str, str]] = set()

    def attempt(side: str, name: str, run: Callable[[], None]) -> str:
        """Runs a case; returns why that failed, or ""."""
        begin = time.monotonic()
        if bad := [other for other in CASES[name].before if (side, other) not in worked]:
            return f"not run without {', '.join(bad)}"
        try:
            run()
        except (Failed, OSError) as error:
            return str(error)
        worked.add((side, name))
        print(f"{side} {name}: {time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True)
        return ""

    for name in names:
        case = CASES[name]
        if failed := attempt("old", name, partial(bench.run_old, name)):
            yield "old", name, "", failed, False
            continue
        for side in sides if bench.new else ():
            compared = case.compared
            if side == "continued":
                if not case.stopped:
                    continue
                failed = attempt(side, name, partial(bench.run_continued, name))
            else:
                failed = attempt(side, name, partial(bench.run, name, side))
                if side == "mixed" and compared == TRAINED:
                    compared = ("eval.json",)  # the rest is a copy
            if failed:
                yield side, name, "", failed, False
                continue
            old, new = (bench.root / s / name for s in ("old", side))
            for what in compared:
                if what == "frozen" and not (old / what).exists() and not (new / what).exists():
                    continue
                try:
                    yield side, name, what, *compare(what, old, new)
                except (OSError, ValueError, KeyError) as error:
                    message = (str(error).strip() or repr(error)).splitlines()[0]
                    yield side, name, what, f"cannot be read: {message}", False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--old", required=True, help="checkout of the version before")
    parser.add_argument(
        "--new", default="", help="checkout after; without it the old one is run alone"
    )
    parser.add_argument(
        "--new-command", default="", help="starts the new version, as `jaxseg` does"
    )
    parser.add_argument("--shared", required=True, help="folder with data/ and weights/")
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--only", default="", help=f"cases, of {','.join(CASES)}")
    parser.add_argument("--sides", default=",".join(SIDES), help="what is compared with old")
    parser.add_argument("--python", default=sys.executable)
    args = parser.parse_args()
    names, sides = chosen([n for n in args.only.split(",") if n]), args.sides.split(",")
    if unknown := set(sides) - set(SIDES):
        sys.exit(f"error: no side {', '.join(sorted(unknown))}; allowed: {', '.join(SIDES)}")
    # As given, not resolved: the python of a virtual environment is a link to another.
    command = (os.path.abspath(args.python) if os.sep in args.python else args.python, "main.py")
    new = tuple(shlex.split(args.new_command)) or command
    bench = Bench(
        Path(args.workdir).resolve(),
        Path(args.shared).resolve(),
        Version(Path(args.old).resolve(), command),
        Version(Path(args.new).resolve(), new) if args.new else None,
    )
    # Where arrays are compared; the runs are their own processes and take the devices that there are.
    jax.config.update("jax_platforms", "cpu")
    make_inputs(bench.shared, bench.root / "inputs")
    print("| side | case | compared | result |\n|---|---|---|---|", flush=True)
    compared = differing = 0
    for side, name, what, cell, same in results(bench, names, sides):
        compared, differing = compared + 1, differing + (not same)
        cell = cell.replace("|", "\\|")
        print(f"| {side} | {name} | {what} | {cell if same else f'**{cell}**'} |", flush=True)
    if bench.new:
        print(f"\n{compared - differing} of {compared} are the same.")
    sys.exit(bool(differing))


if __name__ == "__main__":
    main()
