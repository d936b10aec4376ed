"""`marina train --processes N`: torchrun's agent as a child, which starts the processes and starts them all again from
the last checkpoint when one dies.

The processes run this module: each trains its part, and the first one tells of its progress in lines of JSON and leaves
what came out in a file. An error of the recipe or the data is an outcome, not a death: it would come again.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections import deque
from pathlib import Path
from typing import Any

import handlerlib
from handlerlib.errors import MarinaError
from training import errors, files, lifeline, relay
from training.config import Recipe, parse
from training.errors import Interrupted, PeerFailed, ProcessDied, RecipeError
from training.pipeline import Trained
from training.progress import Report, Step

_STOP_SECONDS = 60.0
"""From Ctrl-C to the last checkpoint, at most."""
_LOG_LINES = 200
_OUTCOMES = "outcome-*.json"


def train(
    recipe: Recipe,
    *,
    processes: int,
    runs: Path,
    artifacts: Path,
    report: Report,
    again: bool = False,
    restarts: int = 3,
) -> Trained:
    """`pipeline.train` in several processes on this machine. Raises the same, and ProcessDied when processes died more
    than `restarts` times."""
    if processes < 1 or restarts < 0:
        raise RecipeError(
            f"{processes} processes with {restarts} restarts",
            remedy="give at least one process, and 0 restarts or more",
        )
    with tempfile.TemporaryDirectory(prefix="marina-") as name:
        folder = Path(name)
        job = {
            "recipe": recipe.model_dump(mode="json"),
            "runs": str(runs.resolve()),
            "artifacts": str(artifacts.resolve()),
            "again": again,
        }
        (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
        log = _run(folder, processes, restarts, report)
        return _outcome(folder, restarts, log)


def _run(folder: Path, processes: int, restarts: int, report: Report) -> list[str]:
    """Run the processes to their end; the last lines that they wrote for people. Raises Interrupted when they were
    stopped and did not say how far they came."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"),
        *(f"--max-restarts={restarts}", "--local-addr=127.0.0.1", "-m", __name__, str(folder)),
    ]
    paths = [str(Path(package.__file__ or "").parents[1]) for package in (handlerlib, errors)]
    environment = {
        # Otherwise gloo asks for this machine's name, which not every machine knows.
        "GLOO_SOCKET_IFNAME": "lo",
        # Otherwise restarted processes meet in the store of those before them, and may read where these were to be found.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "OMP_NUM_THREADS": "1",
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
    }
    lines: deque[str] = deque(maxlen=_LOG_LINES)
    with (folder / "errors.log").open("w+", encoding="utf-8", errors="replace") as written, lifeline.held() as pipe:
        # A session of its own: Ctrl-C reaches torchrun once, from here.
        child = subprocess.Popen(
            command,
            env=environment,
            stdin=pipe,
            stdout=subprocess.PIPE,
            stderr=written,
            text=True,
            start_new_session=True,
        )
        try:
            assert child.stdout is not None
            for line in child.stdout:
                step = _step(line)
                if step is None:
                    lines.append(line.rstrip())
                else:
                    report(step)
            child.wait()
        except KeyboardInterrupt:
            _stop(child, signal.SIGINT)
            if not list(folder.glob(_OUTCOMES)):
                raise Interrupted("stopped; what was saved is kept") from None
        finally:
            _stop(child, signal.SIGTERM)
            if child.stdout is not None:
                child.stdout.close()
        written.seek(0)
        lines += deque((line.rstrip() for line in written), maxlen=_LOG_LINES)
    return list(lines)


def _stop(child: subprocess.Popen[str], number: signal.Signals) -> None:
    """Ask torchrun, which passes it on, to stop the processes: they save first. They lie in sessions of their own, so
    that killing torchrun would leave them behind; it kills those that do not listen."""
    if child.poll() is not None:
        return
    child.send_signal(number)
    try:
        child.communicate(timeout=_STOP_SECONDS)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        child.kill()
        child.wait()


def _step(line: str) -> Step | None:
    try:
        phase, done, total, note = json.loads(line)["step"]
        return Step(str(phase), int(done), int(total), str(note))
    except (ValueError, TypeError, KeyError):
        return None


def _outcome(folder: Path, restarts: int, log: list[str]) -> Trained:
    """What the first process left, or another one where it left nothing."""
    for path in sorted(folder.glob(_OUTCOMES)):
        told: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if "error" in told:
            raise relay.error_of(told)
        return Trained(Path(told["run"]), Path(told["artifact"]), told["metrics"], told["reused"])
    raise ProcessDied(restarts, "\n".join(log))


# ---------------------------------------------------------------------------------------------------- in each process


def work(folder: Path) -> None:
    """One process: train, and leave the outcome in `folder`."""
    from training import pipeline

    lifeline.follow()
    rank = int(os.environ["RANK"])
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    try:
        trained = pipeline.train(
            parse(job["recipe"], where="the recipe"),
            runs=Path(job["runs"]),
            artifacts=Path(job["artifacts"]),
            report=_tell,
            again=job["again"],
        )
    except PeerFailed:
        return
    except MarinaError as error:
        told: dict[str, Any] = relay.fields(error)
    else:
        told = {"run": str(trained.run), "artifact": str(trained.artifact), "metrics": trained.metrics}
        told |= {"reused": trained.reused}
    files.write_text(folder / f"outcome-{rank:03}.json", json.dumps(told))


def _tell(step: Step) -> None:
    try:
        sys.stdout.write(json.dumps({"step": [step.phase, step.done, step.total, step.note]}) + "\n")
        sys.stdout.flush()
    except BrokenPipeError:  # `marina train` was killed: what is saved now counts, not what is told
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


if __name__ == "__main__":
    work(Path(sys.argv[1]))
