"""A server under twice the load it can take: are requests lost, doubled or altered, does memory
grow, is anything compiled or left behind?

    python benchmarks/serve_load.py [--requests 10000] [--model DIRECTORY] [--slots 8] [--queue 32]
    python benchmarks/serve_load.py --kills 20

Starts `ropewalk serve`, asks every prompt once alone, then sends requests in bursts so that twice
as many are open as there are slots and places in the queue: half of them as streams, three in ten
given up at a random moment. Every whole answer must be the one that its prompt had alone; one that
was given up must be a beginning of it; the rest are answered 429. Before that, 1,000 requests with
random lengths and options. `--kills` ends a server that is being asked with SIGTERM, again and
again, and once with SIGKILL: how many ended cleanly, with every answer that had begun whole. Prints
JSON. Without --model, a tiny model with random weights is served.
"""

import argparse
import asyncio
import json
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx2 as httpx


def main() -> None:
    """Runs and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--model")
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--queue", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kills", type=int, default=0)
    options = parser.parse_args()
    if options.kills:
        print(json.dumps(killed(options), indent=2))
        return
    with tempfile.TemporaryDirectory() as scratch:
        model = options.model or _tiny(Path(scratch) / "model")
        log = Path(scratch) / "log"
        process, address = start(model, log, options.slots, options.queue)
        try:
            result = asyncio.run(Load(options, process.pid, address).run())
        finally:
            process.terminate()
            result_code = process.wait(timeout=60)
    print(json.dumps({**result, "exit_code_after_sigterm": result_code}, indent=2))


def killed(options: argparse.Namespace) -> dict[str, Any]:
    """Servers that are ended while they are asked."""
    rng, found = random.Random(options.seed), []
    with tempfile.TemporaryDirectory() as scratch:
        model, log = options.model or _tiny(Path(scratch) / "model"), Path(scratch) / "log"
        for number in range(options.kills + 1):
            sign = signal.SIGTERM if number < options.kills else signal.SIGKILL
            process, address = start(model, log, options.slots, options.queue)
            load = Load(options, process.pid, address)
            asyncio.run(load.until(process, sign, rng.uniform(0.1, 1.5)))
            began = time.perf_counter()
            code = process.wait(timeout=60)
            seconds = round(time.perf_counter() - began, 2)
            found.append({"sign": sign.name, "code": code, "s": seconds, **load.counts})
        process, address = start(model, log, options.slots, options.queue)
        asyncio.run(Load(options, process.pid, address).alone_again())
        process.terminate()
        after = process.wait(timeout=60)
    clean = [one["code"] == 0 and not one.get("cut") for one in found[:-1]]
    return {"clean": sum(clean), "of": options.kills, "after_sigkill": after, "each": found}


def start(
    model: str, log: Path, slots: int, queue: int, *more: str
) -> tuple[subprocess.Popen[bytes], str]:
    """A server's process and address, when it is ready."""
    command = [sys.executable, "-m", "ropewalk", "serve", model, "--name", "model", "--port", "0"]
    command += ["--slots", str(slots), "--queue", str(queue), *more]
    with log.open("wb") as file:
        process = subprocess.Popen(command, stderr=file)
    while True:
        ended = process.poll() is not None
        text = log.read_text()
        if found := re.search(r"served at (http://\S+)", text):
            return process, found[1]
        if ended:
            raise SystemExit(text)
        time.sleep(0.1)


def _tiny(directory: Path) -> str:
    from tests.serve.tiny_server import tiny_model

    return str(tiny_model(directory))


class Load:
    """The requests, and what became of them."""

    def __init__(self, options: argparse.Namespace, pid: int, address: str):
        self.options, self.pid, self.address = options, pid, address
        self.rng = random.Random(options.seed)
        words = ["rope", "strand", "lane", "hemp", "tar", "yarn", "twist", "spin", "knot", "sail"]
        self.prompts = [
            " ".join(self.rng.choices(words, k=self.rng.randint(2, 30))) for _ in range(100)
        ]
        self.alone: list[str] = []
        self.counts: dict[str, int] = {}
        self.first: list[float] = []
        self.altered: list[Any] = []

    async def run(self) -> dict[str, Any]:
        """Everything in order."""
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=200)
        async with httpx.AsyncClient(limits=limits, timeout=300) as client:
            for prompt in self.prompts:
                answer = await client.post(self._url, json=self._body(prompt, False))
                self.alone.append(answer.json()["choices"][0]["text"])
            at_first = await self._metrics(client)
            await self._varied(client, 1000)
            compiled = await self._metrics(client)
            used = await self._saturated(client)
            await self._burst(client, self.options.requests // 10)
            before, began = self._process(), time.perf_counter()
            self.counts.clear()
            await self._burst(client, self.options.requests)
            took = time.perf_counter() - began
            await asyncio.sleep(1.0)
            metrics = await self._metrics(client)
        after = self._process()
        return {
            "requests": self.options.requests,
            "slots": self.options.slots,
            "queue": self.options.queue,
            "outcomes": dict(sorted(self.counts.items())),
            "lost": self.options.requests - sum(self.counts.values()),
            "altered": self.altered[:5],
            "requests_per_s": round(self.options.requests / took, 1),
            "time_to_first_token_s_median": round(statistics.median(self.first), 4),
            "resident_mb": [before["resident_mb"], after["resident_mb"]],
            "descriptors": [before["descriptors"], after["descriptors"]],
            "threads": [before["threads"], after["threads"]],
            "left": {
                name: _value(metrics, name)
                for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
            },
            "slot_use_when_saturated": round(used, 3),
            "compiled_by_1000_varied": _more("engine_programs", at_first, compiled),
            "compiled_by_load": _more("engine_programs", compiled, metrics),
        }

    async def until(self, process: subprocess.Popen[bytes], sign: int, after_s: float) -> None:
        """Asks without a pause, and ends the server after some time: `whole` answers, those that
        were `cut`, and those that were `refused` since they came too late."""
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(limits=limits, timeout=60) as client:
            tasks = [asyncio.create_task(self._again(client)) for _ in range(self.options.slots)]
            await asyncio.sleep(after_s)
            process.send_signal(sign)
            await asyncio.gather(*tasks)

    async def _again(self, client: httpx.AsyncClient) -> None:
        while True:
            body, begun = self._body(self.rng.choice(self.prompts), True), False
            try:
                async with client.stream("POST", self._url, json=body) as answer:
                    begun = answer.status_code == 200
                    lines = [line async for line in answer.aiter_lines()]
            except httpx.TransportError:
                self._count("cut" if begun else "refused")
                return
            whole = "data: [DONE]" in lines and not any('{"error"' in line for line in lines)
            self._count("whole" if whole else "cut" if begun else "refused")
            if not begun:
                return

    async def alone_again(self) -> None:
        """One request. Raises for an answer that is none."""
        async with httpx.AsyncClient(timeout=60) as client:
            (await client.post(self._url, json=self._body("rope", False))).raise_for_status()

    async def _metrics(self, client: httpx.AsyncClient) -> str:
        return (await client.get(f"{self.address}/metrics")).text

    async def _saturated(self, client: httpx.AsyncClient) -> float:
        """The part of all slots that write in a step, while more sequences wait."""
        body = {**self._body("rope", False), "max_tokens": 128, "ignore_eos": True}
        many = self.options.slots + self.options.queue
        tasks = [asyncio.create_task(client.post(self._url, json=body)) for _ in range(many)]
        seen: list[str] = []
        while not all(task.done() for task in tasks):
            now = await self._metrics(client)
            if _value(now, "num_requests_waiting"):
                seen.append(now)
            await asyncio.sleep(0.02)
        await asyncio.gather(*tasks)
        rows, steps = (
            _more(f"engine_{name}_total", seen[0], seen[-1]) for name in ("rows", "steps")
        )
        return rows / steps / self.options.slots

    async def _varied(self, client: httpx.AsyncClient, count: int) -> None:
        """Requests with random lengths and options, as many at a time as are taken."""
        rng, gate = self.rng, asyncio.Semaphore(self.options.slots + self.options.queue // 4)

        async def one() -> None:
            body: dict[str, Any] = {
                **self._body("x" * rng.randint(1, 150), rng.random() < 0.5),
                "max_tokens": rng.randint(1, 40), "temperature": rng.choice([0, 0.7, 1.5]),
                "seed": rng.randrange(2**32), "n": rng.choice([1, 1, 1, 2, 3]),
            }  # fmt: skip
            more: dict[str, Any] = {
                "top_p": 0.9, "top_k": 20, "min_p": 0.05, "presence_penalty": 0.5,
                "frequency_penalty": 0.5, "repetition_penalty": 1.2, "logit_bias": {"70": 5},
                "logprobs": 3, "stop": ["ab"], "echo": True, "ignore_eos": True,
            }  # fmt: skip
            body |= {name: more[name] for name in more if rng.random() < 0.25}
            url = self._url
            if rng.random() < 0.2:
                form = {"type": "regex", "regex": "[a-z ]{5,30}"}
                body |= {"response_format": form, "logprobs": True, "max_tokens": 40}
                body["messages"] = [{"role": "user", "content": body.pop("prompt")}]
                url = f"{self.address}/v1/chat/completions"
            async with gate:
                answer = await client.post(url, json=body)
            if answer.status_code != 200:
                raise SystemExit(f"{body}: {answer.status_code} {answer.text}")

        await asyncio.gather(*[one() for _ in range(count)])

    async def _burst(self, client: httpx.AsyncClient, count: int) -> None:
        """Twice as many at a time as the server takes, in bursts."""
        most = 2 * (self.options.slots + self.options.queue)
        gate, tasks = asyncio.Semaphore(most), []
        for number in range(count):
            if number % most == 0:
                await asyncio.sleep(self.rng.uniform(0, 0.3))
            await gate.acquire()
            task = asyncio.create_task(self._one(client, self.rng.random()))
            task.add_done_callback(lambda _: gate.release())
            tasks.append(task)
        await asyncio.gather(*tasks)

    async def _one(self, client: httpx.AsyncClient, chance: float) -> None:
        which = self.rng.randrange(len(self.prompts))
        streams, leaves = self.rng.random() < 0.5, chance < 0.3
        body = self._body(self.prompts[which], streams)
        patience = self.rng.uniform(0, 0.3) if leaves else 300
        ask = self._streamed if streams else self._whole
        try:
            async with asyncio.timeout(patience):
                outcome = await ask(client, body, self.alone[which])
        except TimeoutError:
            outcome = "given up"
        except (httpx.TransportError, ValueError) as error:
            outcome = f"failed: {type(error).__name__}"
        self._count(outcome)

    async def _whole(self, client: httpx.AsyncClient, body: dict[str, Any], wanted: str) -> str:
        answer = await client.post(self._url, json=body)
        refused = self._refused(answer)
        return refused or self._checked(answer.json()["choices"][0]["text"], wanted)

    async def _streamed(self, client: httpx.AsyncClient, body: dict[str, Any], wanted: str) -> str:
        text, began = "", time.perf_counter()
        async with client.stream("POST", self._url, json=body) as answer:
            if refused := self._refused(answer):
                return refused
            async for line in answer.aiter_lines():
                if line.startswith('data: {"error"'):
                    return f"failed: {line}"
                if line.startswith("data: {"):
                    if not text:
                        self.first.append(time.perf_counter() - began)
                    text += json.loads(line[6:])["choices"][0]["text"]
                    if not wanted.startswith(text):  # also of one that is given up later
                        self.altered.append([text, wanted])
        return self._checked(text, wanted)

    def _refused(self, answer: httpx.Response) -> str:
        if answer.status_code == 200:
            return ""
        told = answer.status_code == 429 and "retry-after" in answer.headers
        return "429" if told else f"status {answer.status_code}"

    def _checked(self, text: str, wanted: str) -> str:
        if text == wanted:
            return "answered"
        self.altered.append([text, wanted])
        return "altered"

    def _count(self, outcome: str) -> None:
        self.counts[outcome] = self.counts.get(outcome, 0) + 1

    @property
    def _url(self) -> str:
        return f"{self.address}/v1/completions"

    def _body(self, prompt: str, streams: bool) -> dict[str, Any]:
        return {
            "model": "model", "prompt": prompt, "max_tokens": 8 + len(prompt) % 24,
            "temperature": 0, "stream": streams,
        }  # fmt: skip

    def _process(self) -> dict[str, Any]:
        status = Path(f"/proc/{self.pid}/status").read_text()

        def number(name: str) -> int:
            found = re.search(rf"{name}:\s+(\d+)", status)
            return int(found[1]) if found else -1

        return {
            "resident_mb": number("VmRSS") // 1024,
            "threads": number("Threads"),
            "descriptors": len(list(Path(f"/proc/{self.pid}/fd").iterdir())),
        }


def _value(metrics: str, name: str) -> float:
    found = re.search(rf"^ropewalk:{name}\{{[^}}]*\}} (\S+)$", metrics, re.M)
    return float(found[1]) if found else float("nan")


def _more(name: str, before: str, after: str) -> float:
    return _value(after, name) - _value(before, name)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main()
