"""What a server tells of itself, in Prometheus' text format under our prefix and vLLM's names, and
under vLLM's prefix too, for its dashboards."""

import time
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)

PREFIX = "ropewalk:"
OTHER = "vllm:"
disable_created_metrics()
_SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 640)
_STEPS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5, 5)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000)


class Metrics:
    """Counters, gauges and histograms of one server; written by the engine's thread."""

    def __init__(self, model: str):
        self._model = model
        self.registry = CollectorRegistry(auto_describe=True)
        self.running = self._gauge("num_requests_running", "sequences that have a slot")
        self.waiting = self._gauge("num_requests_waiting", "sequences that wait for a slot")
        self.usage = self._gauge("kv_cache_usage_perc", "part of the pages in use, 0 to 1")
        self.queries = self._counter("prefix_cache_queries", "tokens looked up in cached pages")
        self.hits = self._counter("prefix_cache_hits", "tokens found in cached pages")
        self.preemptions = self._counter("num_preemptions", "sequences that lost their pages")
        self.prompt = self._counter("prompt_tokens", "tokens of prompts read")
        self.generated = self._counter("generation_tokens", "tokens written")
        self.drafted = self._counter("spec_decode_num_draft_tokens", "tokens guessed ahead")
        self.accepted = self._counter("spec_decode_num_accepted_tokens", "guesses that were right")
        self.success = Counter(
            PREFIX + "request_success", "sequences that ended", ["model_name", "finished_reason"],
            registry=self.registry,
        )  # fmt: skip
        self.prompt_size = self._histogram("request_prompt_tokens", "of a prompt", _TOKENS)
        self.written_size = self._histogram("request_generation_tokens", "of an answer", _TOKENS)
        self.asked_size = self._histogram("request_params_max_tokens", "asked at most", _TOKENS)
        self.step_size = self._histogram("iteration_tokens_total", "read or written", _TOKENS)
        self.first = self._histogram("time_to_first_token_seconds", "from arrival", _SECONDS)
        self.between = self._histogram("inter_token_latency_seconds", "between tokens", _STEPS)
        self.whole = self._histogram("e2e_request_latency_seconds", "of a request", _SECONDS)
        self.queue = self._histogram("request_queue_time_seconds", "until it was read", _SECONDS)
        self.prefill = self._histogram("request_prefill_time_seconds", "of reading", _SECONDS)
        self.decode = self._histogram("request_decode_time_seconds", "of writing", _SECONDS)
        self.steps = self._counter("engine_steps", "steps sent to the device")
        self.rows = self._counter("engine_rows", "slots that wrote, summed over steps")
        self.programs = self._gauge("engine_programs", "compiled so far")
        self.host = self._counter("engine_host_seconds", "planning and sending of steps")
        self._seen = [0, 0, 0]

    def step(self, scheduler: Any, plan: Any, programs: int, seconds: float) -> None:
        """After every step of the engine."""
        self.programs.set(programs)
        self.running.set(scheduler.running)
        self.waiting.set(scheduler.waiting)
        self.usage.set(scheduler.usage)
        now = [scheduler.prefix_queries, scheduler.prefix_hits, scheduler.preemptions]
        counters = self.queries, self.hits, self.preemptions
        for counter, value, before in zip(counters, now, self._seen, strict=True):
            counter.inc(value - before)
        self._seen = now
        if plan.chunks or plan.rows:
            self.steps.inc()
            self.rows.inc(len(plan.rows))
            read = sum(chunk.end - chunk.start for chunk in plan.chunks)
            self.step_size.observe(read + len(plan.rows))
            self.host.inc(seconds)

    def wrote(self, job: Any, tokens: int, now: float) -> None:
        """After tokens of a job came, at a time of the monotonic clock."""
        self.generated.inc(tokens)
        if job.first:
            self.between.observe((now - job.last) / tokens)
        else:
            job.first = now
            self.prompt.inc(len(job.prompt))
            self.first.observe(now - job.arrived)
        job.last = now

    def ended(self, job: Any, reason: str) -> None:
        """When a job ends, for whatever reason."""
        now = time.monotonic()
        self.success.labels(self._model, reason).inc()
        self.prompt_size.observe(len(job.prompt))
        self.written_size.observe(len(job.sequence.written))
        self.asked_size.observe(job.settings.limit)
        self.whole.observe(now - job.arrived)
        if job.began:
            self.queue.observe(job.began - job.arrived)
        if job.first:
            self.prefill.observe(job.first - job.began)
            self.decode.observe(job.last - job.first)

    def text(self) -> bytes:
        """Everything, under both prefixes."""
        ours = generate_latest(self.registry)
        return ours + ours.replace(PREFIX.encode(), OTHER.encode())

    def value(self, name: str) -> float:
        """The value of one counter or gauge, by its name without the prefix."""
        return self.registry.get_sample_value(PREFIX + name, {"model_name": self._model}) or 0.0

    def _gauge(self, name: str, about: str) -> Any:
        made = Gauge(PREFIX + name, about, ["model_name"], registry=self.registry)
        return made.labels(self._model)

    def _counter(self, name: str, about: str) -> Any:
        made = Counter(PREFIX + name, about, ["model_name"], registry=self.registry)
        return made.labels(self._model)

    def _histogram(self, name: str, about: str, buckets: tuple[float, ...]) -> Any:
        made = Histogram(
            PREFIX + name, about, ["model_name"], buckets=buckets, registry=self.registry
        )
        return made.labels(self._model)
