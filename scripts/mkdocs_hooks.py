"""What mkdocs is told beside mkdocs.yml: the first page is README.md, with links to the pages of this site."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent


def start_page() -> str:
    """README.md's links are absolute, since an index of packages shows it too."""
    source = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Source"]
    raw = source.replace("https://github.com/", "https://raw.githubusercontent.com/")
    text = (ROOT / "README.md").read_text()
    return text.replace(f"{source}/blob/main/docs/", "").replace(f"{raw}/main/docs/", "")


def on_files(files: Files, config: Any) -> Files:
    files.append(File.generated(config, "index.md", content=start_page()))
    return files
