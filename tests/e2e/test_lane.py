"""From a text file to a model that other tools open: every command on one small run."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import ropewalk as public
from ropewalk.text import tokenizer as tokenizers
from tests.cli.invoke import ropewalk
from tests.e2e.commands import STEPS, arrays, numbers


@pytest.fixture(scope="module")
def exported(home: Path, whole: Path) -> Path:
    directory = home / "exported"
    outcome = ropewalk("export", str(whole), str(directory))
    assert outcome.code == 0, outcome.stderr
    assert outcome.stdout.split() == [str(directory)]
    return directory


def test_training_lowers_the_loss_and_tells(whole: Path) -> None:
    rows = numbers(whole)
    assert rows[STEPS]["eval_loss"] < rows[1]["loss"] - 1
    report = (whole / "report.html").read_text(encoding="utf-8")
    assert "<svg" in report
    assert "http" not in report.replace("http://www.w3.org", "")
    for shown in ("Loss", "Learning rate", "okens", "radient norm", "hidden_size"):
        assert shown in report
    samples = [json.loads(line) for line in (whole / "samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in samples] == [0, 12, STEPS]


def test_run_and_export_are_the_same_model(whole: Path, exported: Path, tmp_path: Path) -> None:
    ours, theirs = public.load(whole), public.load(exported)
    tokens = np.arange(24).reshape(2, 12)
    logits = ours.logits(tokens)
    assert (logits.dtype, logits.shape) == (np.float32, (2, 12, ours.config.vocab_size))
    np.testing.assert_array_equal(logits, theirs.logits(tokens.tolist()))
    written, again = (lm.generate(["the rope", "tar"], max_new_tokens=8) for lm in (ours, theirs))
    assert [one.tokens for one in written] == [one.tokens for one in again]
    assert all(len(one.tokens) == len(one.logprobs) for one in written)
    ours.save(tmp_path / "saved")
    saved, first = (load_file(d / "model.safetensors") for d in (tmp_path / "saved", exported))
    assert saved.keys() == first.keys()
    assert all(saved[name].tobytes() == first[name].tobytes() for name in first)


def test_greedy_tokens_follow_the_logits(whole: Path) -> None:
    lm = public.load(whole)
    ids = lm.encode("the rope")
    (written,) = lm.generate([ids], max_new_tokens=5, temperature=0.0)
    for token, logprob in zip(written.tokens, written.logprobs, strict=True):
        last = lm.logits([ids])[0, -1].astype(np.float64)
        assert token == last.argmax()
        assert logprob == pytest.approx(last.max() - np.log(np.exp(last).sum()), abs=1e-4)
        ids = [*ids, token]


def test_export_in_another_dtype(whole: Path, tmp_path: Path) -> None:
    target = tmp_path / "half"
    assert ropewalk("export", str(whole), str(target), "--dtype", "bfloat16").code == 0
    assert json.loads((target / "config.json").read_text())["torch_dtype"] == "bfloat16"
    full, half = public.load(whole).params, public.load(target).params
    assert all(half[path].dtype == "bfloat16" for path in half)
    assert all(np.array_equal(full[path].astype("bfloat16"), half[path]) for path in full)
    outcome = ropewalk("verify", str(whole), "--against", str(target), "--json")
    assert outcome.code == 1
    assert json.loads(outcome.stdout)["logits"] > 1e-4


def test_verify(whole: Path, exported: Path) -> None:
    outcome = ropewalk("verify", str(whole), "--against", str(exported), "--json")
    assert outcome.code == 0
    found = json.loads(outcome.stdout)
    assert (found["equal"], found["logits"], found["tokenizer"]) == (True, 0.0, "same")
    assert ropewalk("verify", str(exported), "--against", str(whole)).stdout.endswith("equal\n")


def test_inspect_counts_what_is_there(whole: Path, exported: Path, home: Path) -> None:
    stored = {path: a for path, a in arrays(whole).items() if path.startswith("params.")}
    count = sum(array.size for array in stored.values())
    checkpoint = json.loads(ropewalk("inspect", str(whole), "--json").stdout)
    assert (checkpoint["kind"], checkpoint["parameters"]) == ("checkpoint", count)
    assert {row["name"] for row in checkpoint["tensors"]} == arrays(whole).keys()
    directory = json.loads(ropewalk("inspect", str(exported), "--json").stdout)
    assert (directory["parameters"], directory["bytes"]) == (count, 4 * count)
    recipe = json.loads(ropewalk("inspect", str(home / "recipe.yml"), "--json").stdout)
    assert recipe["parameters"] == count
    assert f"{count:,} parameters" in ropewalk("inspect", str(exported)).stdout


def test_generate_from_the_console_script(exported: Path) -> None:
    script = Path(sys.executable).with_name("ropewalk")
    words = ["generate", str(exported), "--prompt", "the rope", "--max-new-tokens", "6"]
    done = subprocess.run(
        [script, *words, "--temperature", "0"], capture_output=True, text=True, check=True
    )
    (expected,) = public.load(exported).generate(["the rope"], max_new_tokens=6, temperature=0.0)
    assert done.stdout == f"the rope{expected.text}\n"


def test_generate_reads_standard_input(exported: Path) -> None:
    words = ("generate", str(exported), "--max-new-tokens", "3", "--seed", "7", "--prompt")
    assert ropewalk(*words, "-", stdin="lay the").stdout == ropewalk(*words, "lay the").stdout


def test_import_of_a_directory(exported: Path, tmp_path: Path) -> None:
    assert ropewalk("import", str(exported), str(tmp_path / "in"), "--format", "hf").code == 0
    assert ropewalk("verify", str(tmp_path / "in"), "--against", str(exported)).code == 0


def test_data_and_tokenizer(home: Path, tmp_path: Path) -> None:
    outcome = ropewalk("data", str(home / "recipe.yml"), "--rows", "1", "--batches", "2")
    assert outcome.code == 0
    assert "padding" in outcome.stdout
    words = ("tokenizer", "train", str(home / "data.jsonl"), "--vocab-size", "270", "-o")
    assert ropewalk(*words, str(tmp_path / "made")).code == 0
    made = tokenizers.load(tmp_path / "made")
    text = "the rope walk, ünï"
    assert (made.vocab_size, made.decode(made.encode(text))) == (270, text)


def test_doctor() -> None:
    outcome = ropewalk("doctor", "--json")
    facts = json.loads(outcome.stdout)
    assert outcome.code == 0
    assert facts["versions"]["jax"]
    assert facts["devices"].startswith("8 x cpu")


def test_finished_run_does_nothing_more(home: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "again"
    shutil.copytree(whole, run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    outcome = ropewalk("train", str(home / "recipe.yml"), f"directory={run}")
    assert outcome.code == 0
    assert f"{run} is finished: {STEPS} steps" in outcome.stderr
    after = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    kept = {path for path in after if path.name not in ("recipe.yml", "report.html")}
    assert {path for path in kept if before.get(path) != after[path]} == set()
