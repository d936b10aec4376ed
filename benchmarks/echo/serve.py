"""Marina's supervisor around the echo archive, as `marina serve` runs it: python -m benchmarks.echo.serve JSON.

A program of its own, because an archive without weights and golden samples is one that `marina serve` refuses.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from marina.server import ServedModel, serve
from marina.settings import ServeSettings


def main(text: str) -> None:
    """`text` holds `settings` of ServeSettings, `archive`, and `model_config`, the archive's model-config.yaml."""
    wish = json.loads(text)
    model = ServedModel(
        name="echo", version="1.0", archive_file=Path(wish["archive"]), default=True, config=wish["model_config"]
    )
    serve([model], ServeSettings(**wish["settings"]))


if __name__ == "__main__":
    main(sys.argv[1])
