"""Whole runs in this process: what they compute, when they end, how often they compile."""

import dataclasses
import json
import logging
import math
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ropewalk
from ropewalk.checkpoint.pretrained import load
from ropewalk.core.errors import CheckpointError, DataError, TrainingError
from ropewalk.data.holdout import Heldout
from ropewalk.layers.lm import with_parameters
from ropewalk.text import tokenizer as tokenizers
from ropewalk.train import build, loop
from ropewalk.train.diagnose import first_bad
from ropewalk.train.run import Run
from tests.e2e.commands import arrays as stored
from tests.e2e.commands import lines, numbers, same_bits

Described = Callable[..., Run]
HELD_OUT = "data.holdout.values=[c]"


@pytest.fixture(autouse=True)
def no_program_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")


@pytest.fixture
def compiled() -> Iterator[list[str]]:
    """The names of the functions that are compiled while a test runs."""
    names: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            words = record.getMessage().split()
            if words[:3] == ["Finished", "XLA", "compilation"]:
                names.append(words[4])

    logger, handler = logging.getLogger("jax._src.dispatch"), Handler()
    logger.addHandler(handler)
    with jax.log_compiles():
        yield names
    logger.removeHandler(handler)


def test_same_seed_same_bits_and_one_compilation(described: Described, compiled: list[str]) -> None:
    run = described("steps=6", "checkpoint.every=2", "evaluate.every=3", HELD_OUT)
    loop.train(run)
    assert compiled.count("jit(step)") == 1
    assert compiled.count("jit(sums)") == 1
    other = run.model_copy(update={"directory": f"{run.directory}2"})
    loop.train(other)
    assert numbers(Path(run.directory)) == numbers(Path(other.directory))
    assert same_bits(stored(Path(run.directory), 6), stored(Path(other.directory), 6))


def test_unroll_and_remat_are_the_same_run(described: Described) -> None:
    losses = []
    for name, layout in (("a", "layout.stack=scan"), ("b", "layout={stack: unroll, remat: full}")):
        run = described("steps=4", layout)
        run = run.model_copy(update={"directory": run.directory + name})
        loop.train(run)
        losses.append([row["loss"] for row in numbers(Path(run.directory)).values()])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


def test_lower_precision_follows_float32(described: Described) -> None:
    losses = {}
    for name in ("float32", "mixed", "bfloat16"):
        run = described("steps=12", f"precision={name}")
        run = run.model_copy(update={"directory": f"{run.directory}-{name}"})
        loop.train(run)
        losses[name] = [row["loss"] for row in numbers(Path(run.directory)).values()]
        kept = {str(value.dtype) for value in load(run.directory).params.values()}
        assert kept == {"bfloat16" if name == "bfloat16" else "float32"}
    np.testing.assert_allclose(losses["mixed"], losses["float32"], rtol=0.03)
    np.testing.assert_allclose(losses["bfloat16"], losses["float32"], rtol=0.1)
    assert losses["mixed"] != losses["float32"]


def test_evaluation_is_the_plain_sum(described: Described) -> None:
    """Every held-out byte once, by whole logits, row by row, in float64."""
    results = []
    for size in (8, 16):
        run = described(
            "steps=2", f"data.batch_size={size}", "optimizer.learning_rate=1e-12", HELD_OUT
        )
        run = run.model_copy(update={"directory": f"{run.directory}{size}"})
        results.append((run, loop.train(run).evaluation))
    run, ours = results[0]
    built = build.build(run)
    params = built.fresh().params
    tokenizer = tokenizers.load(Path(run.directory) / "tokenizer")
    nats, count, hits = 0.0, 0, 0
    logits = jax.jit(lambda *row: with_parameters(built.structure, params)(*row)[0])
    for batch in Heldout(run.data, tokenizer, batch_size=1):
        row = [batch.arrays[name] for name in ("tokens", "positions", "segment_ids")]
        scores = np.asarray(logits(*row), np.float64)[0]
        targets, kept = batch.arrays["targets"][0], batch.arrays["weights"][0] > 0
        logs = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
        nats -= logs[np.arange(len(targets)), targets][kept].sum()
        hits += int((scores.argmax(-1) == targets)[kept].sum())
        count += int(kept.sum())
    built.batches.close()
    documents = (Path(run.directory).parent / "data.jsonl").read_text(encoding="utf-8").splitlines()
    (text,) = [row["text"] for row in map(json.loads, documents) if row["title"] == "c"]
    assert ours["eval_loss"] == pytest.approx(nats / count, rel=1e-5)
    assert ours["eval_perplexity"] == pytest.approx(math.exp(nats / count), rel=1e-5)
    assert ours["eval_accuracy"] == pytest.approx(hits / count, rel=1e-5)
    # The first byte has no prediction; the end-of-text token is predicted and has no bytes.
    bits = nats / math.log(2) / len(text.encode())
    assert ours["eval_bits_per_byte"] == pytest.approx(bits, rel=5e-3)
    assert results[1][1] == pytest.approx(ours, rel=1e-6)


def test_target_ends_the_run_for_good(
    described: Described, caplog: pytest.LogCaptureFixture
) -> None:
    run = described("steps=20", "evaluate={every: 2, target_loss: 5.5}", HELD_OUT)
    result = loop.train(run)
    assert (result.status, result.steps < 20) == ("target", True)
    assert result.evaluation["eval_loss"] <= 5.5
    assert result.checkpoint.is_dir()
    before = lines(Path(run.directory))
    with caplog.at_level("INFO", "ropewalk"):
        again = loop.train(run)
    assert "is finished" in caplog.text
    assert (again.status, again.steps) == ("finished", result.steps)
    assert again.evaluation == result.evaluation
    assert lines(Path(run.directory)) == before


def test_changed_recipe(described: Described, caplog: pytest.LogCaptureFixture) -> None:
    loop.train(described("steps=2"))
    with pytest.raises(CheckpointError) as caught:
        loop.train(described("steps=4", "model.hidden_size=64", "seed=3"))
    for part in ("hidden_size was 32, is 64", "seed was 0, is 3", "`directory`"):
        assert part in str(caught.value)
    with pytest.raises(CheckpointError, match=r"optimizer\.kind was adamw, is muon"):
        loop.train(described("steps=4", "optimizer.kind=muon"))
    with caplog.at_level("INFO", "ropewalk"):
        result = loop.train(described("steps=4", "optimizer.learning_rate=0.02"))
    assert result.steps == 4
    assert "steps was 2, is 4" in caplog.text
    assert "optimizer.learning_rate was 0.01, is 0.02" in caplog.text


def test_start_from_a_model(described: Described, tmp_path: Path) -> None:
    first = described("steps=2", "export=float32")
    export = loop.train(first).export
    second = described("steps=1", f"model={{path: {export}}}", "tokenizer={}")
    second = second.model_copy(update={"directory": str(tmp_path / "second")})
    loop.train(second)
    at = [load(place).params for place in (first.directory, second.directory)]
    assert at[0].keys() == at[1].keys()
    # One step of Adam moves a weight by the rate at most, beside its decay.
    moved = max(float(jnp.abs(at[0][path] - at[1][path]).max()) for path in at[0])
    assert 0 < moved <= 0.011


def _changed(described: Described, tmp_path: Path, steps: int, factors: dict[str, float]) -> Run:
    """A run that starts from a trained model, some weights of whose layer 1 are scaled."""
    first = described(f"steps={steps}")
    loop.train(first)
    lm = load(first.directory)
    for part, factor in factors.items():
        for path in lm.params:
            if part in path:
                lm.params[path] = lm.params[path].at[1].multiply(factor)
    lm.save(tmp_path / "bad")
    bad = described(
        "steps=20", "stop_after_skipped=3", f"model={{path: {tmp_path / 'bad'}}}", "tokenizer={}"
    )
    return bad.model_copy(update={"directory": str(tmp_path / "stopped")})


def test_stops_after_several_updates_that_are_not_finite(
    described: Described, tmp_path: Path
) -> None:
    bad = _changed(
        described, tmp_path, 1, {".up.": 1e38, ".gate.": 1e38}
    )  # their product overflows
    with pytest.raises(TrainingError) as caught:
        loop.train(bad)
    for part in ("stopped at step 3: 3 updates", "stop_after_skipped = 3", "layer 1 is the first"):
        assert part in str(caught.value)
    assert "the run starts from" in str(caught.value) and "data.jsonl:" in str(caught.value)
    skipped = [row for row in lines(tmp_path / "stopped") if row.get("event") == "skipped"]
    assert [(row["step"], row["in_a_row"]) for row in skipped] == [(1, 1), (2, 2), (3, 3)]
    assert all(row["batch"] for row in skipped)
    assert not list((tmp_path / "stopped" / "checkpoints").iterdir())


def test_good_weights_are_saved_bit_for_bit_when_only_the_gradient_overflows(
    described: Described, tmp_path: Path
) -> None:
    bad = _changed(described, tmp_path, 12, {".up.": 1e25, ".down.": 1e-25})  # the same function
    with pytest.raises(TrainingError, match="before the first of them and are saved") as caught:
        loop.train(bad)
    assert "norm is not" in str(caught.value) and "down" in str(caught.value)
    saved = sorted(int(path.name) for path in (tmp_path / "stopped" / "checkpoints").iterdir())
    kept = stored(tmp_path / "stopped", saved[-1])
    weights = {name: np.asarray(value) for name, value in load(tmp_path / "bad").params.items()}
    assert same_bits({name: kept[f"params.{name}"] for name in weights}, weights)


def test_weights_that_an_update_ruined_are_not_saved_and_the_way_back_works(
    described: Described,
) -> None:
    cadence = ("stop_after_skipped=6", "checkpoint.every=5")
    run = described("steps=10", *cadence)
    loop.train(run)
    with pytest.raises(TrainingError) as caught:
        loop.train(described("steps=20", "optimizer.learning_rate=1e38", *cadence))
    told, home = str(caught.value), Path(run.directory) / "checkpoints"
    assert "An earlier update ruined the weights" in told
    assert told.endswith("goes on from step 10")
    # Step 15 was saved in the middle of it, of ruined weights.
    assert sorted(path.name for path in home.iterdir()) == ["10", "15", "5"]
    (command,) = re.findall(r"\(rm -r (.*?)\)", told)
    assert command == str(home / "15")
    shutil.rmtree(command)
    result = loop.train(described("steps=20", *cadence))
    assert result.steps == 20
    assert result.final_loss is not None and result.final_loss < 3


def test_the_search_for_what_is_not_finite_computes_as_the_run_does(described: Described) -> None:
    """An embedding that float32 holds and bfloat16 does not."""
    found = []
    for precision in ("float32", "mixed"):
        built = build.build(described(f"precision={precision}"))
        params = built.fresh().params
        params["embed.weight"] = jnp.full_like(params["embed.weight"], 3.4e38)
        batch = built.place(next(built.batches).arrays)
        built.batches.close()
        found.append(first_bad(built.structure, built.run.objective, params, batch))
    assert "layer 0 is the first" in found[1]
    assert "layer 0" not in found[0]


def test_data_that_changed_is_refused_with_its_file_and_the_run(described: Described) -> None:
    run = described("steps=2")
    loop.train(run)
    data = Path(run.directory).parent / "data.jsonl"
    before = data.read_text()
    data.write_text(before.replace("rope", "pore"))
    with pytest.raises(DataError) as caught:
        loop.train(described("steps=4"))
    for part in (run.directory, f"content of {data} is another", "`directory`"):
        assert part in str(caught.value)
    data.write_text(before)
    assert loop.train(described("steps=4")).steps == 4


def test_a_directory_below_home(
    described: Described, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    result = loop.train(described("steps=1", "directory=~/of mine"))
    assert result.directory == tmp_path / "of mine"
    assert result.checkpoint.is_dir()


def test_data_that_ends_early(described: Described) -> None:
    with pytest.raises(TrainingError) as caught:
        loop.train(described("steps=900", "data.epochs=1", "checkpoint.every=500"))
    told = str(caught.value)
    assert "the data ended after step" in told and "of 900 (data.epochs = 1)" in told
    last = int(told.split("after step ")[1].split()[0])
    run = described("steps=900")
    assert (Path(run.directory) / "checkpoints" / str(last)).is_dir()
    result = loop.train(described(f"steps={last}", "data.epochs=1", "checkpoint.every=500"))
    assert result.steps == last


def test_public_call(described: Described, tmp_path: Path) -> None:
    described()
    overrides = ["steps=2", f"directory={tmp_path / 'call'}", "optimizer.schedule.warmup_steps=0"]
    train: Any = ropewalk.train  # a room that is callable
    result = train(tmp_path / "recipe.yml", overrides)
    assert (result.steps, result.checkpoint.name) == (2, "2")
    assert result.final_loss == numbers(tmp_path / "call")[2]["loss"]
    assert dataclasses.asdict(result)["export"] is None
