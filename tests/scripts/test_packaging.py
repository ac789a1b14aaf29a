"""What gets installed, under which names, and what the names may import."""

from __future__ import annotations

import ast
import importlib.metadata
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def python(code: str, folder: Path) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_transformers_and_megatrons_tokenizers_import_from_the_root():
    python(
        "import transformers.integrations.hub_kernels\n"
        "from transformers import AutoTokenizer, LlamaForCausalLM\n"
        "from megatron.core.tokenizers import MegatronTokenizer\n"
        "from megatron.training.arguments import parse_args\n",
        ROOT,
    )


def test_an_installed_package_named_kernels_is_not_shadowed(tmp_path):
    """The repository's root comes first on sys.path there, the installed package last."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("")
    code = (
        f"import sys; sys.path.append({str(tmp_path)!r})\n"
        "import kernels, agoq_kernels.ops\n"
        "print(kernels.__file__)"
    )
    assert python(code, ROOT) == str(tmp_path / "kernels" / "__init__.py")


def test_packages_are_found_from_anywhere(tmp_path):
    code = "import agoq_kernels.ops, agoq_megatron.config\nprint(agoq_kernels.ops.__file__)"
    assert Path(python(code, tmp_path)).name == "ops.py"


def test_no_top_level_name_kernels_is_installed():
    distribution = importlib.metadata.distribution("agoq-megatron")
    names = (distribution.read_text("top_level.txt") or "").split()
    assert sorted(names) == ["agoq_kernels", "agoq_megatron"]


def test_every_package_is_listed():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {path.parent.relative_to(ROOT) for path in ROOT.glob("agoq_megatron/**/*.py")}
    folders |= {path.parent.relative_to(ROOT) for path in ROOT.glob("kernels/**/*.py")}
    names = {".".join(folder.parts).replace("kernels", "agoq_kernels", 1) for folder in folders}
    assert names == set(settings["packages"])


@pytest.mark.parametrize("path", sorted(ROOT.glob("kernels/**/*.py")), ids=lambda p: p.name)
def test_kernels_import_torch_and_triton_only(path):
    allowed = {*sys.stdlib_module_names, "torch", "triton", "agoq_kernels"}
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "agoq_kernels"]
        for name in names:
            assert name.partition(".")[0] in allowed, f"{path}:{node.lineno} imports {name}"
