"""Decoding one sequence: time a token, and the bytes it reads over what this machine can read.

    python benchmarks/decode.py --json [--model smollm2-135m] [--dtype float32 bfloat16] [--tokens
    64]

A token of one sequence reads every weight once and the cache, so the read bandwidth (the sum of a
256 MB array, measured before and after) is the ceiling. MaxText 0.2.5's engine decodes the same
shape in float32 at 31 ms a token on the machine where this read 47 GB/s.
"""

import argparse
import itertools
import json
import statistics
import time

import jax
import jax.numpy as jnp

import ropewalk
from ropewalk.layers.decode import Sampling


def main() -> None:
    """Runs and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=64)
    options = parser.parse_args()
    results = {dtype: decode(options, dtype) for dtype in options.dtype}
    print(json.dumps(results, indent=None if options.json else 2))


def decode(options: argparse.Namespace, dtype: str) -> dict[str, float]:
    """Time from token to token after a prompt, the median over the tokens of the best of three
    runs."""
    lm = ropewalk.load(options.model, dtype=dtype)
    prompt = [1 + i % 1000 for i in range(options.prompt)]
    sampling = Sampling(max_new_tokens=options.tokens)
    before = read_bandwidth()
    runs = []
    for _ in range(4):
        times = [time.perf_counter()]
        times += [time.perf_counter() for _ in lm.decoder.stream([prompt], sampling)]
        runs.append(times)
    gaps = [statistics.median(b - a for a, b in itertools.pairwise(t[2:])) for t in runs[1:]]
    token_s = min(gaps)
    bandwidth = max(before, read_bandwidth())
    weights = sum(a.nbytes for a in lm.params.values())
    if not lm.config.tie_word_embeddings:  # one row is read of an embedding that is no head
        weights -= lm.params["embed.weight"].nbytes
    return {
        "token_ms": round(token_s * 1e3, 2),
        "prefill_ms": round(min(t[1] - t[0] for t in runs[1:]) * 1e3, 1),
        "bytes_a_token": weights,
        "read_gb_s": round(bandwidth / 1e9, 1),
        "share_of_bandwidth": round(weights / token_s / bandwidth, 3),
    }


def read_bandwidth() -> float:
    """Bytes a second of summing 256 MB, the best of ten."""
    values = jnp.ones(1 << 26, jnp.float32)
    total = jax.jit(jnp.sum)
    total(values).block_until_ready()
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        total(values).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return values.nbytes / best


if __name__ == "__main__":
    main()
