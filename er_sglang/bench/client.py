"""Send requests to a server's /generate."""

import asyncio
import json
import time
from collections.abc import Sequence

import aiohttp
from tqdm import tqdm

from er_sglang.bench.load import Completion, LoadResult, Request, payload


def run_load(
    base_url: str, requests: Sequence[Request], *, concurrency: int, description: str = "requests"
) -> LoadResult:
    """Send `requests`, at most `concurrency` at a time, and wait for all of them.

    Raises RuntimeError with the server's words if a request fails.
    """
    return asyncio.run(_run_load(base_url, requests, concurrency, description))


async def _run_load(base_url, requests, concurrency, description) -> LoadResult:
    slots = asyncio.Semaphore(concurrency)
    began_unix_s, origin_s = time.time(), time.perf_counter()
    session = aiohttp.ClientSession(
        base_url, timeout=aiohttp.ClientTimeout(total=None), connector=aiohttp.TCPConnector(limit=0), read_bufsize=2**20
    )
    # Requests that all start at once travel together: sent one by one, the last may come a hundred steps after the
    # first.
    groups = [requests] if concurrency >= len(requests) else [[request] for request in requests]
    async with session:
        with tqdm(total=len(requests), desc=description, mininterval=1.0, leave=False) as bar:

            async def send(group: Sequence[Request]) -> list[Completion]:
                async with slots:
                    return await _stream(session, group, origin_s, bar)

            answers = await asyncio.gather(*(send(group) for group in groups))
    return LoadResult(
        began_unix_s=began_unix_s, completions=tuple(completion for group in answers for completion in group)
    )


async def _stream(
    session: aiohttp.ClientSession, requests: Sequence[Request], origin_s: float, bar: tqdm
) -> list[Completion]:
    """Completions of `requests`, sent as one call."""
    start_s = time.perf_counter() - origin_s
    chunks: list[list[tuple[float, dict]]] = [[] for _ in requests]
    async with session.post("/generate", json=payload(requests)) as response:
        if response.status != 200:
            raise RuntimeError(f"/generate answered {response.status}: {await response.text()}")
        async for line in response.content:
            if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                continue
            chunk = json.loads(line.removeprefix(b"data: "))
            if "error" in chunk:
                raise RuntimeError(f"/generate failed: {chunk['error']}")
            finish_reason = chunk["meta_info"]["finish_reason"]
            if finish_reason and finish_reason["type"] == "abort":
                raise RuntimeError(f"/generate was aborted: {finish_reason}")
            chunks[chunk["index"]].append((time.perf_counter() - origin_s, chunk))
            bar.update(finish_reason is not None)
    return [
        Completion(
            start_s=start_s,
            end_s=received[-1][0],
            times_s=tuple(time_s for time_s, _ in received),
            tokens=tuple(chunk["meta_info"]["completion_tokens"] for _, chunk in received),
            text=received[-1][1].get("text", ""),
            meta_info=received[-1][1]["meta_info"],
        )
        for received in chunks
    ]
