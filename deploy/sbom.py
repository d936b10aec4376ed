"""Add to a CycloneDX document of the Python packages what else the image holds: Debian's packages, Marina itself.

python3 sbom.py PYTHON_PACKAGES.json MARINA_VERSION > sbom.json
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import quote


def debian_packages() -> list[dict[str, Any]]:
    """One component per installed package, sorted by name."""
    listed = subprocess.run(
        ["dpkg-query", "--show", "--showformat", "${Package}\t${Version}\t${Architecture}\n"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    components = []
    for line in sorted(listed.splitlines()):
        name, version, architecture = line.split("\t")
        purl = f"pkg:deb/debian/{name}@{quote(version, safe='')}?arch={architecture}"
        components.append({"type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl})
    return components


def main() -> None:
    document = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    document["components"] = [*document.get("components", []), *debian_packages()]
    document.setdefault("metadata", {})["component"] = {
        "type": "container",
        "bom-ref": "marina",
        "name": "marina",
        "version": sys.argv[2],
    }
    json.dump(document, sys.stdout, indent=1, sort_keys=True)


if __name__ == "__main__":
    main()
