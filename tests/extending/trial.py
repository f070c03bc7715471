"""What a thing that was added goes through, in one process of its tree: `python trial.py '{"name": ...}'`."""

import json
import sys
from pathlib import Path

import pytest

import jaxseg
from jaxseg import cli


def trial(
    name: str, workdir: str, runs: list[list[str]], inputs: str, tests: list[str], listed: str
) -> None:
    """It stands in the help, trains by name, goes on, is evaluated, predicts, and keeps its contract.

    Args:
      name: of the thing in configs.
      workdir: of its runs, which get a folder each.
      runs: arguments of trainings.
      inputs: images to predict.
      tests: of everything that is listed, where it is called `listed`.
    """
    assert Path(jaxseg.__file__).is_relative_to(Path.cwd())
    assert name in cli.help_text().replace(",", " ").split()
    for number, arguments in enumerate(runs):
        folder = Path(workdir) / str(number)
        where = f"--workdir={folder}"
        for steps in (2, 4):
            cli.main([where, *arguments, f"--config.train.steps={steps}"])
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4]
        scores = (folder / "eval.json").read_bytes()
        assert json.loads(scores)["step"] == 4
        (folder / "eval.json").unlink()
        cli.main([where, "--mode=eval"])
        assert (folder / "eval.json").read_bytes() == scores
        outputs = folder / "predicted"
        cli.main([where, "--mode=predict", f"--inputs={inputs}", f"--outputs={outputs}"])
        assert any(outputs.iterdir())
    sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-k", listed, *tests]))


if __name__ == "__main__":
    trial(**json.loads(sys.argv[1]))
