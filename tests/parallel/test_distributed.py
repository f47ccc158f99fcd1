"""Start-up from variables. Joining real processes is shown by the end-to-end tests."""

import jax
import pytest

from ropewalk.core.errors import LayoutError
from ropewalk.parallel import distributed

VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


@pytest.fixture(autouse=True)
def bare(monkeypatch):
    for name in (*VARIABLES, "SLURM_NTASKS", "SLURM_PROCID", "OMPI_COMM_WORLD_SIZE",
                 "OMPI_COMM_WORLD_RANK", "TPU_WORKER_HOSTNAMES", "JOBSET_NAME"):  # fmt: skip
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("given", [(0, 1), (1, 2), (0, 2), (1,), (2,)])
def test_variables_that_are_missing_are_named(given, monkeypatch):
    for i in given:
        monkeypatch.setenv(VARIABLES[i], "1")
    with pytest.raises(LayoutError) as refusal:
        distributed.start()
    for i, name in enumerate(VARIABLES):
        assert (name in str(refusal.value)) == (i not in given)


def test_one_process_starts_nothing(monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "1")
    monkeypatch.setenv("SLURM_PROCID", "0")
    distributed.start()
    assert not jax.distributed.is_initialized()
