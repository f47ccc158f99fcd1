from pathlib import Path

from rich.console import Console

from ropewalk.data import show
from ropewalk.data.pipeline import Batches
from ropewalk.data.stats import count
from tests.data.corpora import BYTE, config, take, words, write_lines


def test_a_row_shows_its_text_and_where_documents_end(tmp_path: Path) -> None:
    texts = [words(i, 4) for i in range(6)]
    file = write_lines(tmp_path / "a.jsonl", texts)
    (batch,) = take(Batches(config(file, length=128, batch_size=1), BYTE), 1)
    text = show.row(batch, 0, BYTE)
    for name in batch.names[0]:
        i = int(name.rpartition(":")[2]) - 1
        assert f"│ {name} · " in text.plain
        shown = "".join(
            c if c.isascii() else "".join(f"\\x{b:02x}" for b in c.encode()) for c in texts[i]
        )
        assert f"<|bos|>{shown}<|eos|>" in text.plain
    coloured = sum(str(span.style) in (*show.TRAINED, show.SPECIAL) for span in text.spans)
    assert coloured == batch.arrays["weights"].sum()
    assert "padding · " in text.plain


def test_the_summary_counts(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "a.jsonl", [words(0, 50)])
    stats = count(Batches(config(file, epochs=1), BYTE))
    console = Console(width=60)
    with console.capture() as captured:
        console.print(show.summary(stats), show.legend())
    assert f"{stats.tokens}" in captured.get() and f"{stats.efficiency:.1%}" in captured.get()
