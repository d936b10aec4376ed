"""FastAPI under uvicorn, started with `uvicorn benchmarks.peers.fastapi_server:app`.

documented: the usual tutorial, one `def` endpoint that takes an UploadFile, so that requests run in the thread pool.
optimised:  a raw body, decoded in a thread pool, gathered by a micro-batcher into batches for one inference thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

from fastapi import FastAPI, File, Request, UploadFile
from torch import Tensor

from benchmarks.peers.settings import Settings
from benchmarks.pipeline import Answer

settings = Settings.read()
classifier = settings.classifier()
decoding = ThreadPoolExecutor(max(1, settings.threads), thread_name_prefix="decode")
inference = ThreadPoolExecutor(1, thread_name_prefix="inference")
waiting: asyncio.Queue[tuple[bytes, asyncio.Future[Answer]]] = asyncio.Queue()


def answer(bodies: list[bytes]) -> list[Answer]:
    items: list[Tensor] = (
        [*decoding.map(classifier.decode, bodies)]
        if settings.threads > 1
        else [classifier.decode(body) for body in bodies]
    )
    return classifier.classify(items)


async def batches() -> None:
    """Take what waits, at most a batch; while one batch runs the next one gathers."""
    while True:
        taken = [await waiting.get()]
        while len(taken) < settings.batch and not waiting.empty():
            taken.append(waiting.get_nowait())
        loop = asyncio.get_running_loop()
        try:
            answers = await loop.run_in_executor(inference, answer, [body for body, _ in taken])
        except Exception as error:  # noqa: BLE001 - each request of the batch gets it
            for _, future in taken:
                future.set_exception(error)
            continue
        for (_, future), found in zip(taken, answers, strict=True):
            future.set_result(found)


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    task = asyncio.create_task(batches())
    yield
    task.cancel()


app = FastAPI(lifespan=lifespan if settings.optimised else None)

if settings.optimised:

    @app.post("/predict")
    async def predict(request: Request) -> Answer:
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        waiting.put_nowait((await request.body(), future))
        return await future

else:

    @app.post("/predict")
    def predict_upload(file: UploadFile = File(...)) -> Answer:  # noqa: B008 - as FastAPI's documentation has it
        return classifier.classify([classifier.decode(file.file.read())])[0]
