import json
import math
import random

import jax
import pytest

from ropewalk.metrics import meter


class Named:
    """A device known by name only, for hardware that is not here."""

    def __init__(self, device_kind: str, platform: str) -> None:
        self.device_kind, self.platform, self.id = device_kind, platform, 0


def test_the_mean_of_pairs_is_the_mean_over_all_tokens():
    chance = random.Random(1)
    batches = [[chance.gauss(3, 1) for _ in range(chance.randint(1, 50))] for _ in range(20)]
    means = meter.Means()
    for losses in batches:
        means.add({"loss": (sum(losses), len(losses))})
    tokens = [loss for losses in batches for loss in losses]
    assert means.values()["loss"] == pytest.approx(sum(tokens) / len(tokens), rel=1e-12)
    plain_mean_of_means = sum(sum(losses) / len(losses) for losses in batches) / len(batches)
    assert means.values()["loss"] != pytest.approx(plain_mean_of_means, rel=1e-6)


def test_the_mean_does_not_depend_on_how_batches_were_cut():
    values = [random.Random(2).gauss(0, 1) for _ in range(64)]
    results = []
    for size in (1, 4, 16, 64):
        means = meter.Means()
        for start in range(0, 64, size):
            means.add({"x": (sum(values[start : start + size]), size)})
        results.append(means.values()["x"])
    assert results == pytest.approx([results[0]] * 4, rel=1e-12)


def test_a_name_without_weight_is_nan_and_reset_forgets():
    means = meter.Means()
    means.add({"loss": (0.0, 0)})
    assert math.isnan(means.values()["loss"])
    means.reset()
    assert means.values() == {}


def test_rates_are_those_of_the_window_without_asides():
    clock = meter.Meter(100, flops_per_token=6e6, peak_flops=1e10, started=1000.0)
    clock.begin(1010.0)  # 10 s of start-up
    clock.observe(1, 500, 1011.0)
    clock.aside("evaluation", 3.0)
    rates = clock.observe(5, 2000, 1018.0)  # 7 s, 3 of them evaluation: 4 steps in 4 s
    assert rates["step_s"] == pytest.approx(1.0)
    assert rates["tokens_per_s"] == pytest.approx(2500 / 5)
    assert rates["tokens"] == 2500
    assert rates["mfu"] == pytest.approx(500 * 6e6 / 1e10)
    assert rates["goodput"] == pytest.approx(5 / 18)
    assert rates["eta_s"] == pytest.approx(
        95 * 1.0 * 8 / 5
    )  # 8 s since the first step for 5 s of steps


def test_a_rate_does_not_jump_with_one_interval_and_forgets_those_before_the_window():
    clock = meter.Meter(1000, flops_per_token=1.0, peak_flops=1e3, started=0.0, window=4)
    clock.begin(0.0)
    now, rows = 0.0, []
    for step in range(1, 13):  # seen alternately early and late; the first four twice as slow
        now = 2.0 * step if step <= 4 else 8.0 + (step - 4) + (0.4 if step % 2 else 0.0)
        if step == 8:
            clock.aside("samples", 100.0)
        rows.append(clock.observe(step, 100, now + (100.0 if step >= 8 else 0.0)))
    assert [row["tokens_per_s"] for row in rows[:4]] == pytest.approx([50.0] * 4)
    assert [row["tokens_per_s"] for row in rows[-3:]] == pytest.approx([100.0] * 3, rel=0.02)
    alone = [100 / row["step_s"] for row in rows[-3:]]
    assert max(alone) > 2 * min(alone)
    assert all(row["mfu"] == pytest.approx(row["tokens_per_s"] / 1e3) for row in rows)


def test_observing_every_step_or_every_tenth_tells_the_same():
    each, tenth = (meter.Meter(1000, started=0.0) for _ in range(2))
    each.begin(2.0)
    tenth.begin(2.0)
    fine = [each.observe(step, 64, 2.0 + 0.25 * step) for step in range(1, 101)]
    coarse = [tenth.observe(step, 640, 2.0 + 0.25 * step) for step in range(10, 101, 10)]
    for name in ("step_s", "tokens_per_s", "goodput", "eta_s", "tokens"):
        assert fine[-1][name] == pytest.approx(coarse[-1][name])


def test_a_resumed_run_goes_on_counting():
    clock = meter.Meter(100, step=40, tokens=4000, started=0.0)
    rates = clock.observe(41, 100, 1.0)
    assert rates["tokens"] == 4100
    assert rates["eta_s"] == pytest.approx(59)
    assert "mfu" not in rates
    with pytest.raises(ValueError, match="only advance"):
        clock.observe(41, 100, 2.0)


@pytest.mark.parametrize(
    ("kind", "platform", "dtype", "tera"),
    [
        ("TPU v4", "tpu", "bfloat16", 275),
        ("TPU v5 lite", "tpu", "bfloat16", 197),
        ("TPU v5p", "tpu", "float32", 459),
        ("TPU v6 lite", "tpu", "bfloat16", 918),
        ("TPU7x", "tpu", "bfloat16", 1153.5),
        ("NVIDIA A100-SXM4-80GB", "gpu", "bfloat16", 312),
        ("NVIDIA H100 80GB HBM3", "gpu", "bfloat16", 989),
        ("NVIDIA H100 PCIe", "gpu", "float32", 378),
        ("NVIDIA H200", "gpu", "float16", 989),
        ("NVIDIA B200", "gpu", "bfloat16", 2250),
    ],
)
def test_published_peaks_are_found_by_the_names_that_jax_gives(kind, platform, dtype, tera):
    peak = meter.peak_flops(Named(kind, platform), dtype)
    assert peak.flops == tera * 1e12
    assert peak.published
    assert peak.label == "MFU"


def test_a_cpu_is_held_against_its_own_measured_rate_and_says_so(monkeypatch):
    monkeypatch.setattr(meter, "_MEASURE_S", 0.02)
    monkeypatch.setattr(meter, "_measured", {})
    devices = [device for device in jax.devices() if device.platform == "cpu"]
    peak = meter.peak_flops(devices[0], "float32")
    assert 1e8 < peak.flops < 1e14
    assert not peak.published
    assert "this CPU's measured float32" in peak.basis
    assert meter.peak_flops(devices[0], "float32") == peak  # measured once
    together = meter.total_peak(devices, "float32")
    assert together.flops == pytest.approx(peak.flops * len(devices))
    json.dumps(together.flops)
