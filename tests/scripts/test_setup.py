"""scripts/setup.sh with made-up interpreters on a made-up PATH."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]

# Stands in for an interpreter: answers version checks by $FIT, makes environments out of itself,
# records installations in $CALLS and lets them end with $PIP_EXIT.
FAKE_PYTHON = r"""#!{bash}
case "$*" in
    *"-m venv"*)
        target="${{!#}}"
        mkdir -p "$target/bin"
        cp "$0" "$target/bin/python"
        echo "version = 3.12.9" >"$target/pyvenv.cfg"
        echo "venv $target" >>"$CALLS" ;;
    *"-m pip install"*) echo "pip ${{!#}}" >>"$CALLS"; exit "${{PIP_EXIT:-0}}" ;;
    -V) echo "Python 3.12.9" ;;
    *) exit {status} ;;
esac
"""


class Machine:
    """A machine with nothing on its PATH but what a test puts there."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.bin = folder / "bin"
        self.bin.mkdir()
        self.calls = folder / "calls"
        self.calls.touch()
        self.bash = shutil.which("bash")
        for tool in ("bash", "dirname", "cat", "ls", "cksum", "grep", "mkdir", "cp"):
            (self.bin / tool).symlink_to(shutil.which(tool))
        self.variables = {
            "PATH": str(self.bin),
            "HOME": str(folder),
            "CALLS": str(self.calls),
            "AGOQ_VENV": str(folder / "venv"),
        }

    def python(self, path: Path, status: int = 0) -> Path:
        """An interpreter at ``path`` whose version checks end with ``status``."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(FAKE_PYTHON.format(bash=self.bash, status=status))
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return path

    def run(self, command: str, **more: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [self.bash, "-c", f"source {ROOT}/scripts/setup.sh; {command}"],
            env=self.variables | more,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def found(self, **more: str) -> str:
        result = self.run("agoq_find_python", **more)
        assert result.returncode == 0, result.stderr
        return result.stdout.strip()


@pytest.fixture
def machine(tmp_path) -> Machine:
    return Machine(tmp_path)


def test_first_fit_name_on_the_path(machine):
    machine.python(machine.bin / "python3", status=1)  # too old
    fit = machine.python(machine.bin / "python3.13")
    assert machine.found() == str(fit)
    better = machine.python(machine.bin / "python3.12")
    assert machine.found() == str(better)


def test_a_broken_shim_is_passed_over_for_the_real_one_in_pyenv(machine, tmp_path):
    machine.python(machine.bin / "python3.12", status=127)
    machine.python(tmp_path / ".pyenv" / "versions" / "3.11.7" / "bin" / "python")
    fit = machine.python(tmp_path / ".pyenv" / "versions" / "3.12.1" / "bin" / "python")
    assert machine.found() == str(fit)


def test_pyenv_elsewhere(machine, tmp_path):
    fit = machine.python(tmp_path / "opt" / "versions" / "3.13.0" / "bin" / "python")
    assert machine.found(PYENV_ROOT=str(tmp_path / "opt")) == str(fit)
    pyenv = machine.bin / "pyenv"
    pyenv.write_text(f"#!{machine.bash}\n[ $1 = root ] && echo {tmp_path}/opt\n")
    pyenv.chmod(0o755)
    assert machine.found() == str(fit)


def test_uv_as_the_last_resort(machine, tmp_path):
    fit = machine.python(tmp_path / "uv-python" / "python3.12")
    uv = machine.bin / "uv"
    uv.write_text(f"#!{machine.bash}\n[ \"$1 $2\" = 'python find' ] && echo {fit}\n")
    uv.chmod(0o755)
    assert machine.found() == str(fit)


def test_nothing_fit(machine):
    machine.python(machine.bin / "python3", status=1)
    result = machine.run("agoq_setup")
    assert result.returncode != 0
    assert "no working Python 3.12" in result.stderr and "apt install" in result.stderr
    assert not (machine.folder / "venv").exists()


def test_the_real_check_of_versions(machine):
    (machine.bin / "python3").symlink_to(sys.executable)
    assert machine.found() == str(machine.bin / "python3")
    result = machine.run("agoq_find_python", AGOQ_BASE_PYTHON="/nowhere/python")
    assert result.returncode != 0 and "AGOQ_BASE_PYTHON=/nowhere/python" in result.stderr


def test_setup_installs_once(machine):
    machine.python(machine.bin / "python3.12")
    venv = machine.folder / "venv"
    first = machine.run('agoq_setup && echo "$AGOQ_PYTHON"')
    assert first.returncode == 0, first.stderr
    assert first.stdout.strip() == str(venv / "bin" / "python")
    assert machine.calls.read_text() == f"venv {venv}\npip {ROOT}[test]\n"

    second = machine.run("agoq_setup", PATH="/nowhere:" + machine.variables["PATH"])
    assert second.returncode == 0 and second.stderr == ""
    assert machine.calls.read_text().count("pip") == 1

    (venv / "agoq-stamp").write_text("of another pyproject.toml\n")
    assert machine.run("agoq_setup").returncode == 0
    assert machine.calls.read_text().count("pip") == 2
    assert machine.calls.read_text().count("venv /") == 1  # the environment itself was kept


def test_a_failed_installation_is_tried_again(machine):
    machine.python(machine.bin / "python3.12")
    failed = machine.run("agoq_setup", PIP_EXIT="1")
    assert failed.returncode != 0 and "installation into" in failed.stderr
    assert machine.run("agoq_setup").returncode == 0
    assert machine.calls.read_text().count("pip") == 2


def test_a_folder_that_is_no_environment_is_left_alone(machine):
    machine.python(machine.bin / "python3.12")
    precious = machine.folder / "venv" / "thesis.txt"
    precious.parent.mkdir()
    precious.write_text("years of work")
    result = machine.run("agoq_setup")
    assert result.returncode != 0 and "is not a virtual environment" in result.stderr
    assert precious.read_text() == "years of work"


def test_scripts_parse():
    for script in [*ROOT.glob("scripts/*.sh"), ROOT / ".ci" / "run"]:
        subprocess.run(["bash", "-n", script], check=True)
        assert os.access(script, os.X_OK), script


# The same, with a torch of this version: what the version check of torch prints.
WITH_TORCH = FAKE_PYTHON.replace("    -V)", '    *importlib.metadata*) echo "{torch}" ;;\n    -V)')


def test_a_containers_torch_is_used_and_not_replaced(machine):
    """The environment sees the interpreter's packages, and pip may not take another torch."""
    text = WITH_TORCH.replace("venv $target", "venv $*").replace('pip ${{!#}}"', 'pip $*"')
    python = machine.python(machine.bin / "python3.12")
    python.write_text(text.format(bash=machine.bash, status=0, torch="2.11.0a0+eb65b36914.nv26.02"))
    assert machine.run("agoq_setup").returncode == 0
    venv, pip = machine.calls.read_text().splitlines()
    assert "--system-site-packages" in venv and "--constraint" in pip
    kept = (machine.folder / "venv" / "agoq-torch.txt").read_text()
    assert kept == "torch==2.11.0a0+eb65b36914.nv26.02\n"


def test_a_torch_that_is_asked_for_comes_from_pypi(machine):
    python = machine.python(machine.bin / "python3.12")
    text = WITH_TORCH.replace("venv $target", "venv $*")
    python.write_text(text.format(bash=machine.bash, status=0, torch="2.12.0"))
    assert machine.run("agoq_setup", AGOQ_TORCH="2.15.0").returncode == 0
    assert "--system-site-packages" not in machine.calls.read_text()
    assert (machine.folder / "venv" / "agoq-torch.txt").read_text() == "torch==2.15.0\n"
    assert machine.run("agoq_setup", AGOQ_TORCH="2.14.1").returncode == 0  # another one: installed anew
    assert machine.calls.read_text().count("pip") == 2


def test_without_a_torch_the_oldest_is_installed(machine):
    machine.python(machine.bin / "python3.12")
    assert machine.run("agoq_setup").returncode == 0
    assert (machine.folder / "venv" / "agoq-torch.txt").read_text() == "torch==2.11.*\n"


@pytest.mark.parametrize(
    "version, fits",
    [
        ("2.11.0a0+eb65b36914.nv26.02", True), ("2.11.0", True), ("2.15.0+cpu", True), ("2.10.1", False),
        ("3.0.0", False),
    ],
)  # fmt: skip
def test_which_torch_of_an_interpreter_fits(machine, version, fits):
    """What the real check says of an interpreter with such a torch, and pip of the range in pyproject."""
    site = machine.folder / "site"
    info = site / f"torch-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
    code = f"PYTHONPATH={site} _agoq_torch_of {sys.executable}"
    assert machine.run(code).stdout.strip() == (version if fits else "")
    ours = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    torch = next(Requirement(text) for text in ours if text.startswith("torch"))
    assert torch.specifier.contains(version, prereleases=True) == fits  # pip counts what is installed so
