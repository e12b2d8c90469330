"""A Pallas kernel on the caller's stream, without JAX's runtime: compiled once for each device, proved there, and
launched with raw addresses."""

from .compiling import captures as captures
from .compiling import gpu_of as gpu_of
from .compiling import kernel as kernel
from .compiling import unavailable as unavailable
from .driver import Unavailable as Unavailable
from .kernels import Kernel as Kernel
