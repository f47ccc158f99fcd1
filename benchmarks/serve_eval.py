"""The same questions with `lm-eval` to our server, by log-probabilities of its completions, and to
transformers: as many right answers, and the same likelihoods?

    python benchmarks/serve_eval.py FILE.gguf TEXT --lm-eval PYTHON [--questions 100] [--dtype
    float32]

PYTHON is one with `lm-eval[api,hf]`, torch and transformers. A question is a paragraph of the text
cut in half, with its own second half and those of three others to choose from. Prints JSON.
"""

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import ropewalk

TASK = """
task: halves
dataset_path: json
dataset_kwargs: {data_files: {test: QUESTIONS}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{first}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
target_delimiter: " "
metric_list: [{metric: acc}, {metric: acc_norm}]
"""


def main() -> None:
    """Runs and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("file")
    parser.add_argument("text")
    parser.add_argument("--lm-eval", required=True)
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        print(json.dumps(compare(options, Path(scratch)), indent=2))


def compare(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Both sides' results, and how far their likelihoods differ."""
    from serve_load import start

    model = scratch / "model"
    ropewalk.load(options.file, dtype=options.dtype).save(model)
    questions = scratch / "questions.jsonl"
    questions.write_text("".join(map(_line, _questions(options))))
    (scratch / "halves.yaml").write_text(TASK.replace("QUESTIONS", str(questions)))
    process, address = start(str(model), scratch / "log", 8, 64, "--dtype", options.dtype)
    try:
        url = f"model=model,base_url={address}/v1/completions,num_concurrent=8,tokenizer={model}"
        ours = _evaluated(options, scratch, "local-completions", url)
    finally:
        process.terminate()
        process.wait()
    local = f"pretrained={model},dtype={options.dtype}"
    theirs = _evaluated(options, scratch, "hf", local)
    apart = [abs(a - b) for a, b in zip(ours["each"], theirs["each"], strict=True)]
    sides = {"ropewalk": ours["results"], "transformers": theirs["results"]}
    return {**sides, "likelihoods": len(apart), "largest_difference_nats": round(max(apart), 5)}


def _questions(options: argparse.Namespace) -> list[dict[str, Any]]:
    rng = random.Random(0)
    text = Path(options.text).read_text().replace("\\n", "\n")
    paragraphs = [" ".join(x.split()) for x in re.split(r"\n\s*\n", text)]
    halves = [
        (w[: len(w) // 2], w[len(w) // 2 :]) for x in paragraphs if 24 < len(w := x.split()) < 80
    ]
    found = []
    for first, second in rng.sample(halves, options.questions):
        others = [other for _, other in rng.sample(halves, 4) if other != second][:3]
        choices = [" ".join(each) for each in (second, *others)]
        rng.shuffle(choices)
        answer = choices.index(" ".join(second))
        found.append({"first": " ".join(first), "choices": choices, "answer": answer})
    return found


def _line(question: dict[str, Any]) -> str:
    return json.dumps(question) + "\n"


def _evaluated(
    options: argparse.Namespace, scratch: Path, kind: str, arguments: str
) -> dict[str, Any]:
    out = scratch / kind
    command = [options.lm_eval, "-m", "lm_eval", "run", "--model", kind, "--model_args", arguments]
    command += ["--tasks", "halves", "--include_path", str(scratch), "--output_path", str(out)]
    command += ["--log_samples", "--batch_size", "1"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(scratch / "home")}
    environment = {**os.environ, **offline, "OPENAI_API_KEY": "none"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-4000:])
    results = json.loads(next(out.rglob("results_*.json")).read_text())["results"]["halves"]
    samples = next(out.rglob("samples_*.jsonl")).read_text().splitlines()
    told = sorted((json.loads(line) for line in samples), key=lambda one: one["doc_id"])
    each = [float(answer[0][0]) for one in told for answer in one["resps"]]
    kept = {name: results[name] for name in ("acc,none", "acc_norm,none")}
    return {"results": kept, "each": each}


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main()
