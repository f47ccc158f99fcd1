"""A train step beside MaxText's: step time, time to the end of the first step, peak memory.

Runs the two commands by turns, each with an empty compilation cache, and prints the ratio of the
medians.

    python benchmarks/train_step.py --json [--runs 3] [--dtype float32 bfloat16] [--maxtext PYTHON]
    python benchmarks/train_step.py --parts            where a step of ours spends its time

MaxText 0.2.5 is run where `--maxtext` (or the environment's MAXTEXT_PYTHON) names the Python it is
installed for; without one, only ours is measured.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
PRECISION = {"float32": "float32", "bfloat16": "mixed"}
# MaxText at its best on a CPU, by dtype.
MAXTEXT = {
    "float32": ["dtype=float32", "scan_layers=false", "num_vocab_tiling=4"],
    "bfloat16": ["dtype=bfloat16", "scan_layers=true", "num_vocab_tiling=4"],
}
MAXTEXT_COMMON = [
    "dataset_type=synthetic",
    "enable_checkpointing=false",
    "skip_jax_distributed_system=true",
    "model_name=default",
    "decoder_block=llama2",
    "base_emb_dim=256",
    "base_mlp_dim=1024",
    "base_num_query_heads=4",
    "base_num_kv_heads=4",
    "head_dim=64",
    "base_num_decoder_layers=4",
    "vocab_size=32000",
    "attention=dot_product",
    'mlp_activations=["silu","linear"]',
    "hardware=cpu",
    "max_target_length=512",
    "per_device_batch_size=4",
    "steps=14",
    "enable_tensorboard=false",
    "enable_goodput_recording=false",
    "monitor_goodput=false",
    "gradient_clipping_threshold=1.0",
    "run_name=peer",
]


def main() -> None:
    """Runs and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--parts", action="store_true")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--dtype", nargs="+", choices=list(PRECISION), default=list(PRECISION))
    parser.add_argument("--maxtext", default=os.environ.get("MAXTEXT_PYTHON"))
    parser.add_argument(
        "overrides", nargs="*", help="changes to the recipe of ours, e.g. layout.remat=full"
    )
    options = parser.parse_args()
    if options.parts:
        from parts import parts

        results = {
            dtype: parts(HERE / "train_step.yml", PRECISION[dtype]) for dtype in options.dtype
        }
    else:
        results = {dtype: compare(dtype, options) for dtype in options.dtype}
    print(json.dumps(results, indent=None if options.json else 2))


def compare(dtype: str, options: argparse.Namespace) -> dict[str, object]:
    """Runs of both by turns; the medians of each, and their ratios (ours over theirs)."""
    ours, theirs = [], []
    for _ in range(options.runs):
        ours.append(run_ours(dtype, options.overrides))
        if options.maxtext:
            theirs.append(run_maxtext(dtype, options.maxtext))
    result: dict[str, object] = {"ours": middle(ours)}
    if theirs:
        result["maxtext"] = middle(theirs)
        result["ratio"] = {k: round(middle(ours)[k] / middle(theirs)[k], 3) for k in ours[0]}
        result["step_ratio_range"] = [
            round(a["step_s"] / b["step_s"], 3) for a, b in zip(ours, theirs, strict=True)
        ]
    return result


def middle(runs: list[dict[str, float]]) -> dict[str, float]:
    """The median of each figure over the runs."""
    return {name: round(statistics.median(run[name] for run in runs), 4) for name in runs[0]}


def run_ours(dtype: str, overrides: list[str]) -> dict[str, float]:
    """`ropewalk train` with an empty cache; step times are those between lines of metrics.jsonl."""
    with tempfile.TemporaryDirectory() as scratch:
        command = Path(sys.executable).parent / "ropewalk"
        words = ["train", str(HERE / "train_step.yml"), f"directory={scratch}/run"]
        words += [f"precision={PRECISION[dtype]}", *overrides]
        env = {**os.environ, "JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": scratch}
        start = time.time()
        peak = wait([str(command), *words], env, lambda line: None)
        lines = (Path(scratch) / "run" / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        times = {row["step"]: row["time"] for row in rows if "loss" in row}
        return figures(start, times, peak)


def run_maxtext(dtype: str, python: str) -> dict[str, float]:
    """MaxText's trainer with an empty cache; step times are those between its `completed step`
    lines."""
    with tempfile.TemporaryDirectory() as scratch:
        found = 'u.find_spec("maxtext").submodule_search_locations[0]'
        find = f"import importlib.util as u; print({found})"
        home = subprocess.run([python, "-c", find], capture_output=True, text=True, check=True)
        base = Path(home.stdout.strip()) / "configs" / "base.yml"
        words = [f"base_output_directory={scratch}/out", f"jax_cache_dir={scratch}/cache"]
        env = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "DECOUPLE_GCLOUD": "TRUE",
            "TPU_SKIP_MDS_QUERY": "1",
        }
        module = [python, "-m", "maxtext.trainers.pre_train.train", str(base)]
        times: dict[int, float] = {}

        def note(line: str) -> None:
            found = re.search(r"completed step: (\d+)", line)
            if found:
                times[int(found[1]) + 1] = time.time()

        start = time.time()
        peak = wait([*module, *words, *MAXTEXT_COMMON, *MAXTEXT[dtype]], env, note)
        return figures(start, times, peak)


def wait(command: list[str], env: dict[str, str], note) -> float:
    """Runs a command to its end, handing its stderr to `note` line by line; returns its peak
    MiB."""
    process = subprocess.Popen(
        command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    tail: list[str] = []
    for line in process.stderr or ():
        tail = [*tail[-20:], line]
        note(line)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{command[0]} failed:\n{''.join(tail)}")
    return usage.ru_maxrss / 1024


def figures(start: float, times: dict[int, float], peak: float) -> dict[str, float]:
    """What a run took. The first two steps are left out of the step time."""
    steps = [times[n] - times[n - 1] for n in sorted(times) if n > 3]
    return {
        "step_s": statistics.median(steps),
        "first_step_end_s": times[1] - start,
        "peak_mib": peak,
    }


if __name__ == "__main__":
    main()
