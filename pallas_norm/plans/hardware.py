"""What plans need to know of a GPU.

The tables are made for an H100 or H200, and their numbers are fixed, so that the grid, and with it the order in which
dweight is added up, is too. fitting.py makes of such a plan what another GPU can run.
"""

from __future__ import annotations

from typing import NamedTuple

SMS = 132
WARPS = 4  # in a warpgroup, which is what Pallas calls a thread
SMEM_BYTES = 227 << 10  # of an SM, for all its programs

# By CTAs of a cluster, clusters that an H200 holds at a time where a CTA fills an SM; more run after the others.
RESIDENT_CLUSTERS = {1: SMS, 2: 66, 4: 30, 8: 15}


class Generation(NamedTuple):
    since: tuple[int, int]  # compute capability; up to the next row
    name: str
    clusters: bool  # and bulk copies to shared memory
    shared_bytes: int  # that one CTA may have; each takes 1 KB more of an SM, which has that much more


# CUDA C++ Programming Guide, technical specifications by compute capability.
GENERATIONS = (
    Generation((8, 0), "Ampere: A100, A30", clusters=False, shared_bytes=163 << 10),
    Generation((8, 6), "Ampere: A10, A40, RTX 30", clusters=False, shared_bytes=99 << 10),
    Generation((8, 7), "Ampere: Orin", clusters=False, shared_bytes=163 << 10),
    Generation((8, 9), "Ada: L4, L40S, RTX 40", clusters=False, shared_bytes=99 << 10),
    Generation((9, 0), "Hopper: H100, H200", clusters=True, shared_bytes=SMEM_BYTES),
    Generation((10, 0), "Blackwell: B200, B300", clusters=True, shared_bytes=227 << 10),
    Generation((11, 0), "Blackwell: Thor", clusters=True, shared_bytes=227 << 10),
    Generation((12, 0), "Blackwell: RTX 50, RTX PRO 6000, GB10", clusters=True, shared_bytes=99 << 10),
)
HOPPER = (9, 0)


def generation(capability: tuple[int, int]) -> Generation:
    """That of a compute capability from 8.0 on."""
    return [row for row in GENERATIONS if row.since <= capability][-1]


def named(capability: tuple[int, int]) -> str:
    """As NVIDIA writes it: 8.0."""
    return ".".join(map(str, capability))


class Gpu(NamedTuple):
    """What a kernel's code depends on."""

    capability: tuple[int, int]
    shared_bytes: int  # that one CTA may have
    multiprocessors: int

    @property
    def clusters(self) -> bool:
        return generation(self.capability).clusters

    def resident_clusters(self, ctas: int) -> int:
        """Of so many CTAs, held at a time where a CTA fills an SM. Two SMs are neighbours everywhere; of more, how many
        are is known of the H200 alone, so other GPUs are given no more than it holds, and their share if they are
        smaller."""
        if ctas <= 2:
            return self.multiprocessors // ctas
        known = RESIDENT_CLUSTERS[ctas]
        return max(1, min(known, known * self.multiprocessors // SMS))


H200 = Gpu(HOPPER, SMEM_BYTES, SMS)
