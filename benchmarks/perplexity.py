"""A GGUF file's perplexity on a fixed text, ours beside llama.cpp's, and whether both read the same
tokens.

    python benchmarks/perplexity.py FILE.gguf --llama-cpp PYTHON [--tokens 4096] [--chunk 1024]

llama-cpp-python is run where `--llama-cpp` (or the environment's LLAMA_CPP_PYTHON) names the Python
it is installed for. The text is a play of the bundled corpus, in chunks that each begin with BOS.
llama.cpp rounds the inputs of its products to the 8 bits of the file's blocks, its keys and values
to float16; so it also runs on a copy of the file in float32 with a float32 cache ("float32"), which
differs from ours by the rounding of sums alone.
"""

import argparse
import bz2
import json
import os
import subprocess
import sys
import tempfile
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

CORPUS = "recipes/corpus/shakespeare.jsonl.bz2"


def main() -> None:
    """Runs and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("file")
    parser.add_argument("--llama-cpp", default=os.environ.get("LLAMA_CPP_PYTHON"))
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--chunk", type=int, default=1024, help="tokens in one forward pass")
    parser.add_argument("--float32", action="store_true", help="llama.cpp's cache in float32")
    parser.add_argument("--theirs", help=argparse.SUPPRESS)  # where the child writes
    options = parser.parse_args()
    if options.theirs:
        return theirs(options)
    if not options.llama_cpp:
        parser.error("name the Python of llama-cpp-python with --llama-cpp or LLAMA_CPP_PYTHON")
    print(json.dumps(compare(options), indent=2))


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Both sides' perplexities, and the differences from token to token."""
    first = bz2.decompress((resources.files("ropewalk") / CORPUS).read_bytes()).splitlines()[0]
    text = json.loads(first)["text"]
    ids, logprobs = ours(options, text)
    result = {
        "file": Path(options.file).name,
        "tokens": len(logprobs),
        "chunk": options.chunk,
        "ropewalk": {"perplexity": perplexity(logprobs)},
    }
    with tempfile.TemporaryDirectory() as scratch:
        plain = Path(scratch) / "float32.gguf"
        rewritten(Path(options.file), plain, np.float32)
        runs = {"llama_cpp": (options.file, []), "float32": (str(plain), ["--float32"])}
        for name, (file, more) in runs.items():
            their_ids, their_logprobs = run_theirs(options, file, more, text, Path(scratch))
            result["ids_agree"] = result.get("ids_agree", True) and ids == their_ids
            result[name] = {
                "perplexity": perplexity(their_logprobs),
                "ratio": round(float(np.exp(np.mean(their_logprobs - logprobs))), 6),
                "mean_abs_logprob_difference": float(np.mean(np.abs(their_logprobs - logprobs))),
            }
    return result


def ours(options: argparse.Namespace, text: str) -> tuple[list[int], np.ndarray]:
    """The text's ids, and the log-probability float32 [n] of each token that is predicted."""
    import ropewalk  # their Python has none

    lm = ropewalk.load(options.file, dtype="float32")
    tokenizer = lm.require_tokenizer()
    ids = tokenizer.encode(text)
    found = [
        scored(lm.logits([chunk])[0], chunk) for chunk in chunks(options, ids, tokenizer.bos_id)
    ]
    return ids, np.concatenate(found)


def theirs(options: argparse.Namespace) -> None:
    """The child: reads the text, writes an array with ids and one with log-probabilities."""
    import llama_cpp  # in an environment of its own  # pyright: ignore[reportMissingImports]

    cache = {"type_k": 0, "type_v": 0} if options.float32 else {}  # GGML_TYPE_F32
    lm = llama_cpp.Llama(
        options.file,
        n_ctx=options.chunk,
        n_batch=options.chunk,
        n_ubatch=options.chunk,
        logits_all=True,
        verbose=False,
        **cache,
    )
    ids = lm.tokenize(sys.stdin.buffer.read(), add_bos=False, special=False)
    bos = lm.token_bos()
    found = []
    for chunk in chunks(options, ids, bos if bos >= 0 else None):
        lm.reset()
        lm.eval(chunk)
        found.append(scored(lm.scores[: len(chunk)], chunk))
    np.savez(options.theirs, ids=np.array(ids), logprobs=np.concatenate(found))


def run_theirs(
    options: argparse.Namespace, file: str, more: list[str], text: str, scratch: Path
) -> tuple[list[int], np.ndarray]:
    """What `theirs` finds in the Python of llama.cpp."""
    target = scratch / "found.npz"
    sizes = ["--tokens", str(options.tokens), "--chunk", str(options.chunk)]
    command = [options.llama_cpp, __file__, file, *sizes, *more, "--theirs", str(target)]
    subprocess.run(command, input=text.encode(), stderr=subprocess.PIPE, check=True)
    with np.load(target) as found:
        return found["ids"].tolist(), found["logprobs"]


def chunks(options: argparse.Namespace, ids: list[int], bos: int | None) -> list[list[int]]:
    """As many whole chunks as hold the tokens that are asked for."""
    first = [] if bos is None else [bos]
    size = options.chunk - len(first)
    return [first + ids[at : at + size] for at in range(0, options.tokens - size + 1, size)]


def scored(logits: np.ndarray, chunk: list[int]) -> np.ndarray:
    """Natural logarithm [t - 1] of the probability of every token after the first, by logits
    [t, v]."""
    rows = []
    for row, token in zip(logits[:-1], chunk[1:], strict=True):
        wide = row.astype(np.float64)
        top = wide.max()
        rows.append(wide[token] - top - np.log(np.exp(wide - top).sum()))
    return np.array(rows)


def perplexity(logprobs: np.ndarray) -> float:
    """The exponential of the mean surprise."""
    return round(float(np.exp(-np.mean(logprobs))), 4)


def rewritten(source: Path, target: Path, dtype: Any) -> None:
    """Writes the same model with its matrices in `dtype`, of numpy or "Q8_0", and its vectors in
    float32."""
    import gguf  # their Python has none

    reader = gguf.GGUFReader(source)
    fields = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    architecture = fields.pop(gguf.Keys.General.ARCHITECTURE).contents()
    writer = gguf.GGUFWriter(target, architecture)
    for name, field in fields.items():
        value = 0 if name == gguf.Keys.General.FILE_TYPE else field.contents()
        inner = field.types[-1] if len(field.types) > 1 else None
        writer.add_key_value(name, value, field.types[0], inner)
    for tensor in reader.tensors:
        shape = tuple(reversed(tensor.shape.tolist()))
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        kind, values = dtype if len(shape) > 1 else np.float32, values.reshape(shape)
        if kind == "Q8_0":
            packed = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(tensor.name, gguf.quants.quantize(values, packed), raw_dtype=packed)
        else:
            writer.add_tensor(tensor.name, values.astype(kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
