"""The command line: one subcommand per step of a model's way. The only place that prints results and sets exit codes.

Exit codes: 0 done; 1 unexpected failure; 2 wrong usage; 3 recipe or configuration; 4 data; 5 artifact or archive refused;
6 the server cannot start or died; 7 the server is unreachable or refused a request; 130 interrupted.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, cast

import typer
from typer.core import TyperGroup

from handlerlib.errors import MarinaError
from marina import (
    archive_cli,
    bench_cli,
    compare_cli,
    compose_cli,
    compress_cli,
    doctor_cli,
    key_cli,
    optimize_cli,
    rollout_cli,
    search_cli,
    serving_cli,
    training_cli,
    tune_cli,
)
from marina.errors import ConfigError, Interrupted, UsageError
from marina.screen import Screen

_WrongUsage = cast("type[Exception]", typer.BadParameter.__base__)
"""What typer raises for any wrong usage; where that class comes from differs between its versions."""
_REMEDIES = {
    errno.ENOENT: "give a path that exists",
    errno.EISDIR: "give the path of a file",
    errno.ENOTDIR: "give the path of a folder",
    errno.EEXIST: "give another path, or move away what is there",
    errno.ENOSPC: "make room on that disk",
    errno.EDQUOT: "make room within the quota",
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "make it accessible to this user, or give another path"),
}


class _Commands(TyperGroup):
    """With --json, wrong usage and Ctrl-C end as one object too; for people typer's own panel is the best there is."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        with _told():
            return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        with _told():
            return super().invoke(ctx)


@contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted("interrupted", remedy="give the command again") from None
    except _WrongUsage as error:
        if not _as_json():
            raise
        context = getattr(error, "ctx", None)
        words = cast("Any", error).format_message()
        raise UsageError(words, remedy=f"see {context.command_path} --help" if context else "") from None


app = typer.Typer(
    name="marina",
    cls=_Commands,
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
    key_cli,
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
    except Interrupted as error:
        if _as_json():
            _fail(error)
        sys.exit(error.exit_code)
    except MarinaError as error:
        _fail(error)
    except KeyboardInterrupt:
        sys.exit(Interrupted.exit_code)
    except BrokenPipeError:
        sys.exit(1)
    except OSError as error:
        _fail(_in_words(error))


def _fail(error: MarinaError) -> NoReturn:
    Screen(_as_json()).failure(error)
    sys.exit(error.exit_code)


def _as_json() -> bool:
    return "--json" in sys.argv


def _in_words(error: OSError) -> ConfigError:
    """What the system refused: where, why, and what to do."""
    place = error.filename2 or error.filename
    where = f"{os.fsdecode(place)}: " if isinstance(place, str | bytes | os.PathLike) else ""
    remedy = _REMEDIES.get(error.errno or 0, "check that path and its disk" if where else "see the message")
    return ConfigError(f"{where}{error.strerror or str(error) or type(error).__name__}", remedy=remedy)
