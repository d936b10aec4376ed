"""What `marina serve` does, for tests of signals: python serve_program.py JSON with `settings` and `models`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from marina.errors import MarinaError
from marina.server import ServedModel, serve
from marina.settings import ServeSettings


def main(text: str) -> int:
    wish = json.loads(text)
    models = [ServedModel(**{**model, "archive_file": Path(model["archive_file"])}) for model in wish["models"]]
    try:
        reason = serve(models, ServeSettings(**wish["settings"]), announce=_say)
    except MarinaError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return error.exit_code
    _say(f"stopped by {reason}")
    return 0


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
