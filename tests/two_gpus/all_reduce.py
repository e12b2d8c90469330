"""Whether plain JAX can add up small arrays of two GPUs on this host; prints the XLA_FLAGS with which it can.

XLA of JAX 0.12 has a kernel of its own for that, which reads the other GPU's memory through a window of NCCL. On hosts
whose driver gives no such window every program that it is part of raises INTERNAL (ncclGetPeerDevicePointer), the
gradient of a weight that both GPUs have, for example; NCCL's own all-reduce runs there.
"""

from __future__ import annotations

import os
import subprocess
import sys

BY_NCCL = "--xla_gpu_experimental_use_collective_kernels=-ALL_REDUCE"  # of JAX 0.12; older ones do not know it
SECONDS = 90
PLAIN = """
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P

mesh = jax.make_mesh((2,), ("data",))
x = jax.device_put(jnp.ones((256, 4096)), NamedSharding(mesh, P("data")))
total = jax.jit(lambda x: jax.reshard(x.sum(0), P()))
with jax.set_mesh(mesh):
    assert "all-reduce" in total.lower(x).compile().as_text()
    assert (total(x) == 256).all()
"""


def failure(flags: str, *, program: str = PLAIN) -> str | None:
    """The last line that the program says with these flags where it fails."""
    environment = os.environ | {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False)
    return None if done.returncode == 0 else (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]


def main(*, program: str = PLAIN) -> int:
    if (first := failure("", program=program)) is None:
        return 0
    if (second := failure(BY_NCCL, program=program)) is not None:
        print(f"plain JAX adds up no arrays of two GPUs: {first}; with {BY_NCCL}: {second}", file=sys.stderr)
        return 1
    print(f"plain JAX adds up no small arrays of two GPUs here: {first}", file=sys.stderr)
    print(BY_NCCL)
    return 0


if __name__ == "__main__":
    sys.exit(main())
