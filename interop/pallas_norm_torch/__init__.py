"""pallas_norm for PyTorch programs. Importing this imports torch and jax; importing pallas_norm never imports torch."""

try:
    from ._decompositions import decompositions as decompositions
    from ._explain import explain as explain
    from .exchange import call_jax as call_jax
    from .exchange import to_jax as to_jax
    from .exchange import to_torch as to_torch
    from .gated import rms_norm_gated as rms_norm_gated
    from .huggingface import Report as Report
    from .huggingface import patch as patch
    from .huggingface import patched as patched
    from .huggingface import unpatch as unpatch
    from .module import RMSNorm as RMSNorm
    from .ops import add_rms_norm as add_rms_norm
    from .ops import rms_norm as rms_norm
    from .quantized import add_rms_norm_quantized as add_rms_norm_quantized
    from .quantized import rms_norm_quantized as rms_norm_quantized
    from .rope import rms_norm_rope as rms_norm_rope
    from .sglang import is_supported_rmsnorm_hf_hidden_size as is_supported_rmsnorm_hf_hidden_size
    from .sglang import rmsnorm_hf as rmsnorm_hf
except (ImportError, AttributeError) as error:
    if isinstance(error, ModuleNotFoundError) and error.name == "torch":
        raise ImportError(
            "pallas_norm_torch needs PyTorch, which is not installed: pip install 'pallas-norm[torch]'", name="torch"
        ) from error
    from ._tested import refusal  # of a torch that is not tested; whatever is wrong with another, it is not its version

    if (text := refusal(error)) is not None:
        raise ImportError(text, name="torch") from error
    raise
