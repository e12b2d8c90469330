"""The RMSNorms of Hugging Face transformers: what each forward computes, and how it is recognised.

A class is known by its source: `digest` is a hash of its forward and of the methods that forward reaches through self,
without docstrings and annotations. Another digest is another class, whatever it is called, and is not replaced.
`scripts/classify-norms` lists the classes of an installed or unpacked transformers by row, and those that no row knows.
"""

from __future__ import annotations

import ast
import copy
import dataclasses
import enum
import functools
import hashlib
import inspect
import re
import textwrap
import types
from collections.abc import Callable

from torch import nn

from . import _forwards as forwards

FindMethod = Callable[[str], "ast.FunctionDef | None"]


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


def _bare(definition: ast.FunctionDef) -> ast.FunctionDef:
    """A copy without docstring and annotations, which compute nothing."""
    bare = copy.deepcopy(definition)
    names = bare.args
    for argument in (*names.posonlyargs, *names.args, *names.kwonlyargs, names.vararg, names.kwarg):
        if argument is not None:
            argument.annotation = None
    bare.returns = None
    if ast.get_docstring(bare) is not None:
        bare.body = bare.body[1:] or [ast.Pass()]
    return bare


def source_of(find: FindMethod) -> str | None:
    """forward and the methods that it reaches through self, in that order; None without a forward.

    `find` gives the definition of the class's method of that name, or None.
    """
    found: dict[str, str] = {}
    names = ["forward"]
    for name in names:  # grows
        if name not in found and (definition := find(name)) is not None:
            bare = _bare(definition)
            found[name] = ast.unparse(bare)
            names += [
                node.attr
                for node in ast.walk(bare)
                if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
            ]
    return "\n".join(found.values()) if "forward" in found else None


def digest(source: str) -> str:
    """The first 64 bits of SHA-256: enough against changes, which nobody makes on purpose to collide."""
    return hashlib.sha256(source.encode()).hexdigest()[:16]


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


# Digests of functions that call the one they wrap, unchanged: GradientCheckpointingLayer's, since 5.18 or later.
TRANSPARENT = {"5ee280b434265524"}


@functools.cache
def _definition(code: types.CodeType) -> ast.FunctionDef | None:
    """Of the code itself: a function that wraps another one with functools.wraps is not that other one."""
    try:
        statement = ast.parse(textwrap.dedent(inspect.getsource(code))).body[0]
    except (OSError, TypeError, SyntaxError, IndexError):
        return None
    return statement if isinstance(statement, ast.FunctionDef) else None


def read_source(owner: type) -> str | None:
    """source_of a class that has been imported; None where there is none to read: made with exec, typed at a prompt."""

    def find(name: str) -> ast.FunctionDef | None:
        method = inspect.getattr_static(owner, name, None)
        if not isinstance(method, types.FunctionType) or method is inspect.getattr_static(nn.Module, name, None):
            return None
        definition = _definition(method.__code__)
        wrapped = getattr(method, "__wrapped__", None)
        if definition is not None and wrapped is not None and digest(ast.unparse(_bare(definition))) in TRANSPARENT:
            return _definition(wrapped.__code__)
        return definition

    return source_of(find)


def recognise(owner: type) -> Row | str | None:
    """The row that says what computes this norm instead, the reason why nothing does, or None: it is no RMSNorm."""
    source = read_source(owner)
    if source is None:
        unread = "the source of its forward cannot be read, and it is recognised by that: define it in a file"
        return unread if looks_like_rms_norm(owner.__name__, "") else None
    key = digest(source)
    if (row := ROWS.get(key)) is not None:
        return row if row.forward is not None else row.note
    if not looks_like_rms_norm(owner.__name__, source):
        return None
    return (
        f"its forward, digest {key}, is none of the {len(ROWS)} that are known, so it may round differently; "
        "needed a row in pallas_norm_torch/_classes.py: report the class and the version of its package"
    )
