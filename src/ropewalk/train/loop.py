"""The loop: batches through the compiled step, with evaluation, samples, checkpoints and numbers on
their cadence."""

import contextlib
import dataclasses
import math
import os
import signal
import time
from collections import deque
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.numpy as jnp

from ropewalk.checkpoint import pretrained
from ropewalk.checkpoint.manager import Manager
from ropewalk.core.compilation import keep_programs, release_compiler_memory
from ropewalk.core.errors import DataError, TrainingError
from ropewalk.core.log import log
from ropewalk.core.storage import owned
from ropewalk.layers.decode import Decoder, Sampling
from ropewalk.layers.lm import with_parameters
from ropewalk.metrics import writers
from ropewalk.metrics.meter import Meter, total_peak
from ropewalk.metrics.report import read_history, write_report
from ropewalk.parallel import distributed
from ropewalk.train import session
from ropewalk.train.build import Built, build
from ropewalk.train.diagnose import first_bad
from ropewalk.train.run import Run

# Weights whose loss is not below this share of that of guessing are ruined, or have learnt nothing.
BETTER = 0.99


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended."""

    status: str
    """`finished`, `target` (held-out loss reached), or `stopped` (by a signal; the same command
    goes on)"""
    steps: int
    final_loss: float | None
    """of the last step, in nats a token; None when no step was left to do"""
    evaluation: dict[str, float]
    """of the last evaluation: eval_loss, eval_perplexity, eval_bits_per_byte, eval_accuracy"""
    directory: Path
    checkpoint: Path
    export: Path | None
    """the Hugging Face directory, if one was asked for"""
    signal: int | None = None


def train(run: Run) -> Result:
    """Runs a run from its newest checkpoint, or from the start, to its end.

    Raises a UserError for a mistake in the recipe or its files, and TrainingError when it cannot go
    on; what was saved stays.
    """
    started = time.monotonic()
    distributed.start()
    keep_programs()
    directory = Path(os.path.expanduser(run.directory))
    run = run.model_copy(update={"directory": str(directory)})
    session.check_directory(directory)
    with owned(directory) if jax.process_index() == 0 else contextlib.nullcontext():
        built = build(run)
        manager = Manager(built.directory / pretrained.CHECKPOINTS, run.checkpoint)
        try:
            return _Loop(built, manager, started).run()
        except OSError as error:
            raise TrainingError(
                f"{directory}: the run cannot go on: {error}. Its checkpoints stay; make room or "
                "mend the disk, and the same command goes on from the newest"
            ) from error
        finally:
            built.batches.close()
            manager.close()


class _Loop:
    """The moving parts of one run."""

    def __init__(self, built: Built, manager: Manager, started: float):
        self.built, self.manager, self.settings = built, manager, built.run
        session.check_recipe(built, manager)
        try:
            self.state, self.resumed, self.evaluation = session.first_state(built, manager)
        except DataError as error:
            raise DataError(f"{built.directory} cannot go on: {error}") from None
        self.at = self.resumed or 0
        self.final_loss: float | None = None
        self.out = writers.open_writers(
            self.settings.metrics, built.directory, self.settings.steps, self.resumed, built.recipe
        )
        session.keep_recipe(built)
        self.evaluator = built.evaluator()
        self.decoder: Decoder | None = None
        self.recent: deque[Any] = deque(maxlen=self.settings.stop_after_skipped)
        flops = 3 * built.structure.flops(1, self.settings.data.length)
        tokens = int(read_history(built.directory).series["tokens"].last() or 0)
        self.meter = Meter(self.settings.steps, flops, step=self.at, tokens=tokens, started=started)

    def run(self) -> Result:
        try:
            if self._done():
                log.info("%s is finished: %d steps. Nothing to do.", self.built.directory, self.at)
                return self._result("finished", self._export(), None)
            return self._train()
        except TrainingError as error:
            self.out.event(self.at, "failed", reason=str(error))
            if jax.process_index() == 0:
                write_report(self.built.directory)
            raise
        finally:
            self.out.close()

    def _train(self) -> Result:
        steps = self.settings.steps
        if self.resumed is not None:
            log.info("%s: going on from step %d of %d", self.built.directory, self.at, steps)
        step = self.built.compile_step()
        release_compiler_memory()
        peak = total_peak(jax.devices(), self.settings.compute_dtype)
        self.meter.peak_flops = peak.flops
        self.out.event(self.at, "started", **writers.facts(steps, peak))
        if self.resumed is None:
            self._samples()
        self.meter.begin(time.monotonic())
        waiting = None
        with session.signals() as asked:
            while self.at < steps:
                batch = next(self.built.batches, None)
                if batch is None:
                    if waiting is not None:
                        self._write(*waiting)
                    self._data_ended(self.at)
                self.state, metrics = step(self.state, self.built.place(batch.arrays))
                self.at += 1
                self.recent.append((self.at, batch))
                if waiting is not None:  # read one step late, while the next one runs
                    self._write(*waiting)
                waiting = (self.at, metrics)
                stop = asked(self.at)
                if stop or self._due():
                    self._pause(*waiting)
                    waiting = None
                if self._done():
                    break
                if stop:
                    self._save(wait=True)
                    self.out.event(self.at, "stopped", signal=signal.Signals(stop).name)
                    return self._result("stopped", None, stop)
        return self._finish("finished" if self.at >= steps else "target")

    def _due(self) -> bool:
        cadences = (
            self.settings.evaluate.every,
            self.settings.samples.every,
            self.settings.checkpoint.every,
        )
        return self.at >= self.settings.steps or any(
            every and self.at % every == 0 for every in cadences
        )

    def _done(self) -> bool:
        target = self.settings.evaluate.target_loss
        reached = target is not None and self.evaluation.get("eval_loss", float("inf")) <= target
        return self.at >= self.settings.steps or reached

    def _pause(self, at: int, metrics: dict[str, Any]) -> None:
        """Evaluation, samples and a checkpoint where they are due; then the numbers of this step
        with all of it."""
        every, final = self.settings.evaluate.every, at >= self.settings.steps
        numbers = self._numbers(at, metrics)
        if self.evaluator and (final or (every and at % every == 0)):
            begun = time.monotonic()
            self.evaluation = self.evaluator(self.state.weights, self.built.place)
            self.meter.aside("evaluation", time.monotonic() - begun)
            numbers |= self.evaluation
        self.out.write(at, numbers)
        if self.settings.samples.every and (final or at % self.settings.samples.every == 0):
            self._samples()
        if at % self.settings.checkpoint.every == 0 or self._done():
            self._save()

    def _write(self, at: int, metrics: dict[str, Any]) -> None:
        self.out.write(at, self._numbers(at, metrics))

    def _numbers(self, at: int, metrics: dict[str, Any]) -> dict[str, float]:
        """A step's metrics as host floats; waits for the step. Raises TrainingError when too many
        were dropped."""
        values = jax.device_get(metrics)
        tokens = values["loss"][1]
        if tokens == 0:
            self._data_ended(at - 1)
        means = {name: float(v[0] / v[1]) for name, v in values.items() if isinstance(v, tuple)}
        single = {name: float(v) for name, v in values.items() if not isinstance(v, tuple)}
        row = single.pop("skipped_in_a_row")
        if row:
            self.out.event(at, "skipped", in_a_row=int(row), batch=self._names(at))
            if row >= self.settings.stop_after_skipped:
                self._give_up(at, int(row), means["loss"])
        else:
            self.final_loss = means["loss"]
        return {**means, **single, **self.meter.observe(at, int(tokens), time.monotonic())}

    def _names(self, at: int) -> list[str]:
        rows = next((batch.names for step, batch in self.recent if step == at), ())
        return sorted({name for row in rows for name in row})

    def _give_up(self, at: int, row: int, loss: float) -> NoReturn:
        advice = self._way_on(at, row, loss)
        where = "of several processes, none can look at every layer alone"
        batch = next((batch for step, batch in self.recent if step == at), None)
        if jax.process_count() == 1 and batch is not None:
            where = first_bad(
                self.built.structure,
                self.settings.objective,
                self.state.weights,
                self.built.place(batch.arrays),
            )
        raise TrainingError(
            f"stopped at step {at}: {row} updates in a row had a loss or gradient that is not "
            "finite and were dropped "
            f"(stop_after_skipped = {self.settings.stop_after_skipped}); {where}. The batch held "
            f"{writers.told(self._names(at))}. {advice}"
        )

    def _way_on(self, at: int, row: int, loss: float) -> str:
        """Saves the weights unless they are ruined, and says how to go on from which.

        `loss` is of the forward pass alone, with the weights that the `row` updates left as they
        were.
        """
        guessing = math.log(self.built.named.config.vocab_size)
        if loss < BETTER * guessing:
            # Whoever goes on from here with other values gets the whole allowance again.
            zero = jnp.zeros_like(self.state.extra["skipped"])
            extra = {**self.state.extra, "skipped_in_a_row": zero}
            self.state = dataclasses.replace(self.state, extra=extra)
            self._save(wait=True)
            return (
                "The weights are those before the first of them and are saved; lower "
                "optimizer.learning_rate, or look at the data"
            )
        why = f"a loss of {loss:.3g} where guessing gives {guessing:.3g}, and are not saved"
        if at == row:
            return f"The weights are those the run starts from: they have {why}. Look at `model`"
        self.manager.wait()
        steps, losses = self.manager.steps(), read_history(self.built.directory).series["loss"]
        after = {step - 1: value for step, value in losses.points()}  # by the weights it is of
        better = (s for s in steps if after.get(s, math.nan) < BETTER * guessing)
        good = max(better, default=None)
        home = self.built.directory / pretrained.CHECKPOINTS
        ruined = [str(home / str(step)) for step in steps if good is None or step > good]
        remove = f", remove the checkpoints of ruined ones (rm -r {' '.join(ruined)})"
        return (
            f"An earlier update ruined the weights: they have {why}. Lower optimizer.learning_rate"
            f"{remove if ruined else ''} and give the same command again: it "
            f"{'begins anew' if good is None else f'goes on from step {good}'}"
        )

    def _data_ended(self, at: int) -> NoReturn:
        self._save(wait=True)
        raise TrainingError(
            f"the data ended after step {at} of {self.settings.steps} (data.epochs = "
            f"{self.settings.data.epochs}); the "
            f"weights are saved. Lower `steps` to {at}, or raise data.epochs (null repeats for "
            "ever)"
        )

    def _samples(self) -> None:
        if not self.settings.samples.every or self.built.tokenizer is None:
            return
        begun = time.monotonic()
        model = with_parameters(self.built.structure, self.state.weights)
        if self.decoder is None:
            self.decoder = Decoder(model)
        else:
            self.decoder.refresh(model)
        wanted = self.settings.samples
        sampling = Sampling(
            max_new_tokens=wanted.max_new_tokens,
            temperature=wanted.temperature,
            seed=self.settings.seed,
        )
        for prompt in wanted.prompts:
            self.out.sample(self.at, prompt, self._continuation(self.decoder, prompt, sampling))
        self.meter.aside("samples", time.monotonic() - begun)

    def _continuation(self, decoder: Decoder, prompt: str, sampling: Sampling) -> str:
        tokenizer = self.built.tokenizer
        if tokenizer is None:
            return ""
        ids = tokenizer.encode_prompt(prompt) or list(tokenizer.eos_ids[:1])
        written = [new.token for new in decoder.stream([ids], sampling, tokenizer.eos_ids)]
        text = [token for token in written if token not in tokenizer.eos_ids]
        return tokenizer.decode(text, follows=True)

    def _save(self, wait: bool = False) -> None:
        begun = time.monotonic()
        self.manager.save(
            self.at,
            self.state.tree(),
            recipe=self.built.recipe,
            data_state=self.built.batches.get_state(),
            metrics=self.evaluation,
            wait=wait,
        )
        self.meter.aside("checkpoint", time.monotonic() - begun)

    def _finish(self, status: str) -> Result:
        self.manager.wait()
        export = self._export()
        self.out.event(self.at, status)
        return self._result(status, export, None)

    def _export(self) -> Path | None:
        target = self.built.directory / session.EXPORT
        if self.settings.export == "none" or jax.process_count() > 1:
            return None
        family, config = self.built.named
        done = pretrained.Pretrained(
            family, config, self.state.weights, self.built.tokenizer, str(self.built.directory)
        )
        return done.save(target, self.settings.export)

    def _result(self, status: str, export: Path | None, stop: int | None) -> Result:
        if jax.process_index() == 0:
            write_report(self.built.directory)
        checkpoint = self.built.directory / pretrained.CHECKPOINTS / str(self.at)
        return Result(
            status,
            self.at,
            self.final_loss,
            self.evaluation,
            self.built.directory,
            checkpoint,
            export,
            stop,
        )
