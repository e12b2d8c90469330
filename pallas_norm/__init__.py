"""RMSNorm with Hugging Face's rounding, as Pallas GPU kernels for JAX programs."""

from . import gated_reference as gated_reference
from . import quantized_reference as quantized_reference
from . import reference as reference
from . import rope_reference as rope_reference
from ._api import add_rms_norm as add_rms_norm
from ._api import explain as explain
from ._api import rms_norm as rms_norm
from ._api_gated import rms_norm_gated as rms_norm_gated
from ._api_quantized import add_rms_norm_quantized as add_rms_norm_quantized
from ._api_quantized import rms_norm_quantized as rms_norm_quantized
from ._api_rope import rms_norm_rope as rms_norm_rope
from ._api_rope import rms_norm_rope_qkv as rms_norm_rope_qkv
from ._autodiff import RSTD as RSTD
from ._dispatch import Explanation as Explanation
from ._patching import Report as Report
from ._patching import Skipped as Skipped
from ._patching import patch as patch
from ._patching import unpatch as unpatch
from .plans.plan import Plan as Plan
from .regimes import plan_for as plan_for

__version__ = "0.2.0"
