"""Trains, evaluates and applies segmenters: see README.md, or `python main.py --help`."""

import logging
import os
import sys
from pathlib import Path

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from jaxseg.huge_pages import restart_with_huge_pages

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Experiment, such as configs/pac_objseg.py."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.", required=True)
_MODES = ["train", "eval", "analyze", "predict", "compare", "export"]
_MODE = flags.DEFINE_enum("mode", "train", _MODES, "What to do.")
_INPUTS = flags.DEFINE_string("inputs", None, "predict: an image, a folder or a quoted glob.")
_OUTPUTS = flags.DEFINE_string(
    "outputs", None, "predict: the folder for masks; export: a .safetensors file."
)
_CLASSES = flags.DEFINE_list("classes", [], "predict: classes to write one by one; empty for all.")
_PROBABILITIES = flags.DEFINE_bool("probabilities", False, "predict: write the probabilities too.")
_WORKDIRS = flags.DEFINE_list(
    "workdirs", [], "compare: folders of the runs; --workdir gets the page."
)
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "Join the other processes of a TPU pod or GPU cluster (jax.distributed)."
)
# Only for clusters that jax.distributed does not know by itself.
_COORDINATOR = flags.DEFINE_string("coordinator", None, "host:port of process 0.")
_PROCESSES = flags.DEFINE_integer("processes", None, "How many processes there are.")
_PROCESS = flags.DEFINE_integer("process", None, "Which of them this is, from 0.")


def _parse(argv: list[str]) -> list[str]:
    """Parses the flags; a wrong config key or value ends the program with one clear line."""
    from jaxseg import config as checks

    try:
        # The config alone first, so that its overrides can be checked against it.
        overrides = [a for a in argv if a.startswith(("--config.", "-config."))]
        rest = [a for a in argv if a not in overrides]
        for argument, following in zip(rest, [*rest[1:], ""], strict=True):
            name, equals, value = argument.lstrip("-").partition("=")
            value = value if equals else following
            file = value.split(":")[0]
            if argument.startswith("-") and name == "config" and not Path(file).is_file():
                here = ", ".join(str(f) for f in sorted(Path("configs").glob("*.py")))
                raise ValueError(f"--config={value}: there is no file {file!r}; here are: {here}")
        base = flags.FlagValues()
        holder = config_flags.DEFINE_config_file("config", None, flag_values=base, sys_argv=rest)
        base(rest, known_only=True)
        if holder.value is not None:
            checks.check_overrides(overrides, holder.value)
        elif overrides:
            raise ValueError(f"{overrides[0]} needs --config=configs/FILE.py as well")
        return flags.FLAGS(argv)
    except (flags.Error, ValueError, OSError) as error:
        # A config file that raises is reported with its traceback: its last line says what is wrong.
        message = str(error).strip()
        message = message.splitlines()[-1] if "Traceback" in message else message
        sys.exit(f"error: {message.removeprefix('ValueError: ')}")


def _log_to_terminal() -> None:
    """Shows warnings and our own messages, without the chatter of absl (Orbax, Grain)."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", force=True)
    # Only now: as long as absl's handler is the root's, this would set the root's level.
    absl_logging.set_verbosity(absl_logging.ERROR)
    logging.getLogger("jaxseg").setLevel(logging.INFO)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        sys.exit(f"error: unexpected argument {argv[1]!r}; options begin with --")
    if not _WORKDIR.value:
        sys.exit("error: --workdir= is empty; give the folder of the run")
    _log_to_terminal()
    # Only here, since a new start repeats every import before it.
    import jax

    if _DISTRIBUTED.value:
        jax.distributed.initialize(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
    from jaxseg import modes

    def expanded(path: str | None) -> str | None:
        """With ~ as the home folder: shells leave it alone behind an = sign."""
        return path and os.path.expanduser(path)

    try:
        modes.main(
            _MODE.value,
            config=_CONFIG.value,
            overrides=flags.FLAGS["config"].override_values if _CONFIG.value is not None else {},
            workdir=Path(expanded(_WORKDIR.value)),
            inputs=expanded(_INPUTS.value),
            outputs=expanded(_OUTPUTS.value),
            classes=_CLASSES.value,
            probabilities=_PROBABILITIES.value,
            workdirs=[expanded(folder) for folder in _WORKDIRS.value],
        )
    except modes.USER_ERRORS as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    restart_with_huge_pages(__file__)
    app.run(main, flags_parser=_parse)
