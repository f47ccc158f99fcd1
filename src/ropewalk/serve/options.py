"""What `ropewalk serve` is asked for; light, since the command line shows the defaults."""

import dataclasses
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Options:
    """As the command's help says."""

    model: str
    host: str = "127.0.0.1"
    port: int = 8000
    name: str = ""
    slots: int = 8
    max_length: int = 0
    queue: int = 256
    rules: str = ""
    drafts: int | None = None
    draft_model: str = ""
    api_key_file: Path | None = None
    drain: float = 30.0
    dtype: str = ""
    cache: str = ""
    trace: Path | None = None
