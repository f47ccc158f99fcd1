"""Token-weighted means, step times, tokens/s and the share of the hardware's rate that a run gets.

Works on host floats and wall times that the loop hands in: nothing here waits for a device, save
the one short measurement of a device whose peak no vendor publishes.
"""

import collections
import dataclasses
import math
import time
from collections.abc import Iterable, Mapping
from typing import Protocol

import jax
import jax.numpy as jnp

from ropewalk.core.log import log

# Dense FLOP/s of one jax device by the start of its `device_kind`, the longest that fits.
# NVIDIA: float32 is the TF32 rate.
_PEAKS = {
    "TPU v4": {"bfloat16": 275e12},
    "TPU v5 lite": {"bfloat16": 197e12},
    "TPU v5e": {"bfloat16": 197e12},
    "TPU v5p": {"bfloat16": 459e12},
    "TPU v5": {"bfloat16": 459e12},
    "TPU v6 lite": {"bfloat16": 918e12},
    "TPU v6e": {"bfloat16": 918e12},
    "TPU7x": {"bfloat16": 2307e12 / 2},  # a chip is two devices
    "NVIDIA A100": {"bfloat16": 312e12, "float16": 312e12, "float32": 156e12},
    "NVIDIA H100 PCIe": {"bfloat16": 756e12, "float16": 756e12, "float32": 378e12},
    "NVIDIA H100 NVL": {"bfloat16": 835e12, "float16": 835e12, "float32": 417e12},
    "NVIDIA H100": {"bfloat16": 989e12, "float16": 989e12, "float32": 494e12},
    "NVIDIA H200 NVL": {"bfloat16": 835e12, "float16": 835e12, "float32": 417e12},
    "NVIDIA H200": {"bfloat16": 989e12, "float16": 989e12, "float32": 494e12},
    "NVIDIA B200": {"bfloat16": 2250e12, "float16": 2250e12, "float32": 1125e12},
}  # fmt: skip
_KINDS = sorted(_PEAKS, key=len, reverse=True)
_MEASURE_S = 0.1
_LEAST_RUNS = 5
_measured: dict[tuple[str, int, str], float] = {}


class Device(Protocol):
    """What is asked of a jax device here."""

    @property
    def device_kind(self) -> str:
        """The vendor's name of the device, e.g. "TPU v5 lite"."""
        ...

    @property
    def platform(self) -> str:
        """Its backend: "cpu", "gpu" or "tpu"."""
        ...

    @property
    def id(self) -> int:
        """Its number among all devices."""
        ...


@dataclasses.dataclass(frozen=True)
class Peak:
    """What utilisation is held against: FLOP/s, and the honest name of that figure.

    `basis` reads on from a percentage, e.g. "of this CPU's measured float32 product rate".
    """

    flops: float
    basis: str
    published: bool

    @property
    def label(self) -> str:
        """`MFU` when the peak is the vendor's, `product rate` when it was measured here."""
        return "MFU" if self.published else "product rate"


class Means:
    """Weighted means of named `(sum, weight)` pairs, e.g. a loss over tokens and their number."""

    def __init__(self) -> None:
        self._pairs: dict[str, tuple[float, float]] = {}

    def add(self, pairs: Mapping[str, tuple[float, float]]) -> None:
        """Adds one step's pairs of host floats; a name may be absent from some steps."""
        for name, (total, weight) in pairs.items():
            old_total, old_weight = self._pairs.get(name, (0.0, 0.0))
            self._pairs[name] = (old_total + float(total), old_weight + float(weight))

    def values(self) -> dict[str, float]:
        """The mean of every name seen; NaN where the weights sum to zero."""
        return {
            name: total / weight if weight else math.nan
            for name, (total, weight) in self._pairs.items()
        }

    def reset(self) -> None:
        """Forgets everything, to start the next window."""
        self._pairs.clear()


class Meter:
    """Rates of a run from the wall times at which steps were seen to be done.

    The loop calls `begin` when the first step is sent off, `observe` whenever it has learnt that
    steps are done (every step or every tenth: no extra waiting), and `aside` for time spent on
    evaluation, samples or checkpoints between two observations, which belongs to no step. Times are
    seconds of `time.monotonic`.
    """

    def __init__(
        self,
        total_steps: int,
        flops_per_token: float = 0.0,
        peak_flops: float = 0.0,
        step: int = 0,
        tokens: int = 0,
        started: float | None = None,
        window: int = 20,
    ) -> None:
        """`flops_per_token` counts forward and backward, `peak_flops` all devices (0: unknown).

        `step` and `tokens` are what a resumed run has already done; `started` is when the process
        began (default: now); rates are taken over the last `window` observations.
        """
        self.total_steps = total_steps
        self.flops_per_token = flops_per_token
        self.peak_flops = peak_flops
        self.step = step
        self.tokens = tokens
        self.asides: dict[str, float] = {}
        self._started = time.monotonic() if started is None else started
        self._begun = self._last = self._started
        self._pending_aside = 0.0
        self._in_steps = 0.0
        self._recent: collections.deque[tuple[float, int, int]] = collections.deque(maxlen=window)

    def begin(self, now: float) -> None:
        """The first step goes off now; all time before was start-up."""
        self._begun = self._last = now
        self._pending_aside = 0.0

    def aside(self, kind: str, seconds: float) -> None:
        """`seconds` since the last observation went to `kind` ("evaluation" ...), not to steps."""
        self.asides[kind] = self.asides.get(kind, 0.0) + seconds
        self._pending_aside += seconds

    def observe(self, step: int, tokens: int, now: float) -> dict[str, float]:
        """Steps up to `step` are done at `now`, with `tokens` tokens since the last observation.

        Returns tokens (cumulative), step_s of the last interval, tokens_per_s and mfu (if a peak is
        known) over the window, goodput and eta_s. Raises ValueError when `step` has not advanced.
        """
        steps = step - self.step
        if steps <= 0:
            raise ValueError(f"step {step} was observed after step {self.step}; steps only advance")
        seconds = max(now - self._last - self._pending_aside, 1e-9)
        self.step, self.tokens = step, self.tokens + tokens
        self._last, self._pending_aside = now, 0.0
        self._in_steps += seconds
        self._recent.append((seconds, steps, tokens))
        window_s, _, window_tokens = map(sum, zip(*self._recent, strict=True))
        rates = {
            "tokens": self.tokens,
            "step_s": seconds / steps,
            "tokens_per_s": window_tokens / window_s,
            "goodput": self.goodput(now),
            "eta_s": self.eta(now),
        }
        if self.flops_per_token and self.peak_flops:
            rates["mfu"] = rates["tokens_per_s"] * self.flops_per_token / self.peak_flops
        return rates

    def goodput(self, now: float) -> float:
        """Share of the wall time since the process began that went into steps, 0 to 1."""
        return self._in_steps / max(now - self._started, 1e-9)

    def eta(self, now: float) -> float:
        """Seconds to the last step: the recent step time and the usual share of asides."""
        if not self._recent:
            return math.nan
        seconds, steps, _ = map(sum, zip(*self._recent, strict=True))
        overhead = (now - self._begun) / max(self._in_steps, 1e-9)
        return max(self.total_steps - self.step, 0) * seconds / steps * max(overhead, 1.0)


def peak_flops(device: Device, dtype: str) -> Peak:
    """The dense product rate of one device in `dtype` ("float32", "bfloat16", "float16").

    Published peaks, per jax device, without sparsity: Google Cloud TPU documentation (system
    architecture pages of v4, v5e, v5p, v6e and TPU7x; a TPU7x chip is two devices), NVIDIA data
    sheets of A100, H100, H200 and B200 (half of the figures given "with sparsity"; float32 is TF32,
    which is what XLA uses by default). On TPU float32 is held against the bfloat16 peak, of whose
    passes it is made.

    For a CPU, and for a device not in the table, the rate is measured once in this process (about
    0.1 s): products of 1024 x 1024 matrices in `dtype`, the best of all runs. CPU devices of one
    process share the machine, so each counts as its share. A busy machine measures low: compare
    such figures within one machine only.
    """
    kind = next((kind for kind in _KINDS if device.device_kind.startswith(kind)), None)
    if kind is not None:
        known = _PEAKS[kind]
        used = "bfloat16" if kind.startswith("TPU") else dtype
        if used in known:
            return Peak(known[used], f"of {kind}'s published {used} peak", published=True)
    if device.platform == "cpu":
        share = len([other for other in jax.local_devices() if other.platform == "cpu"])
        name = "this CPU"
    else:
        share, name = 1, f"this {device.device_kind}"
        log.info("no published %s peak is known for %s: measuring it", dtype, device.device_kind)
    rate = _measured_rate(device, dtype) / max(share, 1)
    return Peak(rate, f"of {name}'s measured {dtype} product rate", published=False)


def total_peak(devices: Iterable[Device], dtype: str) -> Peak:
    """The peak of all `devices` together, named after the first."""
    devices = list(devices)
    first = peak_flops(devices[0], dtype)
    others = (
        first if other.device_kind == devices[0].device_kind else peak_flops(other, dtype)
        for other in devices
    )
    return dataclasses.replace(first, flops=sum(peak.flops for peak in others))


def _measured_rate(device: Device, dtype: str) -> float:
    key = (device.platform, 0 if device.platform == "cpu" else device.id, dtype)
    if key not in _measured:
        size = 1024
        a = jax.device_put(jnp.full((size, size), 0.5, jnp.dtype(dtype)), device)
        product = jax.jit(jnp.matmul).lower(a, a).compile()
        product(a, a).block_until_ready()  # the first also wakes threads and touches memory
        best, end, runs = math.inf, time.perf_counter() + _MEASURE_S, 0
        while runs < _LEAST_RUNS or time.perf_counter() < end:
            start = time.perf_counter()
            product(a, a).block_until_ready()
            best, runs = min(best, time.perf_counter() - start), runs + 1
        _measured[key] = 2 * size**3 / best
    return _measured[key]
