"""Are two models the same? Config, tensors, tokenizer, and what they compute."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from ropewalk.checkpoint.pretrained import Pretrained, load

# Enough positions to expose a wrong RoPE; a text with what tokenizers stumble over.
_POSITIONS = 320
_TEXT = "The quick brown fox, naïve café — 12345 日本語 🦊\n\n\tdef f(x): return x ** 2"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What differs, in the order one would look."""

    config: dict[str, tuple[Any, Any]]
    missing: list[str]
    """parameters that only one of the two has"""
    tensors: dict[str, float]
    """largest absolute difference of each tensor that differs"""
    compared: int
    logits: float
    """largest absolute difference; NaN where the models are too different to compare"""
    positions: int
    """how many the logits were compared at"""
    tokenizer: str
    """`same`, `different`, or `absent`"""

    def same(self, tolerance: float) -> bool:
        """Whether nothing differs but tensors and logits, and those by no more than `tolerance`."""
        close = all(difference <= tolerance for difference in (*self.tensors.values(), self.logits))
        return close and not self.config and not self.missing and self.tokenizer != "different"

    def summary(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {
            **dataclasses.asdict(self),
            "logits": None if np.isnan(self.logits) else self.logits,
        }

    def lines(self) -> list[str]:
        """Everything, for a person."""
        found = [
            f"config {key}: {ours!r} against {theirs!r}"
            for key, (ours, theirs) in self.config.items()
        ]
        found += [f"only in one: {path}" for path in self.missing[:5]]
        worst = sorted(self.tensors.items(), key=lambda item: -item[1])
        found += [
            f"tensor {path}: differs by up to {difference:.3g}" for path, difference in worst[:5]
        ]
        exact = self.compared - len(self.tensors)
        found.append(f"tensors: {exact} of {self.compared} equal bit for bit in float32")
        if np.isnan(self.logits):
            found.append("logits: not compared, the models are too different")
        else:
            found.append(
                f"logits over {self.positions} positions: largest difference {self.logits:.3g}"
            )
        return [*found, f"tokenizer: {self.tokenizer}"]


def compare(model: str | Path, against: str | Path) -> Comparison:
    """Loads both in float32 and compares them. Raises ModelError when one cannot be loaded."""
    ours, theirs = load(model, "float32"), load(against, "float32")
    a, b = ours.config.model_dump(mode="json"), theirs.config.model_dump(mode="json")
    config = {key: (a.get(key), b.get(key)) for key in sorted({*a, *b}) if a.get(key) != b.get(key)}
    if ours.family is not theirs.family:
        config["family"] = (ours.config.family(), theirs.config.family())
    shapes = [
        {path: tuple(value.shape) for path, value in lm.params.items()} for lm in (ours, theirs)
    ]
    both = [path for path, shape in shapes[0].items() if shapes[1].get(path) == shape]
    missing = sorted(path for path in {*shapes[0], *shapes[1]} if path not in both)
    differences = {path: _difference(ours.params[path], theirs.params[path]) for path in both}
    return Comparison(
        config=config,
        missing=missing,
        tensors={path: value for path, value in differences.items() if value != 0},
        compared=len(both),
        logits=float("nan") if missing or config else _logit_difference(ours, theirs),
        positions=min(_POSITIONS, ours.config.longest()),
        tokenizer=_tokenizers(ours, theirs),
    )


def _difference(a: Any, b: Any) -> float:
    difference = np.abs(np.asarray(a, np.float32) - np.asarray(b, np.float32)).max()
    return float("inf") if np.isnan(difference) else float(difference)


def _logit_difference(ours: Pretrained, theirs: Pretrained) -> float:
    length = min(_POSITIONS, ours.config.longest())
    tokens = np.random.default_rng(0).integers(0, ours.config.vocab_size, (1, length))
    return _difference(ours.logits(tokens), theirs.logits(tokens))


def _tokenizers(ours: Pretrained, theirs: Pretrained) -> str:
    if ours.tokenizer is None or theirs.tokenizer is None:
        return "absent"
    same = ours.tokenizer.encode(_TEXT) == theirs.tokenizer.encode(_TEXT)
    same = same and ours.tokenizer.eos_ids == theirs.tokenizer.eos_ids
    return (
        "same"
        if same and ours.tokenizer.chat_template == theirs.tokenizer.chat_template
        else "different"
    )
