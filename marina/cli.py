"""The command line: one subcommand per step of a model's way. The only place that prints results and sets exit codes.

Exit codes: 0 done; 1 unexpected failure; 2 wrong usage; 3 recipe or configuration; 4 data; 5 artifact or archive refused;
6 the server cannot start or died; 7 the server is unreachable or refused a request; 130 interrupted.
"""

from __future__ import annotations

import sys

import typer

from handlerlib.errors import MarinaError
from marina import (
    archive_cli,
    bench_cli,
    compare_cli,
    compose_cli,
    compress_cli,
    doctor_cli,
    optimize_cli,
    rollout_cli,
    search_cli,
    serving_cli,
    training_cli,
    tune_cli,
)
from marina.screen import Screen

app = typer.Typer(
    name="marina",
    help="From labelled data to a verified TorchServe archive, served and kept healthy.",
    epilog=(
        "Exit codes: 0 done, 1 unexpected, 2 usage, 3 recipe or configuration, 4 data, 5 artifact or archive refused, "
        "6 server cannot start or died, 7 server unreachable or request refused, 130 interrupted."
    ),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


for commands in (
    training_cli,
    compare_cli,
    search_cli,
    archive_cli,
    serving_cli,
    rollout_cli,
    compose_cli,
    bench_cli,
    tune_cli,
    doctor_cli,
    compress_cli,
    optimize_cli,
):
    commands.register(app)


@app.callback()
def _common() -> None:
    """Options of the program itself are options of its commands."""


def main() -> None:
    """Run the command line; every error ends here, as one or two lines and an exit code."""
    try:
        app()
    except MarinaError as error:
        Screen("--json" in sys.argv).failure(error)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(1)
