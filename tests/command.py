"""Commands in this process: what a test asks of the command line without the seconds of a new start."""

import pytest

from jaxseg import cli


def run_here(*arguments: str) -> str | None:
    """Runs a command and returns the error that it ends with; None where it ends well."""
    with pytest.MonkeyPatch.context() as patch:
        # It would take the log from pytest.
        patch.setattr(cli, "_log_to_terminal", lambda: None)
        try:
            cli.main(arguments)
        except SystemExit as end:
            return end.code
    return None
