import hashlib
import subprocess
import sys

import pytest

from ropewalk.core.errors import DataError
from ropewalk.text import bpe

TEXTS = ["the cat sat on the mat\n", "the dog sat on the log, the cat ran\n", "été 123 12\n"]
PROGRAM = f"""
import hashlib
from ropewalk.text import bpe
print(hashlib.sha256(bpe.train({TEXTS!r}, 290)._model_file()["tokenizer.json"]).hexdigest())
"""


def test_training_is_the_same_in_another_process() -> None:
    mine = hashlib.sha256(bpe.train(TEXTS, 290)._model_file()["tokenizer.json"]).hexdigest()
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == mine


def test_special_ids_come_last_and_the_size_is_as_asked() -> None:
    tokenizer = bpe.train(TEXTS, 280)
    assert tokenizer.vocab_size == 280
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.pad_id) == (277, (278,), 279)
    assert len(tokenizer.encode(TEXTS[0])) < len(TEXTS[0].encode())


def test_too_small_a_vocabulary_and_no_text_are_refused() -> None:
    with pytest.raises(DataError, match=r"vocab_size 258 is too small.*259"):
        bpe.train(TEXTS, 258)
    with pytest.raises(DataError, match="no text"):
        bpe.train(["", ""], 300)
