"""The command line: one subcommand per step of a model's way. The only place that prints results and sets exit codes.

Exit codes: 0 done; 1 unexpected failure; 2 wrong usage; 3 recipe or configuration; 4 data; 5 artifact or archive refused;
6 the server cannot start or died; 7 the server is unreachable or refused a request; 130 interrupted.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from handlerlib.errors import MarinaError
from marina import archive, compose_cli, rollout_cli, serving, store
from marina import verify as verification
from marina.client import Answer, InferenceClient
from marina.errors import ArchiveError, ClientError
from marina.golden import prove
from marina.home import Home, find_home
from marina.progress import ProgressReporter
from marina.screen import Screen
from marina.server import ServedModel, Server
from marina.settings import ServeSettings

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

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=C", help="Override one key of the recipe; repeatable.")
]
InferenceUrl = Annotated[str, typer.Option("--url", envvar="MARINA_URL", help="Inference address.")]


OTHER_VARIABLES = ("MARINA_HOME", "MARINA_URL", "MARINA_MANAGEMENT_URL")
"""MARINA_* variables that are not settings of `serve`."""


for more in (compose_cli, rollout_cli):
    more.register(app)


@app.callback()
def _common() -> None:
    """Options of the program itself are options of its commands."""


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A recipe's short name (digits, folder, ...) or path.")],
    overrides: Overrides = None,
    again: Annotated[bool, typer.Option("--again", help="Train even when the same run is already finished.")] = False,
    as_json: Json = False,
) -> None:
    """Train a recipe, evaluate it on the test split and export the artifact. Ctrl-C, then the same command, resumes."""
    from training import config

    screen, home = Screen(as_json), find_home()
    resolved = config.load_recipe(recipe, overrides or [])

    from training import pipeline  # after the recipe is known to be good: importing torch takes seconds

    with ProgressReporter(screen.err) as report:
        trained = pipeline.train(resolved, runs=home.runs, artifacts=home.artifacts, report=report, again=again)
    screen.result(
        {
            "run": str(trained.run),
            "artifact": str(trained.artifact),
            "metrics": trained.metrics,
            "reused": trained.reused,
        }
    )
    _show_metrics(screen, trained.metrics, "already trained, nothing to do" if trained.reused else "test split")
    screen.say(f"run       {_shown(trained.run)}")
    screen.say(f"artifact  {_shown(trained.artifact)}")
    screen.say(f"next      marina pack {_shown(trained.artifact)}")


@app.command()
def evaluate(
    target: Annotated[str, typer.Argument(help="A run or artifact: a folder, NAME or NAME:VERSION.")],
    root: Annotated[
        str | None, typer.Option("--root", help="Where the data lies, if not where it was in training.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Score a run or an artifact on its test split again."""
    from training import pipeline

    screen, home = Screen(as_json), find_home()
    with ProgressReporter(screen.err) as report:
        found = pipeline.evaluate(_run_or_artifact(home, target), report=report, root=root)
    per_class = [dataclasses.asdict(row) for row in found.per_class]
    screen.result(
        {"metrics": found.metrics, "labels": found.labels, "per_class": per_class, "confusion": found.confusion}
    )
    _show_metrics(screen, found.metrics, "test split")
    screen.table(list(per_class[0]), [list(row.values()) for row in per_class])


@app.command()
def export(
    run: Annotated[str, typer.Argument(help="A finished run: a folder, or its name under runs/.")],
    as_json: Json = False,
) -> None:
    """Write the artifact of a finished run again."""
    from training import pipeline

    screen, home = Screen(as_json), find_home()
    folder = Path(run) if Path(run).is_dir() else home.runs / run
    artifact = pipeline.export(folder, artifacts=home.artifacts)
    screen.result({"artifact": str(artifact)})
    screen.say(f"artifact  {_shown(artifact)}")


@app.command()
def pack(
    artifact: Annotated[str, typer.Argument(help="An artifact: a folder, NAME or NAME:VERSION.")],
    destination: Annotated[
        Path | None, typer.Option("--store", help="Where to write the archive (model_store/ by default).")
    ] = None,
    as_json: Json = False,
) -> None:
    """Pack an artifact into model_store/NAME-VERSION.mar, byte for byte reproducible."""
    screen, home = Screen(as_json), find_home()
    target = destination or home.store
    packed = archive.pack(_artifact(home, artifact), handlers=home.handlers, destination=target)
    store.publish(target, packed)
    screen.result(_archive_fields(packed))
    screen.say(f"archive  {_shown(packed.path)}")
    screen.say(f"sha256   {packed.sha256}")
    screen.say(f"size     {packed.size / 1e6:.2f} MB")


@app.command()
def verify(
    mar: Annotated[str, typer.Argument(help="An archive: a file, NAME or NAME:VERSION of model_store/.")],
    python: Annotated[str, typer.Option("--python", help="The interpreter that will serve it.")] = sys.executable,
    publish: Annotated[bool, typer.Option("--publish", help="Add it to its folder's index when it passes.")] = False,
    as_json: Json = False,
) -> None:
    """Check an archive without trusting it: safe, unchanged, loads in TorchServe, answers as it was exported."""
    screen, home = Screen(as_json), find_home()
    path = _archive_path(home, mar)
    report = verification.verify(path, python=python)
    screen.result({"archive": str(path), "sha256": report.sha256, "passed": report.passed} | _check_fields(report))
    _show_report(screen, report)
    if not report.passed:
        error = ArchiveError(
            f"{_shown(path)} is refused: {len(report.findings)} finding{'s' if len(report.findings) != 1 else ''}, "
            f"the first: {report.findings[0].where}: {report.findings[0].message}",
            remedy=report.findings[0].remedy,
        )
        _end_with(screen, error)
    if publish:
        store.publish(path.parent, verification.identify(path, report))


@app.command()
def inspect(
    mar: Annotated[str, typer.Argument(help="An archive: a file, NAME or NAME:VERSION of model_store/.")],
    as_json: Json = False,
) -> None:
    """Show what is inside an archive, from the file alone: nothing is unpacked or run."""
    screen, home = Screen(as_json), find_home()
    found = verification.inspect(_archive_path(home, mar))
    screen.result(found)
    _show_archive(screen, found)


@app.command()
def serve(
    names: Annotated[
        list[str] | None, typer.Argument(help="NAME (newest version) or NAME:VERSION; all names when none is given.")
    ] = None,
    port: Annotated[int | None, typer.Option("--port", help="Inference port (8080).")] = None,
    management_port: Annotated[int | None, typer.Option(help="Management port (8081).")] = None,
    metrics_port: Annotated[int | None, typer.Option(help="Metrics port (8082).")] = None,
    supervisor_port: Annotated[
        int | None, typer.Option(help="Port of /livez, /readyz and /metrics (8083); 0 switches it off.")
    ] = None,
    host: Annotated[str | None, typer.Option(help="Inference address (127.0.0.1).")] = None,
    expose: Annotated[
        str | None, typer.Option(help="Interfaces that may listen beyond loopback, e.g. inference,supervisor.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or gpu.")] = None,
    config: Annotated[Path | None, typer.Option(help="Another config.properties.")] = None,
    model_store: Annotated[Path | None, typer.Option("--store", help="Another model store.")] = None,
    startup_timeout: Annotated[float | None, typer.Option(help="Seconds until all must be ready (300).")] = None,
    drain_seconds: Annotated[float | None, typer.Option(help="Seconds for accepted requests at a stop (30).")] = None,
    log_file: Annotated[Path | None, typer.Option(help="Append the log here instead of standard error.")] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.")] = None,
    log_requests: Annotated[
        bool | None, typer.Option("--log-requests/--no-log-requests", help="One JSON line per request (on).")
    ] = None,
    as_json: Json = False,
) -> None:
    """Serve what is in model_store/ until Ctrl-C: ready only when every worker is and has answered its golden samples."""
    screen, home = Screen(as_json), find_home()
    options = {
        "config": config or home.config,
        "inference_port": port,
        "management_port": management_port,
        "metrics_port": metrics_port,
        "supervisor_port": supervisor_port,
        "inference_host": host,
        "expose": expose,
        "device": device,
        "startup_timeout": startup_timeout,
        "drain_seconds": drain_seconds,
        "log_file": log_file,
        "log_level": log_level,
        "log_requests": log_requests,
    }
    settings = ServeSettings.load(options, os.environ, other_variables=OTHER_VARIABLES)
    folder = model_store or home.store
    models = store.to_serve(store.select(folder, names)) if names else _all_models(screen, folder)
    server = Server(models, settings, prove=prove, expected=serving.Following(folder, models))

    def announce(line: str) -> None:
        screen.result({"ready": server.inference_url, "models": [f"{model.name}:{model.version}" for model in models]})
        screen.say(line)

    server.serve_forever(announce)


@app.command()
def predict(
    name: Annotated[str, typer.Argument(help="Model name.")],
    images: Annotated[list[Path], typer.Argument(help="Image files.")],
    url: InferenceUrl = "http://127.0.0.1:8080",
    version: Annotated[str | None, typer.Option("--version", help="Model version (its default one otherwise).")] = None,
    top_k: Annotated[int | None, typer.Option("--top-k", help="Labels per image.")] = None,
    as_json: Json = False,
) -> None:
    """Ask a served model about image files. A bad file is reported and does not stop the others."""
    screen = Screen(as_json)
    client = InferenceClient(url)
    results = [_predict_one(client, name, path, version, top_k) for path in images]
    screen.result({"model": name, "results": results})
    screen.table(("image", "label", "probability"), _prediction_rows(results))
    failed = [result for result in results if "error" in result]
    if failed:
        error = ClientError(
            f"{len(failed)} of {len(results)} images got no answer, the first: {failed[0]['image']}: {failed[0]['error']}",
            remedy=failed[0]["remedy"] or "see the error of each image",
        )
        _end_with(screen, error)


@app.command()
def demo(as_json: Json = False) -> None:
    """Train, pack, verify and serve the digits; send every test image over HTTP; compare; stop."""
    from marina import demo as demonstration

    screen, home = Screen(as_json), find_home()
    with ProgressReporter(screen.err) as report:
        found = demonstration.run(home, report, screen.say)
    first, median = found.latency
    screen.result(
        _archive_fields(found.archive)
        | {"test_accuracy": found.test_accuracy, "http_accuracy": found.http_accuracy, "images": len(found.answers)}
        | {"first_request_seconds": first, "median_request_seconds": median, "seconds": found.seconds}
    )
    screen.table(
        ("image", "true", "predicted", "probability", "latency ms"),
        [
            (item.image, item.true, item.predicted, f"{item.probability:.4f}", f"{item.seconds * 1e3:.1f}")
            for item in found.sample
        ],
    )
    screen.say(f"first request {first * 1e3:.1f} ms, median of the others {median * 1e3:.1f} ms")
    screen.say(
        f"accuracy over HTTP {found.http_accuracy:.6f} = accuracy in training's evaluation {found.test_accuracy:.6f} "
        f"on {len(found.answers)} test images"
    )


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


def _end_with(screen: Screen, error: MarinaError) -> NoReturn:
    """Fail after the result was shown: --json prints one object only, and it already holds what failed."""
    screen.explain(error)
    raise typer.Exit(error.exit_code)


def _show_metrics(screen: Screen, metrics: dict[str, float], title: str) -> None:
    shown = [(name, value) for name, value in metrics.items() if "/" not in name]
    screen.table(("metric", "value"), shown, title=title)


def _show_report(screen: Screen, report: verification.Report) -> None:
    screen.table(
        ("check", "result", "seconds"),
        [
            (outcome.check, "skipped" if outcome.skipped else "REFUSED" if outcome.findings else "ok", outcome.seconds)
            for outcome in report.outcomes
        ],
        title=str(_shown(report.path)),
    )
    for finding in report.findings:
        screen.say(f"{finding.where}: {finding.message}\n  fix: {finding.remedy}")


def _show_archive(screen: Screen, found: dict[str, Any]) -> None:
    spec = found["spec"]
    screen.table(
        ("", f"{spec['name']} {spec['version']}"),
        [
            ("archive", _shown(Path(found["archive"]))),
            ("sha256", found["sha256"]),
            ("handler", spec["handler"]),
            ("architecture", json.dumps(spec["architecture"])),
            ("preprocess", json.dumps(spec["preprocess"])),
            ("labels", ", ".join(spec["labels"])),
            ("limits", json.dumps(spec["limits"])),
            ("golden", f"{len(spec['golden']['samples'])} samples, tolerance {spec['golden']['tolerance']:g}"),
            ("metrics", json.dumps(found["build"]["metrics"])),
            ("provenance", json.dumps(found["build"]["provenance"])),
            ("built with", json.dumps(found["build"]["built_with"])),
        ],
    )
    screen.table(("file", "bytes"), sorted(found["files"].items()))
    screen.say(found["config"])


def _all_models(screen: Screen, folder: Path) -> list[ServedModel]:
    """What rollouts left to be served, and the newest version of every other name."""
    known = serving.at_start(folder) or []
    newest = store.to_serve(store.select(folder, []))
    deployed = {model.name: model.version for model in known if model.default}
    for model in newest:
        if store.version_key(model.version) > store.version_key(deployed.get(model.name, model.version)):
            screen.err.print(
                f"note: {model.name} {deployed[model.name]} was deployed and is served; "
                f"{model.version} is newer: marina deploy {model.name}",
                markup=False,
                highlight=False,
            )
    return [*known, *(model for model in newest if model.name not in deployed)]


def _predict_one(
    client: InferenceClient, name: str, path: Path, version: str | None, top_k: int | None
) -> dict[str, Any]:
    try:
        answer = client.predict(name, path.read_bytes(), version=version, top_k=top_k)
    except OSError as error:
        return {"image": str(path), "error": f"cannot be read: {error.strerror}", "remedy": "check the path"}
    except ClientError as error:
        return {"image": str(path), "error": str(error), "remedy": error.remedy}
    return {"image": str(path), **_answer_fields(answer)}


def _answer_fields(answer: Answer) -> dict[str, Any]:
    labels = [dataclasses.asdict(label) for label in answer.predictions[0]]
    return {"version": answer.version, "request_id": answer.request_id, "labels": labels}


def _prediction_rows(results: list[dict[str, Any]]) -> list[tuple[object, ...]]:
    rows: list[tuple[object, ...]] = []
    for result in results:
        if "error" in result:
            rows.append((result["image"], result["error"], ""))
        for rank, label in enumerate(result.get("labels", ())):
            rows.append((result["image"] if rank == 0 else "", label["label"], f"{label['probability']:.4f}"))
    return rows


def _archive_fields(packed: archive.Archive) -> dict[str, Any]:
    return {
        "archive": str(packed.path),
        "name": packed.name,
        "version": packed.version,
        "sha256": packed.sha256,
        "bytes": packed.size,
    }


def _check_fields(report: verification.Report) -> dict[str, Any]:
    return {"checks": [dataclasses.asdict(outcome) for outcome in report.outcomes]}


def _artifact(home: Home, text: str) -> Path:
    """A folder, NAME (newest version) or NAME:VERSION below artifacts/. Raises ArchiveError."""
    if Path(text).is_dir():
        return Path(text)
    name, _, version = text.partition(":")
    versions = [path for path in (home.artifacts / name).glob("*") if archive.VERSION_PATTERN.fullmatch(path.name)]
    if version:
        versions = [path for path in versions if path.name == version]
    if not versions:
        raise ArchiveError(
            f"there is no artifact {text}", remedy="train one: marina train digits; artifacts lie in artifacts/"
        )
    return max(versions, key=lambda path: store.version_key(path.name))


def _run_or_artifact(home: Home, text: str) -> Path:
    if Path(text).is_dir():
        return Path(text)
    run = home.runs / text
    return run if run.is_dir() else _artifact(home, text)


def _archive_path(home: Home, text: str) -> Path:
    """A file, or NAME[:VERSION] in the store. Raises ArchiveError."""
    path = Path(text)
    if path.suffix == ".mar" or path.exists():
        return path
    return store.select(home.store, [text])[0].path


def _shown(path: Path) -> Path:
    """Relative to where the user stands, when that is shorter."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
