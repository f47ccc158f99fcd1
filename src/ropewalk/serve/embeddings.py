"""`/v1/embeddings`: a vector for every input."""

import asyncio
import base64

import numpy as np
from fastapi import Request
from fastapi.responses import JSONResponse, Response

from ropewalk.serve.asked import BadRequest, Embeddings
from ropewalk.serve.completions import unknown, warned
from ropewalk.serve.generation import Failed, Host, attended
from ropewalk.serve.service import Ended, Event, Job, Pooled
from ropewalk.serve.slots import Settings

# Between looks for room that others left.
_ROOM_S = 0.02


async def embeddings(host: Host, asked: Embeddings, request: Request) -> Response:
    """A vector for every input: the mean of the final hidden states, or the last of them, made of
    unit length."""
    host.check_model(asked.model)
    prompts = await host.prompts(asked.input, "input")
    events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
    pooling = asked.pooling or "mean"
    jobs = [
        Job(prompt, Settings(1), i, events, asked.priority or 0, pooled=pooling)
        for i, prompt in enumerate(prompts)
    ]
    rows = np.stack(await attended(request, _pooled(host, jobs))).astype(np.float32)
    if not np.isfinite(rows).all():
        raise Failed("hidden states are no numbers: are the weights?")
    if asked.dimensions is not None:
        if asked.dimensions > rows.shape[1]:
            raise BadRequest(
                f"dimensions {asked.dimensions} are asked for; the model has {rows.shape[1]}",
                "dimensions",
            )
        rows = rows[:, : asked.dimensions]
    rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    as_text = asked.encoding_format == "base64"
    data = [
        {
            "object": "embedding",
            "index": i,
            "embedding": base64.b64encode(row.tobytes()).decode() if as_text else row.tolist(),
        }
        for i, row in enumerate(rows)
    ]
    read = sum(map(len, prompts))
    usage = {"prompt_tokens": read, "total_tokens": read}
    body = {"object": "list", "model": host.name, "data": data, "usage": usage}
    return JSONResponse(body, headers=warned(unknown(asked.unknown)))


async def _pooled(host: Host, jobs: list[Job]) -> list[np.ndarray]:
    """What each job gives. They may be more than the queue holds: only so many are in it at a time
    that half of it is left to others. Raises Failed, and QueueFull where there is no room at first.
    """
    service, found = host.service, dict[int, np.ndarray]()
    sent, most = 0, max(service.limits.queue // 2, 1)
    try:
        while len(found) < len(jobs):
            room = min(most - (sent - len(found)), service.limits.queue - service.open)
            portion = jobs[sent : sent + max(room, 0 if sent else 1)]
            service.submit(portion)
            sent += len(portion)
            if sent == len(found):
                await asyncio.sleep(_ROOM_S)
                continue
            i, event = await jobs[0].events.get()
            if isinstance(event, Pooled):
                found[i] = event.hidden
            elif isinstance(event, Ended) and i not in found:
                raise Failed(event.error or "the request was cancelled")
    finally:
        service.cancel(jobs[:sent])
    return [found[i] for i in range(len(jobs))]
