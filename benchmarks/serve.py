"""Serving throughput, ours beside llama.cpp's server and transformers' generate, on one machine and
in one run, by turns: one stream, several, many.

    python benchmarks/serve.py FILE.gguf --llama-cpp PYTHON --transformers PYTHON [--streams 1 8 32]

The file is written once more in float16, which llama-cpp-python's server and ours are both started
with (ours computes in bfloat16, as wide), and in Q8_0 for llama.cpp alone; `drafts`: each with four
tokens guessed from the text. transformers gets our export in bfloat16, all prompts in one batch.
Each server runs alone, and is asked for `--new` greedy tokens after every prompt of about
`--prompt` words. `cached`: our time to the first token after a prompt whose beginning is cached,
over that of the rest alone. `step`: time of a step of the engine alone, and as a share of the
median time from one event to the next that clients of as many streams see. Prints JSON.
"""

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
from perplexity import rewritten
from serve_load import start

GENERATE = """
import json, sys, time, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
directory, new, prompts = sys.argv[1], int(sys.argv[2]), json.load(sys.stdin)
tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left")
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
found = {}
for streams, some in prompts.items():
    batch = tokenizer(some, return_tensors="pt", padding=True)
    with torch.no_grad():
        model.generate(**batch, max_new_tokens=4, min_new_tokens=4, do_sample=False)
        began = time.perf_counter()
        model.generate(**batch, max_new_tokens=new, min_new_tokens=new, do_sample=False)
    found[streams] = len(some) * new / (time.perf_counter() - began)
print(json.dumps(found))
"""


def main() -> None:
    """Runs and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("file")
    parser.add_argument("--llama-cpp", default=os.environ.get("LLAMA_CPP_PYTHON"))
    parser.add_argument("--transformers", default=os.environ.get("TRANSFORMERS_PYTHON"))
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--new", type=int, default=96)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2)
    print(json.dumps(compare(parser.parse_args()), indent=2))


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second of each, the best of the rounds, and ratios."""
    found: dict[str, dict[int, list[Any]]] = {}
    cached: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        wide = Path(scratch) / "float16.gguf"
        rewritten(Path(options.file), wide, np.float16)
        narrow = Path(scratch) / "q8_0.gguf"
        rewritten(Path(options.file), narrow, "Q8_0")
        slots, where = max(options.streams), Path(scratch)
        sides = {
            "ropewalk": lambda: ours(wide, slots, where),
            "ropewalk_drafts": lambda: ours(wide, slots, where, "--drafts", "4"),
        }
        if options.llama_cpp:
            guess = "--draft_model", "prompt-lookup-decoding", "--draft_model_num_pred_tokens", "4"
            sides |= {
                "llama_cpp": lambda: theirs(options.llama_cpp, wide),
                "llama_cpp_drafts": lambda: theirs(options.llama_cpp, wide, *guess),
                "llama_cpp_q8_0": lambda: theirs(options.llama_cpp, narrow),
            }
        for turn in range(options.rounds):
            for name, side in sides.items():
                with side() as address:
                    if name == "ropewalk" and turn == 0:
                        cached = asyncio.run(prefixed(address))
                    for streams in options.streams:
                        try:
                            told = asyncio.run(measured(address, streams, options, turn))
                        except httpx.TransportError as error:  # the others are still measured
                            print(f"{name} ended at {streams} streams: {error}", file=sys.stderr)
                            break
                        print(name, streams, told, file=sys.stderr)
                        found.setdefault(name, {}).setdefault(streams, []).append(told)
        if options.transformers:
            for streams, rate in generated(options, wide, Path(scratch)).items():
                told = {"tokens_per_s": round(rate, 1)}
                found.setdefault("transformers", {})[int(streams)] = [told]
        bare = alone(wide, options)
    best = {
        name: {n: max(told, key=lambda one: one["tokens_per_s"]) for n, told in by.items()}
        for name, by in found.items()
    }
    ratios = {}
    for name, by in best.items():
        mine = best["ropewalk_drafts" if name.endswith("_drafts") else "ropewalk"]
        if not name.startswith("ropewalk"):
            ratios[name] = {
                n: round(mine[n]["tokens_per_s"] / one["tokens_per_s"], 2) for n, one in by.items()
            }
    step = {
        n: {"alone_s": s, "share": round(s / best["ropewalk"][n]["step_s"], 2)}
        for n, s in bare.items()
    }
    told = {"ours_over": ratios, "cached": cached, "step": step}
    return {"new": options.new, "best": best, **told, "all": found}


@contextmanager
def ours(file: Path, slots: int, scratch: Path, *more: str) -> Iterator[str]:
    """The address of our server."""
    how = "--max-length", "1024", "--dtype", "bfloat16", *more
    process, address = start(str(file), scratch / "log", slots, 256, *how)
    try:
        yield address
    finally:
        process.terminate()
        process.wait()


@contextmanager
def theirs(python: str, file: Path, *more: str) -> Iterator[str]:
    """The address of llama-cpp-python's server."""
    command = [python, "-m", "llama_cpp.server", "--model", str(file), "--n_ctx", "1024"]
    command += ["--port", "8931", "--model_alias", "model", "--n_threads", str(os.cpu_count())]
    command += ["--interrupt_requests", "false", *more]  # or a new one ends the one before
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = "http://127.0.0.1:8931"
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"{address}/v1/models").read()
                break
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.1)
        yield address
    finally:
        process.terminate()
        process.wait()


def prompts(streams: int, options: argparse.Namespace, turn: int) -> list[str]:
    """Texts that have nothing in common."""
    rng = random.Random(f"{streams} {turn}")
    words = Path(__file__).read_text().split()
    return [" ".join(rng.choices(words, k=options.prompt)) for _ in range(streams)]


async def measured(
    address: str, streams: int, options: argparse.Namespace, turn: int
) -> dict[str, Any]:
    """Tokens a second of some streams at once, and what one of them sees."""
    times: list[list[float]] = []
    counts: list[int] = []

    async def one(client: httpx.AsyncClient, prompt: str) -> None:
        body = {
            "model": "model", "prompt": prompt, "max_tokens": options.new, "temperature": 0,
            "stream": True, "ignore_eos": True, "stream_options": {"include_usage": True},
        }  # fmt: skip
        came = [time.perf_counter()]
        async with client.stream("POST", f"{address}/v1/completions", json=body) as answer:
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    told = json.loads(line[6:])
                    if told.get("usage"):
                        counts.append(told["usage"]["completion_tokens"])
                    elif told["choices"][0]["text"]:
                        came.append(time.perf_counter())
        times.append(came)

    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=600, limits=limits) as client:
        began = time.perf_counter()
        await asyncio.gather(*(one(client, text) for text in prompts(streams, options, turn)))
        took = time.perf_counter() - began
    first = [came[1] - came[0] for came in times if len(came) > 1]
    steps = np.concatenate([np.diff(came[1:]) for came in times])
    written = sum(counts) if counts else sum(len(came) - 1 for came in times)
    return {
        "tokens_per_s": round(written / took, 1),
        "tokens": written,
        "time_to_first_token_s": round(float(np.median(first)), 4),
        "step_s": round(float(np.median(steps)), 5),
    }


async def prefixed(address: str) -> dict[str, float]:
    """Seconds to the first token, the median of some: of a short prompt, of a long one, and of the
    long one's beginning with another end as long as the short one."""
    rng, words = random.Random(5), Path(__file__).read_text().split()
    found: dict[str, list[float]] = {"short": [], "long": [], "long_cached": []}
    async with httpx.AsyncClient(timeout=600) as client:
        for _ in range(8):
            start = " ".join(rng.choices(words, k=200))
            ends = [" ".join(rng.choices(words, k=30)) for _ in range(3)]
            texts = ends[0], f"{start} {ends[1]}", f"{start} {ends[2]}"
            for name, text in zip(found, texts, strict=True):
                body = {"model": "model", "prompt": text, "max_tokens": 1}
                began = time.perf_counter()
                (await client.post(f"{address}/v1/completions", json=body)).raise_for_status()
                found[name].append(time.perf_counter() - began)
    median = {name: round(float(np.median(each)), 4) for name, each in found.items()}
    return {**median, "ratio": round(median["long_cached"] / median["short"], 2)}


def alone(file: Path, options: argparse.Namespace) -> dict[int, float]:
    """Seconds of a step of the engine without server and scheduler, the median of `--new`, by the
    number of rows; each has read as many tokens as the prompts have, on average."""
    from ropewalk.checkpoint.pretrained import load
    from ropewalk.layers.lm import with_parameters
    from ropewalk.serve.engine import Engine, Row
    from ropewalk.serve.packed import Segment
    from ropewalk.serve.sizes import Sizes
    from ropewalk.serve.slots import Settings

    lm = load(str(file), "bfloat16")
    sizes = Sizes(slots=max(options.streams), length=1024)
    engine = Engine(with_parameters(lm.structure, lm.params), sizes)
    state, found = engine.init_decode_state(), {}
    rows = [
        Row(i, [[i * engine.blocks + j for j in range(engine.blocks)]]) for i in range(sizes.slots)
    ]
    ids = [lm.require_tokenizer().encode(text) for text in prompts(sizes.slots, options, 0)]
    prefix: Any = None
    for row, prompt in zip(rows, ids, strict=True):
        for at in range(0, len(prompt), sizes.chunk):
            part = Segment(prompt[at : at + sizes.chunk], at, row.tables)
            state, prefix = engine.prefill(state, [part])
        state, _ = engine.insert(state, prefix, [(0, row.slot, Settings(limit=1000))])
    for streams in options.streams:
        times = []
        for _ in range(options.new):
            began = time.perf_counter()
            state, chosen = engine.generate(state, rows[:streams])
            chosen.token.block_until_ready()
            times.append(time.perf_counter() - began)
        found[streams] = round(float(np.median(times)), 5)
    return found


def generated(options: argparse.Namespace, file: Path, scratch: Path) -> dict[str, float]:
    """Tokens a second of transformers' generate, by the number of prompts in a batch."""
    import ropewalk

    directory = ropewalk.load(file).save(scratch / "hf", dtype="bfloat16")
    some = {n: prompts(n, options, 0) for n in options.streams}
    command = [options.transformers, "-c", GENERATE, str(directory), str(options.new)]
    told = subprocess.run(
        command, input=json.dumps(some).encode(), stdout=subprocess.PIPE, check=True
    )
    return json.loads(told.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
