"""One process or a thousand run the same command: start-up from Slurm, MPI, a TPU pod, GKE, or
plain variables."""

import os

import jax

from ropewalk.core.errors import LayoutError

_CLUSTERS = (("SLURM_NTASKS", "SLURM_PROCID"), ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"))


def start() -> None:
    """Joins the other processes of this run, if there are any.

    Plain variables: JAX_COORDINATOR_ADDRESS=host:port, JAX_NUM_PROCESSES, JAX_PROCESS_ID. Slurm and
    MPI are recognised by theirs, a multi-host TPU by its own. Raises LayoutError when only some of
    the three are set.
    """
    if jax.distributed.is_initialized():
        return
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    count, index = os.environ.get("JAX_NUM_PROCESSES"), os.environ.get("JAX_PROCESS_ID")
    if address and count and index:
        jax.distributed.initialize(address, int(count), int(index))
    elif count or index:
        missing = [
            name
            for name, value in (
                ("JAX_COORDINATOR_ADDRESS", address),
                ("JAX_NUM_PROCESSES", count),
                ("JAX_PROCESS_ID", index),
            )
            if not value
        ]
        raise LayoutError(
            f"a run of several processes needs {' and '.join(missing)} in the environment too"
        )
    elif any(
        int(os.environ.get(size, "1")) > 1 and rank in os.environ for size, rank in _CLUSTERS
    ) or (
        len(os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")) > 1
        or "JOBSET_NAME" in os.environ
    ):
        jax.distributed.initialize()
