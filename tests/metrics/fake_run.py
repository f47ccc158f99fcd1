"""A run directory such as a training leaves behind: the real writers, made-up numbers."""

import math
import random
from pathlib import Path

from ropewalk.metrics import writers
from ropewalk.metrics.meter import Peak

RECIPE = """\
# written by ropewalk, complete: running it again gives this run
name: tiny
seed: 0
steps: 1200
model:
  family: llama
  hidden_size: 256
  num_hidden_layers: 6
  num_attention_heads: 4
  num_key_value_heads: 2
  intermediate_size: 704
  vocab_size: 2048
  tie_word_embeddings: true
data:
  train: shakespeare
  held_out: [macbeth, the tempest]
  sequence_length: 256
  batch_size: 8
optimizer:
  learning_rate: 0.003
  schedule: cosine
  warmup_steps: 60
  weight_decay: 0.1
  clip_norm: 1.0
layout:
  compute_dtype: bfloat16
"""
_EARLY = "thet hou ndsthe  ea  wio,n th\n e sandou rhe,\nt hmat"
_MIDDLE = " my lord, and the king of the hand\nThat we have not the world,\nAnd so be the sea."
_LATE = (
    " the night comes on, and I must to my bed;\nThe candle's low, and all the house is still.\n\n"
    "HOST. Good morrow, sir. <script>alert('Exit')</script>\n\nDUKE.\nNay, stay awhile & hear."
)


def write(
    run_dir: Path, steps: int = 1200, every: int = 1, skipped: tuple[int, ...] = (431, 432)
) -> list[dict[str, float]]:
    """Writes recipe.yml, metrics.jsonl, samples.jsonl; returns the training rows as written."""
    chance = random.Random(0)
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "recipe.yml").write_text(RECIPE, encoding="utf-8")
    lines = writers.JsonLines(run_dir)
    facts = writers.facts(steps, Peak(1e12, "of this CPU's measured bfloat16 product rate", False))
    lines.event(0, "started", **facts)
    rows = []
    for step in range(every, steps + 1, every):
        share = step / steps
        rate = 3e-3 * min(step / 60, 0.5 + 0.5 * math.cos(math.pi * share))
        loss = 2.9 + 4.7 * math.exp(-14 * share) + 0.9 * (1 - share) + chance.gauss(0, 0.11)
        lost = sum(step >= at for at in skipped)
        row = {
            "loss": math.nan if step in skipped else loss,
            "learning_rate": rate,
            "grad_norm": math.inf
            if step in skipped
            else 0.55 + 6 * math.exp(-25 * share) + abs(chance.gauss(0, 0.12)),
            "tokens_per_s": 14200 + chance.gauss(0, 350) - (4000 if chance.random() < 0.01 else 0),
            "step_s": 2048 / 14200,
            "mfu": 0.41 + chance.gauss(0, 0.01),
            "skipped": lost,
            "tokens": 2048 * step,
        }
        rows.append({"step": step, **row})
        lines.write(step, row)
        if step in skipped:
            lines.event(
                step,
                "skipped",
                reason="loss is not finite",
                batch="shard 0, documents 1842 to 1849",
            )
        if step % (steps // 12 or 1) == 0:
            held_out = loss + 0.12 - chance.gauss(0, 0.02) if math.isfinite(loss) else 4.0
            bits = held_out / 1.53
            numbers = {
                "eval_loss": held_out,
                "eval_perplexity": math.exp(held_out),
                "eval_bits_per_byte": bits,
            }
            lines.write(step, numbers)
            text = _EARLY if share < 0.15 else _MIDDLE if share < 0.6 else _LATE
            lines.sample(step, "Once more", text)
        if step == steps // 2 // every * every:
            lines.event(step, "started", **facts)
    lines.event(steps, "finished", seconds=178.0)
    lines.close()
    return rows
