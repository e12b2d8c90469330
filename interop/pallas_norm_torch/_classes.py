"""The RMSNorms of Hugging Face transformers: what each forward computes, and how it is recognised.

A class is known by its source: `digest` is a hash of its forward and of the methods that forward reaches through self,
without docstrings and annotations. Another digest is another class, whatever it is called, and is not replaced.
`scripts/classify-norms` lists the classes of an installed or unpacked transformers by row, and those that no row knows.
"""

from __future__ import annotations

import ast
import dataclasses
import enum
import re

from . import _forwards as forwards
from ._sources import digest as digest
from ._sources import read_source as read_source
from ._sources import source_of as source_of
from .module import RMSNorm


class Kind(enum.Enum):
    """What a forward computes, with unit = x * rstd in float32, and where it rounds."""

    LLAMA = "weight * round(unit)"
    GEMMA = "round(unit * (1 + weight))"
    OLMO2 = "round(unit * weight)"
    T5 = "weight * round(unit) to the weight's dtype; no rounding before a float32 weight"
    POW = "round(unit * weight), rstd = pow(mean, -0.5); the weight is optional"
    WEIGHTLESS = "round(unit)"
    CENTERED = "round(unit * round(1 + weight))"
    SCALED_INPUT = "round(unit) of round(x * (1 + weight))"
    GROUPED = "GEMMA over groups of columns"
    BIASED = "weight * round(unit) + bias, both optional"
    GATED_INPUT = "weight * round(unit) of x * silu(gate), over all columns or groups"
    GATED_OUTPUT = "round(weight * round(unit) * act(gate))"
    GATED_OUTPUT_WIDE = "round(unit * weight * act(gate))"
    GATED_GROUPS = "round(unit * weight), over groups, x * silu(gate) before or after"
    REFUSED = "not replaced"


def _squares(node: ast.expr) -> bool:
    """x ** 2, x.pow(2), torch.pow(x, 2) or x.square(), but not of a difference: that is a LayerNorm."""
    match node:
        case ast.Call(func=ast.Attribute(attr="pow" | "square", value=base)):
            base = node.args[0] if isinstance(base, ast.Name) and base.id == "torch" else base
        case ast.BinOp(left=base, op=ast.Pow(), right=ast.Constant(value=2)):
            pass
        case _:
            return False
    return not any(isinstance(inner, ast.Sub) for inner in ast.walk(base))


def looks_like_rms_norm(name: str, source: str) -> bool:
    """By its name, or because it divides by the root of a mean of squares, or calls torch's rms_norm."""
    if re.search("rms_?norm", name, re.IGNORECASE) or "F.rms_norm(" in source or "functional.rms_norm(" in source:
        return True
    if "norm" not in name.lower() and "rsqrt(" not in source:
        return False
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Call(func=ast.Attribute(attr="mean", value=receiver), args=arguments):
                if any(map(_squares, (receiver, *arguments))):
                    return True
            case _:
                pass
    return False


@dataclasses.dataclass(frozen=True)
class Row:
    kind: Kind
    example: str
    note: str
    forward: forwards.Forward | None = None
    eps: str = "eps"  # the attribute that holds eps
    torch_eps: bool = False  # None means torch's default
    autocast: bool = False  # its operator may be on autocast's list of those in float32


ROWS: dict[str, Row] = {
    "9635bcd843f309a0": Row(
        Kind.LLAMA,
        "LlamaRMSNorm",
        "Llama, Mistral, Qwen2, Qwen3, Phi3, DeepSeek, Glm and most others.",
        forwards.llama,
        "variance_epsilon",
    ),
    "cc4f30e2593e6f04": Row(
        Kind.LLAMA, "Llama4TextRMSNorm", "Rounds with type_as, then multiplies by the weight.", forwards.llama4
    ),
    "cd89819860dd7a28": Row(
        Kind.LLAMA,
        "CpmAntLayerNorm",
        "The weight comes last, and its length is checked, as rms_norm does.",
        forwards.cpmant,
    ),
    "3152525beceb0d02": Row(
        Kind.T5,
        "T5LayerNorm",
        "The weight's dtype alone says whether and to what it rounds.",
        forwards.t5,
        "variance_epsilon",
    ),
    "e5559c7750c32d00": Row(Kind.GEMMA, "GemmaRMSNorm", "Gemma to Gemma3, Qwen3Next and Qwen3.5.", forwards.gemma),
    "eef4e978a32aa4a4": Row(
        Kind.OLMO2,
        "Olmo2RMSNorm",
        "GptOss too: a float32 unit promotes the weight.",
        forwards.olmo2,
        "variance_epsilon",
    ),
    "b6d7ab076811b6bb": Row(
        Kind.OLMO2, "HeliumRMSNorm", "Widens the weight itself.", forwards.olmo2, "variance_epsilon"
    ),
    "4ad8d3f59922a14a": Row(Kind.OLMO2, "MoshiRMSNorm", "Widens the weight itself.", forwards.moshi),
    "b8942278a8f1b084": Row(
        Kind.OLMO2,
        "torch.nn.RMSNorm",
        "DiffLlama's; torch.nn.functional.rms_norm rounds once, to x's dtype.",
        forwards.torch_rms_norm,
        torch_eps=True,
        autocast=True,
    ),
    "e0fd214fdd791989": Row(
        Kind.POW,
        "Gemma3nRMSNorm",
        "pow(mean, -0.5): on a CPU, rsqrt's bits for all 2^24 mantissas and parities; else a matter of rstd alone.",
        forwards.gemma4,
    ),
    "cba6ba41dc15234a": Row(
        Kind.WEIGHTLESS, "Llama4TextL2Norm", "Has no weight, or does not use it (EsmFold2).", forwards.weightless
    ),
    "2c0d5a3de6fa5022": Row(Kind.WEIGHTLESS, "Inkling2UnweightedRMSNorm", "Of 5.24.", forwards.weightless_states),
    "cc985dec2d26fb49": Row(
        Kind.CENTERED,
        "MuseSparkTextCenteredRMSNorm",
        "Rounds 1 + weight to the weight's dtype, which Gemma does not.",
        forwards.muse_centered,
    ),
    "bfe1a1b564fc63ea": Row(
        Kind.SCALED_INPUT, "MuseSparkTextInputScaledRMSNorm", "The weight comes first.", forwards.muse_scaled
    ),
    "6762c6ceaf95aca3": Row(Kind.GROUPED, "Qwen4ExpTextRMSNorm", "Gemma's where group_size is None.", forwards.qwen4),
    "297ec9b5bfa77171": Row(
        Kind.BIASED, "xLSTMRMSNorm", "Only where force_float32_reductions is True.", forwards.xlstm
    ),
    "0784e1271fca788e": Row(
        Kind.GATED_INPUT, "MambaRMSNormGated of 5.17", "One group.", forwards.mamba2, "variance_epsilon"
    ),
    "e930594abdf99541": Row(
        Kind.GATED_INPUT,
        "Zamba2RMSNormGated",
        "Groups of group_size columns.",
        forwards.mamba2_groups,
        "variance_epsilon",
    ),
    "96920b139d7fbbc2": Row(
        Kind.GATED_OUTPUT, "Qwen3NextRMSNormGated", "The gate in float32.", forwards.qwen3_next, "variance_epsilon"
    ),
    "66adebd7ca546584": Row(
        Kind.GATED_OUTPUT_WIDE, "KimiLinearRMSNormGated", "Everything in float32.", forwards.kimi, "variance_epsilon"
    ),
    "f6544ef71153b6ed": Row(
        Kind.GATED_GROUPS,
        "FalconH1RMSNormGated of 5.17",
        "Drops a sequence axis of length 1.",
        forwards.falcon_h1_squeezing,
        "variance_epsilon",
    ),
    "873a05ece6ae6c87": Row(
        Kind.GATED_GROUPS,
        "FalconH1RMSNormGated",
        "Drops the sequence axis that it gave a matrix.",
        forwards.falcon_h1,
        "variance_epsilon",
    ),
    "08c50f9bfacacd6e": Row(
        Kind.REFUSED, "DeepseekV4UnweightedRMSNorm", "rounds rstd itself to x's dtype, which rms_norm never does"
    ),
    "9e7c2b713365c52a": Row(Kind.REFUSED, "HYV4UnweightedRMSNorm", "returns rstd, not the normalised row"),
    "f8e5fb56992983c3": Row(
        Kind.REFUSED, "GradiumPhononTTSTimestepNorm", "squares and averages in x's dtype, not in float32"
    ),
    "d171d813a4300a70": Row(
        Kind.REFUSED, "ImageGPTLayerNorm", "divides by sqrt, and squares and averages in x's dtype, not in float32"
    ),
    "57fe7e8de6e083b3": Row(
        Kind.REFUSED, "AXK2GatedRMSNorm", "holds a norm that is replaced, and only gates its output"
    ),
    "e2dee4de6afaa686": Row(
        Kind.REFUSED, "VoxtralRealtimeTextAdaRmsNorm", "normalises nothing: two linear layers that make a factor"
    ),
    "41dd27343cd095a6": Row(
        Kind.REFUSED, "VibeVoiceDiffusionHeadFinalLayer", "a layer that calls torch's rms_norm inside its forward"
    ),
    "6afc3d97ca9f842d": Row(Kind.REFUSED, "LSHSelfAttention", "an attention layer that normalises its keys inside"),
    "bb7380fc1bdd58e7": Row(Kind.REFUSED, "IntLayerNorm", "a quantised LayerNorm: it subtracts the mean"),
}
"""By digest. A note ends in a full stop where it explains and is a reason where the row is refused."""


def recognise(owner: type) -> Row | str | None:
    """The row that says what computes this norm instead, the reason why nothing does, or None: no row knows it."""
    source = read_source(owner)
    row = None if source is None else ROWS.get(digest(source))
    return row if row is None or row.forward is not None else row.note


def looks_like_one(owner: type) -> bool:
    """Whether a class that no row knows looks like an RMSNorm; this library's own is none to be replaced."""
    if owner.forward is RMSNorm.forward:  # type: ignore[attr-defined]
        return False
    return looks_like_rms_norm(owner.__name__, read_source(owner) or "")
