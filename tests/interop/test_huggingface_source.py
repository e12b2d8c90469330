"""The text that is hashed is that of the code that runs."""

from __future__ import annotations

import importlib
import inspect
import os
import pathlib
import types
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm

from pallas_norm_torch import _classes, _sources, huggingface
from tests.interop.launched import kernels_everywhere  # noqa: F401 (a fixture of every test here)
from tests.interop.norm_classes import BF16, N, build, compare

OLMO2 = ("self.weight * hidden_states.to(input_dtype)", "(self.weight * hidden_states).to(input_dtype)")
HEAD = "import torch\nfrom torch import nn\n\n\n"


def written(folder: pathlib.Path, name: str, *, head: str = HEAD, old: str = "", new: str = "") -> pathlib.Path:
    source = inspect.getsource(LlamaRMSNorm).partition("class LlamaRMSNorm")
    file = folder / f"{name}.py"
    text = head + (source[1] + source[2]).replace(old, new)
    before = file.stat().st_mtime if file.exists() else None
    file.write_text(text)
    if before is not None:
        os.utime(file, (before + 10, before + 10))
    return file


def imported(folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch, name: str, **options: Any) -> Any:
    written(folder, name, **options)
    monkeypatch.syspath_prepend(folder)
    return importlib.import_module(name).LlamaRMSNorm


def test_a_file_edited_after_its_import(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Llama's runs, the file says Olmo2's: it is known by what it computes, which is Llama's still."""
    owner = imported(tmp_path, monkeypatch, "edited_afterwards")
    assert _classes.read_source(owner) is not None
    written(tmp_path, "edited_afterwards", old=OLMO2[0], new=OLMO2[1])
    assert "(self.weight * hidden_states)" in inspect.getsource(owner.forward)  # what was hashed
    assert _classes.read_source(owner) is None
    assert huggingface.patch(build(owner, BF16)).known == {"LlamaRMSNorm": "computation"}
    module, x = build(owner, BF16), torch.randn(8, N, generator=torch.Generator().manual_seed(0)).bfloat16()
    own = module(x)
    with huggingface.patched(module):
        assert (module(x) != own).float().mean() < 0.05  # rstd's last bit; the other rounding is a fifth


def test_a_file_whose_lines_have_moved(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    owner = imported(tmp_path, monkeypatch, "moved_afterwards")
    written(tmp_path, "moved_afterwards", head=HEAD + "# a line\n")
    assert _classes.read_source(owner) is None


def test_another_torch_in_the_text(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The names in the text have to mean what they say."""
    head = HEAD + "class Other:\n    float32 = torch.float64\n    rsqrt = torch.rsqrt\n\n\n"
    owner = imported(tmp_path, monkeypatch, "another_torch", head=head)
    assert _classes.read_source(owner) is not None
    monkeypatch.setitem(owner.forward.__globals__, "torch", owner.forward.__globals__["Other"])
    assert _classes.read_source(owner) is None


def test_other_defaults_than_the_text_s(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    owner = imported(
        tmp_path, monkeypatch, "other_defaults", old="hidden_states: torch.Tensor)", new="hidden_states=None)"
    )
    assert _classes.read_source(owner) is not None
    owner.forward.__defaults__ = (torch.ones(N),)
    assert _classes.read_source(owner) is None


def test_code_put_into_a_function() -> None:
    """forward.__code__ can be replaced; the lines that it came from are then others."""
    code = LlamaRMSNorm.forward.__code__
    other = nn.RMSNorm.forward.__code__.replace(co_firstlineno=code.co_firstlineno, co_filename=code.co_filename)
    assert _sources.definition_of(types.FunctionType(other, LlamaRMSNorm.forward.__globals__)) is None


def test_a_fused_layer_is_read_in_the_same_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer whose text is not its code stays as it is."""
    monkeypatch.setattr(_sources, "_compiled", lambda text: {})
    assert _classes.read_source(LlamaDecoderLayer) is None
    assert _classes.read_source(LlamaRMSNorm) is None


def test_unedited_files_are_read() -> None:
    compare(LlamaRMSNorm, BF16, BF16, exact=False)
    assert _classes.read_source(LlamaRMSNorm) is not None
