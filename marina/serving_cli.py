"""The commands around one server on this machine: serve, predict, demo."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from marina import processes, serving, store
from marina.client import Answer, InferenceClient, read_key
from marina.errors import ClientError
from marina.golden import prove
from marina.home import find_home
from marina.progress import ProgressReporter
from marina.screen import Screen
from marina.server import ServedModel, Server
from marina.settings import OTHER_VARIABLES, ServeSettings

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
InferenceUrl = Annotated[str, typer.Option("--url", envvar="MARINA_URL", help="Inference address.")]


def register(app: typer.Typer) -> None:
    """Add the commands to the program."""
    for command in (serve, predict, demo):
        app.command()(command)


def serve(
    names: Annotated[
        list[str] | None, typer.Argument(help="NAME (newest version) or NAME:VERSION; all names when none is given.")
    ] = None,
    port: Annotated[int | None, typer.Option("--port", help="Inference port (8080).")] = None,
    management_port: Annotated[int | None, typer.Option(help="Management port (8081).")] = None,
    metrics_port: Annotated[int | None, typer.Option(help="Metrics port (8082).")] = None,
    supervisor_port: Annotated[
        int | None, typer.Option(help="Port of /livez, /readyz and /metrics (8083, or a free one); 0: none.")
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
        "supervisor_port": supervisor_port if supervisor_port is not None else _default_supervisor_port(screen),
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
    models = store.to_serve(store.select(folder, names)) if names else serving.at_start(folder)
    if not names:
        _tell_of_newer(screen, folder, models)
    server = Server(
        models, settings, prove=prove, expected=serving.Following(folder, models), alone=lambda: serving.scaling(folder)
    )

    announced = False

    def announce(line: str) -> None:
        nonlocal announced
        announced = True
        screen.result({"ready": server.inference_url, "models": [f"{model.name}:{model.version}" for model in models]})
        screen.say(line)

    if server.serve_forever(announce) == "SIGINT" and not announced:
        raise KeyboardInterrupt


def predict(
    name: Annotated[str, typer.Argument(help="Model name.")],
    files: Annotated[list[Path], typer.Argument(help="Files, each an image or a text as the model takes them.")],
    url: InferenceUrl = "http://127.0.0.1:8080",
    version: Annotated[str | None, typer.Option("--version", help="Model version (its default one otherwise).")] = None,
    top_k: Annotated[int | None, typer.Option("--top-k", help="Labels per file.")] = None,
    key_file: Annotated[
        Path | None,
        typer.Option("--key-file", envvar="MARINA_KEY_FILE", help="The gateway's key, e.g. secrets/inference.key."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Ask a served model about files of images or texts. A bad file is reported and does not stop the others."""
    screen = Screen(as_json)
    client = InferenceClient(url, key=None if key_file is None else read_key(key_file))
    results = [_predict_one(client, name, path, version, top_k) for path in files]
    screen.result({"model": name, "results": results})
    valued = any("values" in result for result in results)
    screen.table(("file", *(("target", "value") if valued else ("label", "probability"))), _prediction_rows(results))
    failed = [result for result in results if "error" in result]
    if failed:
        error = ClientError(
            f"{len(failed)} of {len(results)} files got no answer, the first: {failed[0]['file']}: {failed[0]['error']}",
            remedy=failed[0]["remedy"] or "see the error of each file",
        )
        screen.end_with(error)


def demo(as_json: Json = False) -> None:
    """Train, pack, verify and serve the digits; send every test image over HTTP; compare; stop."""
    from marina import demo as demonstration

    screen, home = Screen(as_json), find_home()
    with ProgressReporter(screen.err) as report:
        found = demonstration.run(home, report, screen.say)
    first, median = found.latency
    screen.result(
        found.archive.fields
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


def _default_supervisor_port(screen: Screen) -> int | None:
    """Another one where nobody chose and the default is taken: a second server asks for three ports, not for four."""
    usual = ServeSettings().supervisor_port
    if "MARINA_SUPERVISOR_PORT" in os.environ or processes.is_free("127.0.0.1", usual):
        return None
    (port,) = processes.free_ports(1)
    screen.note(f"port {usual} is taken: /livez, /readyz and /metrics are on {port}")
    return port


def _tell_of_newer(screen: Screen, folder: Path, models: Sequence[ServedModel]) -> None:
    """Say so when the store holds a newer version than the one that was deployed."""
    deployed = {model.name: model.version for model in models if model.default}
    for item in store.select(folder, []):
        if store.version_key(item.version) > store.version_key(deployed[item.name]):
            screen.note(
                f"{item.name} {deployed[item.name]} was deployed and is served; "
                f"{item.version} is newer: marina deploy {item.name}"
            )


def _predict_one(
    client: InferenceClient, name: str, path: Path, version: str | None, top_k: int | None
) -> dict[str, Any]:
    try:
        answer = client.predict(name, path.read_bytes(), version=version, top_k=top_k)
    except OSError as error:
        return {"file": str(path), "error": f"cannot be read: {error.strerror}", "remedy": "check the path"}
    except ClientError as error:
        return {"file": str(path), "error": str(error), "remedy": error.remedy}
    return {"file": str(path), **_answer_fields(answer)}


def _answer_fields(answer: Answer) -> dict[str, Any]:
    fields: dict[str, Any] = {"version": answer.version, "request_id": answer.request_id}
    found = answer.predictions[0]
    if answer.task == "regression":
        values = [{"target": one.label, "index": one.index, "value": one.probability} for one in found]
        return fields | {"task": answer.task, "values": values}
    labels = [{key: value for key, value in dataclasses.asdict(one).items() if value is not None} for one in found]
    return fields | ({} if answer.task == "multi-class" else {"task": answer.task}) | {"labels": labels}


def _prediction_rows(results: list[dict[str, Any]]) -> list[tuple[object, ...]]:
    rows: list[tuple[object, ...]] = []
    for result in results:
        if "error" in result:
            rows.append((result["file"], result["error"], ""))
        named = [(label["label"], f"{label['probability']:.4f}") for label in result.get("labels", ())]
        named += [(value["target"], f"{value['value']:.6g}") for value in result.get("values", ())]
        if not named and "error" not in result:
            named = [("(no label)", "")]
        rows += [(result["file"] if rank == 0 else "", *one) for rank, one in enumerate(named)]
    return rows
