"""The command that measures a server: `marina bench`."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import json
import os
import re
import ssl
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import quote, urlsplit

import typer
from rich.live import Live
from rich.text import Text

from marina import compose, load_payloads, loadgen, remote
from marina import store as model_store
from marina.client import ManagementClient, read_key
from marina.errors import ClientError, ConfigError, Refused, StoreError, Unreachable
from marina.home import find_home
from marina.load_payloads import Load
from marina.loadgen import Check, Closed, Interval, Latency, OnProgress, Open, Payload, Progress, Result, Scenario
from marina.remote import ContainerReplica
from marina.replica import LocalReplica
from marina.screen import Screen
from marina.settings import OTHER_VARIABLES, ServeSettings

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]

_PREDICTIONS = re.compile(r"/predictions/(?P<name>[^/?]+)(?:/(?P<version>[^/?]+))?")
_MODEL = re.compile(r"(?P<name>[A-Za-z0-9][A-Za-z0-9_.-]*)(?::(?P<version>[0-9.]+))?")


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(bench)


def bench(
    target: Annotated[str, typer.Argument(help="A URL, or a served model: NAME or NAME:VERSION.")],
    connections: Annotated[
        str | None,
        typer.Option(
            "--connections",
            "-c",
            help="Of a closed loop, 8 by default; several: 1,8,32. Beside --rate: at most so many.",
        ),
    ] = None,
    rate: Annotated[
        str | None, typer.Option("--rate", "-r", help="Open loop instead: requests per second; several: 50,100.")
    ] = None,
    arrivals: Annotated[
        Literal["constant", "poisson"], typer.Option(help="How an open loop spaces its requests.")
    ] = "constant",
    duration: Annotated[
        float, typer.Option("--duration", "-d", min=0.1, help="Seconds measured, per scenario.")
    ] = 20.0,
    warm_up: Annotated[str, typer.Option(help="Seconds, or auto: until throughput and latency are steady.")] = "auto",
    warm_up_limit: Annotated[float, typer.Option(min=0, help="Seconds after which auto measures anyway.")] = 60.0,
    timeout: Annotated[float, typer.Option(min=0.001, help="Seconds after which a request has failed.")] = 60.0,
    body: Annotated[
        list[Path] | None, typer.Option("--body", "-b", help="A file, or a folder of files sent in turn; repeatable.")
    ] = None,
    content_type: Annotated[str | None, typer.Option(help="Of the bodies; by their names otherwise.")] = None,
    method: Annotated[str | None, typer.Option(help="POST with a body, GET without.")] = None,
    header: Annotated[list[str] | None, typer.Option("--header", "-H", help="'Name: value'; repeatable.")] = None,
    key_file: Annotated[
        Path | None, typer.Option("--key-file", envvar="MARINA_KEY_FILE", help="The gateway's key.")
    ] = None,
    expect: Annotated[str | None, typer.Option(help="Text that every answer must contain.")] = None,
    check: Annotated[
        str | None, typer.Option(help="MODULE:FACTORY that judges answers, see marina/load_checks.py.")
    ] = None,
    pid: Annotated[
        int | None, typer.Option(help="The server's process, for its CPU and memory; found by port.")
    ] = None,
    processes: Annotated[int, typer.Option(min=1, help="Client processes.")] = 1,
    ca_file: Annotated[Path | None, typer.Option(help="Certificates to trust, for https.")] = None,
    insecure: Annotated[bool, typer.Option(help="Do not check the certificate.")] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the JSON here too.")] = None,
    store: Annotated[Path | None, typer.Option("--store", help="Another model store.")] = None,
    as_json: Json = False,
) -> None:
    """Measure a server under load: throughput, latency percentiles with intervals, errors, CPU and memory. Ctrl-C shows
    what there is so far.
    """
    screen = Screen(as_json)
    found = _find(target, body, content_type, key_file, store)
    base = Scenario(
        url=found.url,
        payloads=found.load.payloads,
        method=method or ("POST" if found.load.payloads[0].body else "GET"),
        headers=dict(map(_header, header or [])) | _authorization(key_file or found.key_file),
        duration=duration,
        warm_up=_warm_up(warm_up),
        warm_up_limit=warm_up_limit,
        timeout=timeout,
        check=_check(expect, check, found.load),
        server=pid if pid is not None else "auto",
        processes=processes,
        ca_file=ca_file,
        insecure=insecure,
    )
    loops = _loops(connections, rate, arrivals)
    ask_once(base)
    screen.say(f"{found.url}: {found.load.source or base.method}")
    results: list[Result] = []
    for loop in loops:
        results.append(_measure(screen, base, loop))
        if results[-1].interrupted:
            break
    report = {"url": found.url, "payloads": found.load.source, "scenarios": [item.as_dict() for item in results]}
    if output is not None:
        _write(output, report)
    screen.result(report)
    show(screen, results)
    _end(screen, results)


def ask_once(scenario: Scenario) -> None:
    """One request before the load, so that a wrong address or key is one clear line. Raises ClientError."""
    parts = urlsplit(scenario.url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(
            f"'{scenario.url}' is not an address", remedy="write it like http://127.0.0.1:8080/predictions/m"
        )
    connection: http.client.HTTPConnection
    if parts.scheme == "https":
        trust = _trusted(scenario.ca_file)
        if scenario.insecure:
            trust.check_hostname, trust.verify_mode = False, ssl.CERT_NONE
        connection = http.client.HTTPSConnection(parts.hostname, parts.port, timeout=scenario.timeout, context=trust)
    else:
        connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=scenario.timeout)
    payload = scenario.payloads[0]
    headers = {**({"Content-Type": payload.content_type} if payload.body else {}), **scenario.headers}
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    with contextlib.closing(connection):
        try:
            connection.request(scenario.method, path, body=payload.body or None, headers=headers)
            answer = connection.getresponse()
            text = answer.read(2000).decode("utf-8", "replace")
        except ConnectionRefusedError as error:
            remedy = "is the server up? `marina serve` starts one"
            raise Unreachable(f"nothing listens at {parts.netloc}", remedy=remedy) from error
        except ssl.SSLError as error:
            remedy = "give its authority with --ca-file, or use --insecure"
            raise Unreachable(f"no TLS connection to {parts.netloc}: {error}", remedy=remedy) from error
        except (OSError, http.client.HTTPException) as error:
            raise Unreachable(f"{parts.netloc} gave no answer: {error!r}", remedy="is it an HTTP server?") from error
        except ValueError as error:
            raise ConfigError(f"a request to {scenario.url} cannot be written: {error}", remedy="correct it") from error
    if answer.status >= 400 and answer.status != 429:
        remedy = _REMEDIES.get(answer.status, "correct the request: --body, --header, --method")
        title = f"{scenario.url} refuses the first request with status {answer.status}"
        raise Refused(title, status=answer.status, detail=" ".join(text.split())[:200], remedy=remedy)


def _trusted(ca_file: Path | None) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=ca_file)
    except OSError as error:  # ssl's own errors are such, and name no file
        raise ConfigError(
            f"{ca_file} holds no certificates that can be read: {error.strerror or error}",
            remedy="give --ca-file a PEM file with the authority's certificate",
        ) from error


_REMEDIES: Mapping[int, str] = {
    401: "give the key: --key-file secrets/inference.key",
    403: "give the key: --key-file secrets/inference.key",
    404: "`marina status` lists what is served",
    405: "another --method, or a --body",
    503: "the server is not ready: marina status",
}


@contextlib.contextmanager
def watching(screen: Screen, what: str) -> Iterator[OnProgress]:
    """One line on a terminal's standard error that follows the load; nothing elsewhere."""
    if not screen.err.is_terminal:
        yield lambda progress: None
        return
    with Live(console=screen.err, auto_refresh=False, transient=True) as live:

        def follow(progress: Progress) -> None:
            state = "measuring" if progress.measuring else "warming up"
            failed = f", {progress.failed} FAILED" if progress.failed else ""
            rate = progress.good / progress.length if progress.length > 0 else 0.0
            line = f"{what}  {state} {progress.seconds:.0f} s  {rate:.0f}/s  {progress.mean_ms:.1f} ms{failed}"
            live.update(Text(line), refresh=True)

        yield follow


def show(screen: Screen, results: Sequence[Result]) -> None:
    """The table, and what a reader must know to trust it."""
    # fmt: off
    columns = (
        "load", "req/s", "p50 ms", "p90", "p95", "p99", "p99.9", "max", "failed", "CPU ms/req", "cores", "PSS MiB",
    )
    # fmt: on
    screen.table(columns, [_row(item) for item in results])
    for item in results:
        for note in _notes(item):
            screen.say(f"{describe(item.loop)}: {note}")


def describe(loop: Closed | Open) -> str:
    """In a few words."""
    if isinstance(loop, Open):
        return f"{loop.rate:g}/s {loop.arrivals}"
    return f"{loop.connections} connection{'s' * (loop.connections != 1)}"


def shown_rate(item: Interval) -> str:
    """`183.4 ±2.1`."""
    digits = 0 if item.value >= 1000 else 1
    if item.low is None or item.high is None:
        return f"{item.value:.{digits}f}"
    return f"{item.value:.{digits}f} ±{item.high - item.value:.{digits}f}"


def shown_interval(item: Interval | None, digits: int = 1) -> str:
    """`12.3 (11.9–12.8)`; an end that is not known is left open."""
    if item is None:
        return "-"
    low = f"{item.low:.{digits}f}" if item.low is not None else ""
    high = f"{item.high:.{digits}f}" if item.high is not None else ""
    return f"{item.value:.{digits}f} ({low}–{high})" if low or high else f"{item.value:.{digits}f}"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Found:
    url: str
    load: Load
    key_file: Path | None = None


def _find(
    target: str, body: list[Path] | None, content_type: str | None, key_file: Path | None, store: Path | None
) -> _Found:
    """What to send where. Raises ConfigError, ArchiveError or Unreachable."""
    own = load_payloads.from_files(body, content_type) if body else None
    if "://" in target:
        if own is not None:
            return _Found(url=target, load=own)
        model = _PREDICTIONS.search(urlsplit(target).path)
        if model is None:
            return _Found(url=target, load=Load(payloads=(Payload(),)))
        return _Found(url=target, load=_golden(store or find_home().store, model["name"], model["version"]))
    named = _MODEL.fullmatch(target)
    if named is None:
        raise ConfigError(
            f"'{target}' is neither a URL nor a model", remedy="e.g. http://127.0.0.1:8080/ping or digits"
        )
    return _find_model(named["name"], named["version"], own, key_file, store)


def _find_model(name: str, version: str | None, own: Load | None, key_file: Path | None, store: Path | None) -> _Found:
    home = find_home()
    settings = ServeSettings.load({"config": home.config}, os.environ, other_variables=OTHER_VARIABLES)
    management = os.environ.get("MARINA_MANAGEMENT_URL") or settings.url("management")
    inference = os.environ.get("MARINA_URL") or settings.url("inference")
    local = LocalReplica(
        store=store or home.store,
        inference_url=inference,
        management_url=management,
        supervisor_url=settings.url("supervisor"),
    )
    wanted: remote.Target = "local" if "MARINA_MANAGEMENT_URL" in os.environ else "auto"
    replica = remote.find_replicas(wanted, local, management_url=management, project=home.root)[0]
    path = f"/predictions/{quote(name, safe='')}" + (f"/{version}" if version else "")
    if isinstance(replica, ContainerReplica):
        folder, base = store or replica.store, compose.open_stack(home).published.url
        key = key_file or home.root / "secrets" / "inference.key"
        served = next((item.version for item in replica.status() if item.name == name and item.default), None)
    else:
        folder, base, key = store or home.store, inference, None
        with ManagementClient(management) as client:
            served = client.describe(name, version).version
    return _Found(url=base + path, load=own or _golden(folder, name, version or served), key_file=key)


def _golden(store: Path, name: str, version: str | None) -> Load:
    key = f"{name}:{version}" if version else name
    try:
        (item,) = model_store.select(store, [key])
    except StoreError as error:
        raise ConfigError(
            f"there is nothing to send to {name}: its archive, which holds samples, is not in {store}",
            remedy="give a file or a folder: --body photos/",
        ) from error
    return load_payloads.from_archive(item.path)


def _loops(connections: str | None, rate: str | None, arrivals: Literal["constant", "poisson"]) -> list[Closed | Open]:
    counts = [int(number) for number in _numbers("--connections", connections)] if connections is not None else []
    if any(count < 1 for count in counts):
        raise typer.BadParameter("at least 1 connection", param_hint="--connections")
    if rate is None:
        return [Closed(connections=count) for count in counts or [8]]
    if len(counts) > 1:
        raise typer.BadParameter("one number only beside --rate: the most connections", param_hint="--connections")
    rates = _numbers("--rate", rate)
    if not counts:
        return [Open(rate=number, arrivals=arrivals) for number in rates]
    return [Open(rate=number, arrivals=arrivals, connections=counts[0]) for number in rates]


def _numbers(option: str, text: str) -> list[float]:
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"'{text}' is not a number or a list like 1,8,32", param_hint=option) from None
    if not all(0 < number < float("inf") for number in found):
        raise typer.BadParameter("must be above 0", param_hint=option)
    return found


def _warm_up(text: str) -> float | Literal["auto"]:
    if text == "auto":
        return "auto"
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise typer.BadParameter(f"'{text}' is neither auto nor seconds", param_hint="--warm-up")
    return seconds


def _header(text: str) -> tuple[str, str]:
    name, separator, value = text.partition(":")
    if not separator or not name.strip():
        raise typer.BadParameter(f"'{text}' is not 'Name: value'", param_hint="--header")
    return name.strip(), value.strip()


def _authorization(key_file: Path | None) -> dict[str, str]:
    return {} if key_file is None else {"Authorization": f"Bearer {read_key(key_file)}"}


def _check(expect: str | None, check: str | None, load: Load) -> Check | None:
    if expect is not None and check is not None:
        raise typer.BadParameter("give --expect or --check, not both", param_hint="--check")
    if expect is not None:
        return Check("marina.load_checks:contains", {"text": expect})
    if check is not None:
        return Check(check, {"payloads": [item.name for item in load.payloads]})
    return load.check


def _measure(screen: Screen, base: Scenario, loop: Closed | Open) -> Result:
    with watching(screen, describe(loop)) as follow:
        return loadgen.run(dataclasses.replace(base, loop=loop), on_progress=follow)


def _row(item: Result) -> tuple[object, ...]:
    found, server = item.latency, item.server
    return (
        describe(item.loop),
        shown_rate(item.throughput),
        *_percentiles(found),
        item.failed,
        f"{server.cpu_ms_per_request:.2f}" if server is not None and server.cpu_ms_per_request is not None else "-",
        f"{server.cores:.2f}" if server is not None else "-",
        f"{server.pss_mib:.0f}" if server is not None and server.pss_mib is not None else "-",
    )


def _percentiles(found: Latency | None) -> tuple[object, ...]:
    if found is None:
        return ("-",) * 6
    digits = 1 if found.p50.value >= 10 else 2
    return (
        shown_interval(found.p50, digits),
        f"{found.p90.value:.{digits}f}",
        f"{found.p95.value:.{digits}f}",
        shown_interval(found.p99, digits),
        f"{found.p999.value:.{digits}f}",
        f"{found.max_ms:.{digits}f}",
    )


def _notes(item: Result) -> Iterator[str]:
    if item.errors:
        kinds = ", ".join(f"{count} {name}" for name, count in item.errors.items())
        first = f"; the first: {item.failures[0].detail}" if item.failures and item.failures[0].detail else ""
        yield f"{item.failed} of {item.planned} requests failed ({kinds}){first}"
    if item.interrupted:
        yield f"interrupted after {item.seconds:.1f} s of measuring"
    elif not item.steady:
        yield f"still not steady after {item.warm_up_seconds:.0f} s of warm-up: repeat it, or raise --warm-up-limit"
    if item.latency is not None and item.behind is not None and item.behind.p99.value > 0.1 * item.latency.p99.value:
        yield (
            f"the client itself was late by up to {item.behind.p99.value:.2f} ms (p99): it shares the processors; "
            "lower the rate, or measure from another machine"
        )
    if isinstance(item.loop, Open) and _lagging(item):
        yield f"{item.offered:.0f} requests/s were offered, more than the server answers: latency grows with the duration"


def _lagging(item: Result) -> bool:
    """Whether answers came so late that, at the end of the measurement, one in twenty was still out."""
    answered = sum(span.answered for span in item.timeline)
    return item.good - answered > 0.05 * item.planned


def _end(screen: Screen, results: Sequence[Result]) -> None:
    if any(item.interrupted for item in results):
        raise typer.Exit(130)
    good = sum(item.good for item in results)
    wrong = sum(item.errors.get("wrong answer", 0) for item in results)
    if good == 0:
        screen.end_with(ClientError("no request got a good answer", remedy="see the classes of errors above"))
    if wrong:
        screen.end_with(ClientError(f"{wrong} answers were wrong", remedy="verify the archive: marina verify NAME"))


def _write(path: Path, report: Mapping[str, Any]) -> None:
    try:
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}", remedy="choose another --output") from error
