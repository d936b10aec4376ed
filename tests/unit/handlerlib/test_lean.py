from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import sys
import torch
import image_classifier
heavy = [name for name in ("torch._dynamo", "sympy", "triton", "torchvision.transforms.v2") if name in sys.modules]
assert not heavy, f"a worker has imported {heavy}"
import torchvision
boxes = torch.tensor([[0.0, 0.0, 0.0, 4.0, 4.0]])
print(torchvision.ops.roi_align(torch.ones(1, 1, 8, 8), boxes, 2).sum().item())
print(torchvision.ops.roi_align.__globals__["is_compile_supported"]("cpu"))
print(torch.compile(lambda x: x + 1, backend="eager")(torch.ones(2)).tolist())
"""


def test_a_worker_does_not_import_the_compiler_and_both_can_still_be_used(handlers: Path) -> None:
    environment = dict(os.environ) | {"PYTHONPATH": str(handlers)}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["4.0", "True", "[2.0, 2.0]"]
