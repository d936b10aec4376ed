"""The systems of the comparison: how each is started, what a request to it looks like, and how to read its answer."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from benchmarks import environments
from benchmarks.errors import BenchmarkError, NotAvailable
from benchmarks.load import Body
from handlerlib.spec import WEIGHTS_FILE, ModelSpec
from marina import archive, java, model_config, processes, store, tune_config

Form = Literal["marina", "shipped", "one-thread", "documented", "optimised"]
PEERS: Mapping[str, str] = {
    "litserve": "LitServe",
    "bentoml": "BentoML",
    "ray": "Ray Serve",
    "mlserver": "MLServer",
    "fastapi": "FastAPI + uvicorn",
    "pytriton": "PyTriton",
}
"""Name of the environment -> name for the reader."""
TITLES: Mapping[str, str] = {"marina": "Marina", "torchserve": "TorchServe", **PEERS}
PLAIN = "plain"
"""The rung of the plain float32 weights."""
ROOT = Path(__file__).resolve().parent.parent
_BOUNDARY = "marina-benchmark-boundary"


@dataclass(frozen=True, slots=True)
class Layout:
    """What a tuning sweep varies."""

    workers: int
    threads: int
    batch: int

    def __str__(self) -> str:
        return f"{self.workers}x{self.threads}, batch {self.batch}"


@dataclass(frozen=True, slots=True)
class Setup:
    """One system in one form with one rung of the model."""

    system: str
    form: Form
    rung: str = PLAIN

    @property
    def key(self) -> str:
        return f"{self.system}/{self.form}/{self.rung}"

    @property
    def title(self) -> str:
        """For tables."""
        name = TITLES[self.system]
        if self.form == "marina":
            return f"{name}, {self.rung}"
        return {
            "shipped": f"{name} as shipped",
            "one-thread": f"{name}, one thread per worker",
            "documented": f"{name} as documented",
            "optimised": f"{name} with Marina's model",
        }[self.form]


@dataclass(frozen=True, slots=True)
class Launch:
    """A command that serves, and how to talk to it."""

    command: tuple[str, ...]
    environment: Mapping[str, str]
    folder: Path
    url: str
    encode: Callable[[bytes], Body]
    parse: Callable[[bytes], dict[str, float]]
    ready_url: str = ""
    """Answers 200 when ready; without it the first good answer says so."""
    metrics_url: str = ""
    """Of Marina's metrics."""
    engine: str = ""
    """What Marina's workers must say they answer with."""
    isolated: bool = False
    packages: Mapping[str, str] = field(default_factory=dict)
    """Versions, for the results."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where things lie in one run."""

    cache: Path
    """Kept between runs: environments."""
    scratch: Path
    """Of this run alone."""
    models: Mapping[str, Path]
    """Rung -> artifact folder; `plain` is always there."""
    device: str = "cpu"


def launch(setup: Setup, layout: Layout, place: Place) -> Launch:
    """Prepare everything that the setup needs on disk. Raises NotAvailable with the reason when it cannot run here."""
    folder = place.scratch / setup.key.replace("/", "-")
    folder.mkdir(parents=True, exist_ok=True)
    if setup.form == "marina":
        return _marina(setup, layout, place, folder)
    if setup.system == "torchserve":
        return _torchserve(setup, place, folder)
    return _PEERS[setup.system](setup, layout, place, folder)


def raw(data: bytes) -> Body:
    """The photo itself."""
    return Body(data, "image/jpeg")


def multipart(name: str) -> Callable[[bytes], Body]:
    """A form with one file."""
    head = f'--{_BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"; filename="photo.jpg"\r\n'
    start = (head + "Content-Type: image/jpeg\r\n\r\n").encode()
    end = f"\r\n--{_BOUNDARY}--\r\n".encode()
    return lambda data: Body(start + data + end, f"multipart/form-data; boundary={_BOUNDARY}")


def v2_json(data: bytes) -> Body:
    """The open inference protocol with base64 inside."""
    tensor = {"name": "image", "shape": [1, 1], "datatype": "BYTES", "data": [base64.b64encode(data).decode()]}
    document = {"inputs": [tensor | {"parameters": {"content_type": "base64"}}]}
    return Body(json.dumps(document).encode(), "application/json")


def v2_binary(data: bytes) -> Body:
    """The open inference protocol with Triton's binary extension; the header is padded to one length for all photos."""
    size = len(data) + 4
    tensor = {"name": "image", "shape": [1, 1], "datatype": "BYTES", "parameters": {"binary_data_size": size}}
    document = {"inputs": [tensor], "outputs": [{"name": "answer", "parameters": {"binary_data": False}}]}
    header = json.dumps(document).encode().ljust(256)
    body = header + len(data).to_bytes(4, "little") + data
    return Body(body, "application/octet-stream", {"Inference-Header-Content-Length": str(len(header))})


def parse_flat(body: bytes) -> dict[str, float]:
    """`{label: probability}`, alone or as the only item of a list."""
    document = json.loads(body)
    if isinstance(document, list):
        (document,) = document
    return {str(label): float(value) for label, value in document.items()}


def parse_marina(body: bytes) -> dict[str, float]:
    """Marina's own answer."""
    (labels,) = json.loads(body)["predictions"]
    return {item["label"]: float(item["probability"]) for item in labels}


def text(data: bytes) -> Body:
    """A sentence."""
    return Body(data, "text/plain; charset=utf-8")


def parse_any(body: bytes) -> dict[str, float]:
    """Whatever JSON a model answers; what it says is not looked at."""
    json.loads(body)
    return {}


def parse_v2(body: bytes) -> dict[str, float]:
    """One output of one JSON string."""
    data: Any = json.loads(body)["outputs"][0]["data"]
    while isinstance(data, list):
        (data,) = data
    return parse_flat(data.encode())


def worker_environment(threads: int) -> dict[str, str]:
    """What Marina's server gives its workers; the optimised peers and the limit without a server get the same."""
    return {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": str(threads)}


def clean_environment(**more: str) -> dict[str, str]:
    """Ours without what would tune a server behind its back."""
    unwanted = ("OMP_", "KMP_", "MKL_", "MALLOC_", "PYTHON", "BENCH_", "MARINA_", "TS_", "RAY_", "LD_PRELOAD")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(unwanted)}
    return kept | more


def python_path() -> str:
    """For programs that import handlerlib, the handlers and benchmarks."""
    return os.pathsep.join((str(ROOT / "handlers"), str(ROOT)))


def _marina(setup: Setup, layout: Layout, place: Place, folder: Path) -> Launch:
    name = ModelSpec.load(place.models[setup.rung]).name
    packed = folder / f"store-{name}-{layout.workers}-{layout.batch}"
    if not packed.is_dir():
        pack(place.models[setup.rung], layout, packed)
    inference, management, metrics, supervisor = processes.free_ports(4)
    options = {
        "--store": packed,
        "--port": inference,
        "--management-port": management,
        "--metrics-port": metrics,
        "--supervisor-port": supervisor,
        "--device": "gpu" if place.device == "cuda" else "cpu",
    }
    flags = [str(part) for pair in options.items() for part in pair]
    return Launch(
        command=(sys.executable, "-m", "marina", "serve", name, *flags),
        environment=clean_environment(MARINA_HOME=str(ROOT)),
        folder=ROOT,
        url=f"http://127.0.0.1:{inference}/predictions/{name}",
        encode=raw,
        parse=parse_marina,
        ready_url=f"http://127.0.0.1:{supervisor}/readyz",
        metrics_url=f"http://127.0.0.1:{metrics}/metrics",
        engine=setup.rung,
    )


def shipped_layout(artifact: Path, cores: int) -> Layout:
    """What `marina pack` would put into the archive."""
    values = model_config.read(_config(artifact).read_text(encoding="utf-8"))
    return Layout(values["minWorkers"], max(1, cores // values["minWorkers"]), values["batchSize"])


def pack(artifact: Path, layout: Layout, target: Path) -> archive.Archive:
    """`marina pack` of a copy of the artifact, with the layout in its model-config.yaml. Raises BenchmarkError when the
    archive has another one.
    """
    wanted = {"minWorkers": layout.workers, "maxWorkers": layout.workers, "batchSize": layout.batch}
    lines = [
        f"{key}: {wanted[key]}" if (key := line.partition(":")[0].strip()) in wanted else line
        for line in _config(artifact).read_text(encoding="utf-8").splitlines()
    ]
    with tempfile.TemporaryDirectory(prefix=".copy-", dir=target.parent) as scratch:
        copied = Path(scratch) / artifact.name
        shutil.copytree(artifact, copied)
        tune_config.write_override(copied, "\n".join(lines) + "\n")
        packed = archive.pack(copied, handlers=ROOT / "handlers", destination=target)
    found = model_config.read(tune_config.config_of(packed.path))
    if {key: found[key] for key in wanted} != wanted:
        raise BenchmarkError(
            f"{packed.path} has not the layout {layout}", remedy=f"one key per line: {_config(artifact)}"
        )
    store.publish(target, packed)
    return packed


def _config(artifact: Path) -> Path:
    """The model-config.yaml that counts: the artifact's own, such as `marina tune` writes, or else the handler's."""
    own = artifact / model_config.CONFIG_FILE
    return own if own.is_file() else ROOT / "handlers" / f"{ModelSpec.load(artifact).handler}.yaml"


def _torchserve(setup: Setup, place: Place, folder: Path) -> Launch:
    """As TorchServe's README has it; the only settings are the ports. The handler's transform is the model's own."""
    # An environment of its own: image_classifier imports captum, which neither TorchServe's wheel nor Marina asks for.
    python = environments.python_of(place.cache, "torchserve")
    spec = ModelSpec.load(place.models[PLAIN])
    if not (folder / "store" / "yardstick.mar").is_file():
        _archive_for_torchserve(spec, place.models[PLAIN], folder)
    found = java.find()
    inference, management, metrics, grpc, grpc_management = processes.free_ports(5)
    (folder / "config.properties").write_text(
        f"inference_address=http://127.0.0.1:{inference}\nmanagement_address=http://127.0.0.1:{management}\n"
        f"metrics_address=http://127.0.0.1:{metrics}\ngrpc_inference_port={grpc}\n"
        f"grpc_management_port={grpc_management}\n"
    )
    program = python.parent / "torchserve"
    options = ("--ts-config", str(folder / "config.properties"), "--model-store", str(folder / "store"))
    models = ("--models", "yardstick=yardstick.mar")
    extra = {"OMP_NUM_THREADS": "1"} if setup.form == "one-thread" else {}
    logs = {"LOG_LOCATION": str(folder / "logs"), "METRICS_LOCATION": str(folder / "logs"), "TEMP": str(folder)}
    path = os.pathsep.join((str(program.parent), os.environ.get("PATH", os.defpath)))
    return Launch(
        command=(str(program), "--start", "--foreground", "--ncs", *options, *models, "--disable-token-auth"),
        environment=clean_environment(JAVA_HOME=str(found.executable.parent.parent), PATH=path, **logs, **extra),
        folder=folder,
        url=f"http://127.0.0.1:{inference}/predictions/yardstick",
        encode=raw,
        parse=parse_flat,
        packages={"java": str(found.major), **environments.versions_of(place.cache, "torchserve")},
    )


_BLOCKS = {"resnet18": "BasicBlock, [2, 2, 2, 2]", "resnet50": "Bottleneck, [3, 4, 6, 3]"}


def _archive_for_torchserve(spec: ModelSpec, artifact: Path, folder: Path) -> None:
    if spec.architecture.name not in _BLOCKS:
        raise NotAvailable(
            f"no eager model file is written for '{spec.architecture.name}'", remedy="use resnet18 or resnet50"
        )
    (folder / "model.py").write_text(
        "from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet\n\n\nclass Yardstick(ResNet):\n"
        f"    def __init__(self):\n        super().__init__({_BLOCKS[spec.architecture.name]}, "
        f"num_classes={spec.architecture.classes})\n"
    )
    (folder / "index_to_name.json").write_text(json.dumps({str(i): label for i, label in enumerate(spec.labels)}))
    preprocess = spec.preprocess
    size = f"({preprocess.height}, {preprocess.width})"
    resize = (
        f"transforms.Resize({size})"
        if preprocess.resize == "stretch"
        else f"transforms.Resize({round(preprocess.height / preprocess.crop_fraction)}), transforms.CenterCrop({size})"
    )
    # TorchServe's documentation: "extend an existing handler and set image_processing".
    (folder / "yardstick_handler.py").write_text(
        "from torchvision import transforms\nfrom ts.torch_handler.image_classifier import ImageClassifier\n\n\n"
        "class YardstickClassifier(ImageClassifier):\n"
        f"    image_processing = transforms.Compose([{resize}, transforms.ToTensor(),\n"
        f"        transforms.Normalize(mean={list(preprocess.mean)}, std={list(preprocess.std)})])\n"
    )
    weights = folder / "weights.pth"
    convert = "import sys, torch, safetensors.torch as s; torch.save(s.load_file(sys.argv[1]), sys.argv[2])"
    (folder / "store").mkdir(exist_ok=True)
    _call([sys.executable, "-c", convert, str(artifact / WEIGHTS_FILE), str(weights)], folder)
    _call(
        [
            str(Path(sys.executable).parent / "torch-model-archiver"), "--model-name", "yardstick", "--version", "1.0",
            "--model-file", "model.py", "--serialized-file", "weights.pth", "--handler", "yardstick_handler.py",
            "--extra-files", "index_to_name.json", "--export-path", "store", "--force",
        ],
        folder,
    )  # fmt: skip


def _call(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        raise NotAvailable(f"{Path(command[0]).name} failed: {done.stderr[-300:]}", remedy="see the message")


def _peer(
    setup: Setup,
    layout: Layout,
    place: Place,
    folder: Path,
    *,
    command: Callable[[Path, int], list[str]],
    path: str,
    encode: Callable[[bytes], Body],
    parse: Callable[[bytes], dict[str, float]] = parse_flat,
    isolated: bool = False,
    **variables: str,
) -> Launch:
    python = environments.python_of(place.cache, setup.system)
    (port,) = processes.free_ports(1)
    settings = {
        "model": place.models[setup.rung],
        "form": setup.form,
        "port": port,
        "workers": layout.workers,
        "threads": layout.threads,
        "batch": layout.batch,
        "device": place.device,
    }
    environment = {f"BENCH_{name.upper()}": str(value) for name, value in settings.items()}
    if setup.form == "optimised":
        environment |= worker_environment(layout.threads)
    search = os.pathsep.join((str(python.parent), os.environ.get("PATH", os.defpath)))
    return Launch(
        command=tuple(command(python, port)),
        environment=clean_environment(PYTHONPATH=python_path(), PATH=search, **environment, **variables),
        folder=folder,
        url=f"http://127.0.0.1:{port}{path}",
        encode=encode,
        parse=parse,
        isolated=isolated,
        packages=environments.versions_of(place.cache, setup.system),
    )


def _module(name: str) -> Callable[[Path, int], list[str]]:
    return lambda python, _: [str(python), "-m", f"benchmarks.peers.{name}"]


def _litserve(setup: Setup, layout: Layout, place: Place, folder: Path) -> Launch:
    return _peer(
        setup, layout, place, folder,
        command=_module("litserve_server"), path="/predict", encode=multipart("content"),
    )  # fmt: skip


def _fastapi(setup: Setup, layout: Layout, place: Place, folder: Path) -> Launch:
    def command(python: Path, port: int) -> list[str]:
        server = [str(python), "-m", "uvicorn", "benchmarks.peers.fastapi_server:app", "--port", str(port)]
        if setup.form != "optimised":
            return server
        # Its supervisor kills a worker that is busy with importing torch for more than 5 s.
        patience = ["--timeout-worker-healthcheck", "120"]
        return [*server, "--workers", str(layout.workers), *patience, "--no-access-log"]

    return _peer(
        setup, layout, place, folder,
        command=command, path="/predict", encode=raw if setup.form == "optimised" else multipart("file"),
    )  # fmt: skip


def _ray(setup: Setup, layout: Layout, place: Place, folder: Path) -> Launch:
    # Ray listens on the machine's address whatever it is told: in a network of its own there is only loopback.
    return _peer(
        setup, layout, place, folder,
        command=_module("ray_server"), path="/predict", encode=raw, isolated=True,
        RAY_USAGE_STATS_ENABLED="0", RAY_DISABLE_IMPORT_WARNING="1",
    )  # fmt: skip


def _pytriton(setup: Setup, layout: Layout, place: Place, folder: Path) -> Launch:
    return _peer(
        setup, layout, place, folder,
        command=_module("pytriton_server"), path="/v2/models/classifier/infer", encode=v2_binary, parse=parse_v2,
    )  # fmt: skip


def _bentoml(setup: Setup, layout: Layout, place: Place, folder: Path) -> Launch:
    def command(python: Path, port: int) -> list[str]:
        service = "benchmarks.peers.bentoml_server:Classifier"
        address = ["--host", "127.0.0.1", "--port", str(port)]
        return [str(python), "-m", "bentoml", "serve", service, "--working-dir", str(ROOT), *address]

    return _peer(
        setup, layout, place, folder,
        command=command, path="/classify", encode=multipart("images" if setup.form == "optimised" else "image"),
        BENTOML_HOME=str(folder / "bentoml"), BENTOML_DO_NOT_TRACK="True",
    )  # fmt: skip


def _mlserver(setup: Setup, layout: Layout, place: Place, folder: Path) -> Launch:
    def command(python: Path, port: int) -> list[str]:
        grpc, metrics = processes.free_ports(2, apart_from=[port])
        server: dict[str, object] = {"http_port": port, "grpc_port": grpc, "metrics_port": metrics, "host": "127.0.0.1"}
        model: dict[str, object] = {
            "name": "classifier",
            "implementation": "benchmarks.peers.mlserver_runtime.Classifier",
        }
        if setup.form == "optimised":
            # One worker runs best inside the server itself, which MLServer's documentation calls 0.
            server["parallel_workers"] = layout.workers if layout.workers > 1 else 0
            model |= {"max_batch_size": layout.batch, "max_batch_time": 0.001}
        (folder / "settings.json").write_text(json.dumps(server))
        (folder / "model-settings.json").write_text(json.dumps(model))
        return [str(python.parent / "mlserver"), "start", str(folder)]

    return _peer(
        setup, layout, place, folder,
        command=command, path="/v2/models/classifier/infer", encode=v2_json, parse=parse_v2,
    )  # fmt: skip


_PEERS: Mapping[str, Callable[[Setup, Layout, Place, Path], Launch]] = {
    "litserve": _litserve,
    "bentoml": _bentoml,
    "ray": _ray,
    "mlserver": _mlserver,
    "fastapi": _fastapi,
    "pytriton": _pytriton,
}
