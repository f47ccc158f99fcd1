"""Learning rates against closed forms at the corners and between."""

import itertools
import math
from typing import Any

import pytest

from ropewalk.core.errors import ConfigError
from ropewalk.optim.schedule import Schedule

PEAK, STEPS = 2e-3, 100


def rates(steps=STEPS, **values):
    schedule: Any = Schedule(**values).build(PEAK, steps)
    return [float(schedule(step)) for step in range(steps + 20)]


@pytest.mark.parametrize("kind", ["cosine", "wsd", "linear", "constant"])
def test_warm_up_rises_in_equal_steps_to_the_peak(kind):
    found = rates(kind=kind, warmup_steps=10)
    for step in range(10):  # the first step already learns
        assert found[step] == pytest.approx(PEAK * (step + 1) / 10, rel=1e-6)
    assert found[10] == pytest.approx(PEAK, rel=1e-6)
    assert max(found) == pytest.approx(PEAK, rel=1e-6)


@pytest.mark.parametrize("warmup", [0, 10])
def test_closed_forms(warmup):
    span = STEPS - warmup
    forms = {
        "constant": lambda done: 1.0,
        "linear": lambda done: 1 - 0.8 * done,
        "cosine": lambda done: 0.2 + 0.8 * (1 + math.cos(math.pi * done)) / 2,
    }
    for kind, form in forms.items():
        found = rates(kind=kind, warmup_steps=warmup, final=0.2)
        for step in range(warmup, STEPS):
            wanted = PEAK * form((step - warmup) / span)
            assert found[step] == pytest.approx(wanted, rel=1e-5), (kind, step)


@pytest.mark.parametrize(("decay", "length"), [(None, 20), (30, 30), (90, 90)])
def test_wsd_is_stable_then_falls_in_a_line(decay, length):
    found = rates(kind="wsd", warmup_steps=10, decay_steps=decay, final=0.0)
    for step in range(10, STEPS):
        left = min(1.0, (STEPS - step) / length)
        assert found[step] == pytest.approx(PEAK * left, rel=1e-5), step


@pytest.mark.parametrize("kind", ["cosine", "wsd", "linear"])
def test_the_end_is_the_final_fraction_and_stays_there(kind):
    found = rates(kind=kind, warmup_steps=5, final=0.25)
    assert found[STEPS:] == pytest.approx([0.25 * PEAK] * 20, rel=1e-6)
    assert found[STEPS - 1] > 0.25 * PEAK
    assert all(later <= earlier for earlier, later in itertools.pairwise(found[5:]))


@pytest.mark.parametrize(
    ("values", "steps", "numbers"),
    [
        ({"warmup_steps": 100}, 100, ["100"]),
        ({"warmup_steps": 200}, 100, ["warmup_steps = 200", "steps = 100"]),
        ({"kind": "wsd", "warmup_steps": 50, "decay_steps": 60}, 100, ["50", "60", "100"]),
        ({"kind": "linear", "warmup_steps": 3}, 3, ["warmup_steps = 3", "steps = 3"]),
    ],
)
def test_what_does_not_fit_in_the_run_is_refused_with_its_numbers(values, steps, numbers):
    with pytest.raises(ConfigError) as refusal:
        Schedule(**values).build(PEAK, steps)
    assert all(number in str(refusal.value) for number in numbers), refusal.value
    assert "optimizer.schedule" in str(refusal.value)


@pytest.mark.parametrize(
    "values", [{"final": 1.5}, {"warmup_steps": -1}, {"decay_steps": 0}, {"kind": "cosin"}]
)
def test_impossible_values_are_refused_by_key(values):
    with pytest.raises(ConfigError, match=f"optimizer.schedule: key `{next(iter(values))}`"):
        Schedule.parse(values, "optimizer.schedule")


def test_a_run_of_one_step_learns():
    assert [rates(steps=1, kind=kind)[0] for kind in ("cosine", "wsd", "linear")] == [
        pytest.approx(PEAK)
    ] * 3
