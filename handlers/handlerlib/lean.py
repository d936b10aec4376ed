"""torchvision without the half of torch that it does not use.

`import torchvision` (0.29) imports the whole compiler `torch._dynamo`, with sympy and triton, for one helper of the
operator `roi_align`: 0.9 of its 1.0 seconds and 150 of its 165 MB in every worker, measured. While it is imported here, a
stand-in takes the compiler's place, whose helper asks the real one when it is called. Afterwards the stand-in is gone, and
`torch.compile` finds the compiler as ever. Importing this module is importing torchvision so.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

_COMPILER = "torch._dynamo"
_HELPERS = f"{_COMPILER}.utils"


def import_torchvision() -> None:
    """Import torchvision and register its operators; does nothing more when it or the compiler is there already."""
    if "torchvision" in sys.modules or _COMPILER in sys.modules:
        importlib.import_module("torchvision")
        return
    compiler, helpers = ModuleType(_COMPILER), ModuleType(_HELPERS)
    helpers.is_compile_supported = _is_compile_supported  # type: ignore[attr-defined]
    compiler.utils = helpers  # type: ignore[attr-defined]
    compiler.__path__ = []
    sys.modules |= {_COMPILER: compiler, _HELPERS: helpers}
    complete = True
    try:
        importlib.import_module("torchvision")
    except (ImportError, AttributeError):  # another version that wants more of it
        complete = False
    finally:
        for name, module in ((_HELPERS, helpers), (_COMPILER, compiler)):
            if sys.modules.get(name) is module:
                del sys.modules[name]
    if not complete:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        importlib.import_module("torchvision")


def _is_compile_supported(device_type: str) -> bool:
    from torch._dynamo.utils import is_compile_supported

    return bool(is_compile_supported(device_type))


import_torchvision()
