"""A tiny model on disk."""

from pathlib import Path

from ropewalk import models
from ropewalk.checkpoint.pretrained import Pretrained
from tests.families.tiny import tiny


def saved(directory: Path) -> Path:
    """Writes a tiny llama as a Hugging Face directory and returns it."""
    it = tiny("llama")
    return Pretrained(models.family("llama"), it.config, it.params, None, "tiny").save(directory)
