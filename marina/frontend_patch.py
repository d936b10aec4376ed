"""Four small changes to TorchServe 0.12.0's front end, put in front of its jar on java's class path.

TorchServe is not maintained any more, so what costs every request there is not going to change upstream. Each patch
below exchanges a few instructions of one compiled class for others of the same length. The jar itself stays as it was
installed: the changed classes are written into a small jar in the server's private temp folder, which java reads first.

A patch is applied only when its class is, by SHA-256, the one of TorchServe 0.12.0 that it was made for, and only when
the bytes to be exchanged are found exactly once; any other class is left alone and named, and TorchServe's own behaviour
remains. `MARINA_FRONTEND_PATCHES=false` leaves all of them out.

The numbers before each instruction are those of `javap -c -p`. No patch moves an instruction or changes what lies on the
stack at a jump, so java's verifier checks the changed classes like any others.
"""

from __future__ import annotations

import hashlib
import struct
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

JAR = Path("ts") / "frontend" / "model-server.jar"
"""Below the folder of the installed package."""
PATCHED_JAR = "marina-frontend.jar"

_NOP = b"\x00"
_UTF8, _INTERFACE_METHOD, _NAME_AND_TYPE = 1, 11, 12
_POOL_ENTRY_BYTES: Mapping[int, int] = {
    3: 4,
    4: 4,
    5: 8,
    6: 8,
    7: 2,
    8: 2,
    9: 4,
    10: 4,
    11: 4,
    12: 4,
    15: 3,
    16: 2,
    17: 4,
    18: 4,
    19: 2,
    20: 2,
}
"""Tag of a constant -> its size, as the Java Virtual Machine Specification has them in section 4.4."""
_TWO_SLOTS = (5, 6)


@dataclass(frozen=True, slots=True)
class Exchange:
    """Bytes of a class for others: instructions of the same length, or a constant."""

    old: bytes
    new: bytes


@dataclass(frozen=True, slots=True)
class Patch:
    """One class of TorchServe 0.12.0 and what is changed in it."""

    name: str
    """The class, with slashes."""
    effect: str
    """What is different afterwards, in words."""
    sha256: str
    """Of the class file in the released jar."""
    exchanges: tuple[Exchange, ...]
    constants: tuple[bytes, ...] = ()
    """Entries put behind the constant pool; the first one's number is the pool's old size."""


@dataclass(frozen=True, slots=True)
class Patched:
    """What came of it."""

    jar: Path | None
    """To be put in front of TorchServe's own; None when no class could be patched."""
    applied: tuple[Patch, ...]
    refused: tuple[str, ...]
    """Per class that was left alone: which and why."""


def _code(text: str, *, length: int = 0) -> bytes:
    """Instructions as hexadecimal digits, filled up with `nop` to `length` bytes."""
    found = bytes.fromhex(text)
    return found + _NOP * (length - len(found))


def _utf8(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack(">BH", _UTF8, len(encoded)) + encoded


BATCHES = Patch(
    name="org/pytorch/serve/wlm/Model",
    effect="maxBatchDelay 1 takes what is queued and never waits",
    sha256="7c5523f1fe77fe79aa32665469e17725e70518692abcf4987989ef72f10d4cff",
    exchanges=(
        # pollBatch, 169..190: logger.trace("get first job: {}", job.getJobId()). Instead: delay &= lcmp(1, delay),
        # which is -1 for a delay above 1 (the delay stays), 0 for 1 and at most 1 for what is below (no waiting).
        #   lconst_1, lload 6, lcmp, i2l, lload 6, land, lstore 6
        Exchange(
            old=_code("b20090 130201 1908 b80203 c001b0 b601c7 b902080300"),
            new=_code("0a 1606 94 85 1606 7f 3706", length=22),
        ),
        # pollBatch, 369..378: `if (delay <= 0) break;` after each further job. Without it the queue is drained up to
        # the batch size; poll with a delay that is used up returns at once, and the loop ends with the queue.
        Exchange(
            old=_code("1606 09 94 9d0006 a70009 840b01"),
            new=_code("", length=10) + _code("840b01"),
        ),
    ),
)
DISPATCH = Patch(
    name="org/pytorch/serve/wlm/WorkerThread",
    effect="a batch is written by the worker's own thread instead of one that is started for it",
    sha256="5292f5b79ac1ec509876cd997e2605848fd79f0b15b24ebd1a96c9c6b035ffd6",
    exchanges=(
        # run, 201..209: futures.add(CompletableFuture.runAsync(send)). Instead: send.run().
        #   invokeinterface Runnable.run, pop
        Exchange(old=_code("b8016b b901710200 57"), new=_code("b904140100 57", length=9)),
        # lambda$run$0, 20..24: .sync() after writeAndFlush. The reply is waited for right afterwards, and a failed
        # write is noticed there, as before; an interruption must not be swallowed here.
        Exchange(old=_code("b903550200 b9027b0100 57"), new=_code("b903550200 0000000000 57")),
    ),
    constants=(
        struct.pack(">BHH", _NAME_AND_TYPE, 361, 6),  # run:()V
        struct.pack(">BHH", _INTERFACE_METHOD, 880, 1043),  # java/lang/Runnable.run:()V, number 1044 = 0x0414
    ),
)
RECEIVING = Patch(
    name="org/pytorch/serve/ModelServer",
    effect="request bodies are read in pieces of up to 64 KiB instead of 4",
    sha256="779d0df5bfc17c5ad09ac46d63d9a017d48a4cd68c1b7464de914d3cb40190b9",
    exchanges=(
        # initializeServer, 98..107: new FixedRecvByteBufAllocator(4096). Instead: new AdaptiveRecvByteBufAllocator(),
        # netty's own default, which starts small and follows the size of what arrives.
        Exchange(
            old=_utf8("io/netty/channel/FixedRecvByteBufAllocator"),
            new=_utf8("io/netty/channel/AdaptiveRecvByteBufAllocator"),
        ),
        Exchange(old=_code("bb0205 59 111000 b70207"), new=_code("bb0205 59 000000 b70207")),
        # Methodref 519, the constructor: (I)V becomes ()V.
        Exchange(
            old=_utf8("io/netty/channel/AdaptiveRecvByteBufAllocator") + _code("0a02050016"),
            new=_utf8("io/netty/channel/AdaptiveRecvByteBufAllocator") + _code("0a02050003"),
        ),
    ),
)
HOLDING = Patch(
    name="org/pytorch/serve/wlm/ModelManager",
    effect="a version scaled to a minimum of -1 has no workers and takes requests into its queue all the same",
    sha256="c32ec7d1b524cc3992b068659874274c0611c2472dfe94eaadcabdc14a5c51bf",
    exchanges=(
        # addJob, 51..65: if (wlm.hasNoWorker(model.getModelVersionName())) return false, which is answered with 503.
        # Instead: if (model.getMinWorkers() == 0) return false. Without workers a version has a minimum of 0, or of -1
        # when they were taken away for the time without work (marina/autoscale_loop.py).
        #   aload 4, invokevirtual Model.getMinWorkers, ifne 68
        Exchange(old=_code("2a b4000d 1904 b602d5 b602d9 990005"), new=_code("1904 b6026e 9a000c", length=15)),
    ),
)
PATCHES = (BATCHES, DISPATCH, RECEIVING, HOLDING)


def write(home: Path, folder: Path, patches: Sequence[Patch] = PATCHES) -> Patched:
    """Write the patched classes of the TorchServe installed in `home` into a jar in `folder`."""
    applied: list[Patch] = []
    refused: list[str] = []
    changed: dict[str, bytes] = {}
    with zipfile.ZipFile(home / JAR) as jar:
        for patch in patches:
            entry = f"{patch.name}.class"
            found = jar.read(entry) if entry in jar.NameToInfo else b""
            if hashlib.sha256(found).hexdigest() != patch.sha256:
                refused.append(f"{patch.name} is not the class of TorchServe 0.12.0")
                continue
            changed[entry] = apply(patch, found)
            applied.append(patch)
    if not changed:
        return Patched(None, (), tuple(refused))
    path = folder / PATCHED_JAR
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as target:
        for entry, content in changed.items():
            target.writestr(zipfile.ZipInfo(entry), content)
    return Patched(path, tuple(applied), tuple(refused))


def apply(patch: Patch, content: bytes) -> bytes:
    """The changed class. Raises ValueError when what is to be exchanged is not there exactly once."""
    changed = _with_constants(content, patch.constants)
    for exchange in patch.exchanges:
        if changed.count(exchange.old) != 1:
            raise ValueError(f"{patch.name}: {exchange.old.hex(' ')} occurs {changed.count(exchange.old)} times")
        changed = changed.replace(exchange.old, exchange.new)
    return changed


def _with_constants(content: bytes, constants: Sequence[bytes]) -> bytes:
    if not constants:
        return content
    (size,) = struct.unpack_from(">H", content, 8)
    end = _pool_end(content, size)
    return (
        content[:8] + struct.pack(">H", size + len(constants)) + content[10:end] + b"".join(constants) + content[end:]
    )


def _pool_end(content: bytes, size: int) -> int:
    """Where the constant pool of `size` numbers, the first of them 1, ends."""
    at, number = 10, 1
    while number < size:
        tag = content[at]
        at += 3 + struct.unpack_from(">H", content, at + 1)[0] if tag == _UTF8 else 1 + _POOL_ENTRY_BYTES[tag]
        number += 2 if tag in _TWO_SLOTS else 1
    return at
