"""Opens directories that Ropewalk exported, as any other tool would: with `transformers`, float32.

Runs in an environment of its own (README.md beside this file) and knows nothing of Ropewalk.
Prints the logits' digest and a greedy continuation; with `--goldens FOLDER` compares with
`tokens [b,t]`, `logits [b,p,v]` (and `positions [p]`, else every position) of the golden that has
the directory's name.

usage: open_export.py DIR ... [--goldens FOLDER] [--prompt TEXT] [--new N]
exit code 1: a tensor missing or unused, logits not finite, or off by more than TOLERANCE
"""

import argparse
import hashlib
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

TOLERANCE = 1e-4
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")


def open_model(directory: Path) -> tuple[torch.nn.Module, bool]:
    """The model in float32, and whether the weights are exactly those that it needs."""
    model, info = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    wrong = {key: sorted(map(str, value)) for key, value in info.items() if value}
    if wrong:
        print(f"weights do not fit: {wrong}")
    return model.eval(), not wrong


def compare(logits: torch.Tensor, expected: dict[str, torch.Tensor]) -> bool:
    """Prints the greatest difference from the expected logits; whether it is small enough."""
    if "positions" in expected:
        logits = logits[:, expected["positions"].long()]
    if logits.shape != expected["logits"].shape:
        print(f"logits {list(logits.shape)}, expected {list(expected['logits'].shape)}")
        return False
    error = (logits - expected["logits"].float()).abs().max().item()
    print(f"max abs error {error:.2e}, allowed {TOLERANCE:.0e}")
    return error <= TOLERANCE


def check(directory: Path, goldens: Path | None, prompt: str, new: int) -> bool:
    """Opens, compares and continues; whether all is well."""
    model, good = open_model(directory)
    golden = goldens and goldens / directory.name / "expected.safetensors"
    expected = load_file(golden) if golden else {}
    has_tokenizer = any((directory / name).exists() for name in TOKENIZER_FILES)
    tokenizer = AutoTokenizer.from_pretrained(directory) if has_tokenizer else None
    if tokenizer:
        tokens = tokenizer(prompt, return_tensors="pt").input_ids
        good &= tokenizer.decode(tokens[0], skip_special_tokens=True) == prompt
        print(f"prompt {prompt!r} -> {tokens[0].tolist()}")
    else:
        tokens = torch.arange(3, 19)[None] % model.config.vocab_size
    with torch.no_grad():
        logits = model(expected.get("tokens", tokens).long()).logits
        out = model.generate(tokens, max_new_tokens=new, do_sample=False)[0]
    digest = hashlib.sha256(logits.numpy().tobytes()).hexdigest()[:16]
    print(f"logits {list(logits.shape)} std {logits.std():.4f} sha256 {digest}")
    print(f"continuation {tokenizer.decode(out)!r}" if tokenizer else f"tokens {out.tolist()}")
    good &= bool(logits.isfinite().all())
    return good and (not expected or compare(logits, expected))


def main() -> int:
    """Checks every directory; returns the exit code."""
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path, nargs="+")
    parser.add_argument("--goldens", type=Path)
    parser.add_argument("--prompt", default="ROMEO:\n")
    parser.add_argument("--new", type=int, default=32)
    args = parser.parse_args()
    wrong = []
    for directory in args.directory:
        print(directory)
        if not check(directory, args.goldens, args.prompt, args.new):
            wrong.append(directory)
    print(f"{len(wrong)} of {len(args.directory)} differ: {', '.join(map(str, wrong)) or 'none'}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
