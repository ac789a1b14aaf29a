#!/usr/bin/env bash
# Makes the virtual environment that the other scripts run in: finds a fit Python, creates .venv,
# installs this project with its test tools. Fast when that is already done, and then offline.
#
#   source scripts/setup.sh && agoq_setup     # afterwards $AGOQ_PYTHON is the environment's python
#   scripts/setup.sh                          # the same, for its effect alone
#
# AGOQ_VENV          where the environment lies (default: .venv in the repository)
# AGOQ_BASE_PYTHON   the interpreter to make it from (default: searched for)
# AGOQ_TORCH         the torch to install, such as 2.15.0. Default: the one that the interpreter has, where it is
#                    2.11 or newer (as in NVIDIA's containers): that is used as it is; else 2.11, with which
#                    everything was measured. pyproject.toml says what else works.

AGOQ_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

_agoq_say() { printf '%s\n' "$*" >&2; }

# True if "$1" really runs and is a version that PyTorch's wheels exist for. A name on the PATH
# proves nothing: pyenv's shims, for one, exist for versions that are not selected and then fail.
_agoq_fit() {
    "$1" -c 'import sys; sys.exit(not (3, 12) <= sys.version_info[:2] <= (3, 14))' >/dev/null 2>&1
}

# Every interpreter worth trying, one a line, the best tested version first.
_agoq_candidates() {
    local name root path
    for name in python3.12 python3.13 python3.14 python3 python; do
        command -v "$name" || true
    done
    root="${PYENV_ROOT:-}"
    if [ -z "$root" ] && command -v pyenv >/dev/null; then
        root="$(pyenv root 2>/dev/null || true)"
    fi
    for path in "${root:-$HOME/.pyenv}"/versions/3.1[2-9]*/bin/python; do
        [ ! -x "$path" ] || printf '%s\n' "$path"
    done
    if command -v uv >/dev/null; then
        uv python find --no-project '>=3.12,<3.15' 2>/dev/null || true
    fi
}

# Prints the interpreter to use; fails, with what to install, if there is none.
agoq_find_python() {
    local candidate
    if [ -n "${AGOQ_BASE_PYTHON:-}" ]; then
        if _agoq_fit "$AGOQ_BASE_PYTHON"; then
            printf '%s\n' "$AGOQ_BASE_PYTHON"
            return 0
        fi
        _agoq_say "error: AGOQ_BASE_PYTHON=$AGOQ_BASE_PYTHON does not run, or is not Python 3.12 to 3.14."
        return 1
    fi
    while IFS= read -r candidate; do
        if _agoq_fit "$candidate"; then
            printf '%s\n' "$candidate"
            return 0
        fi
    done < <(_agoq_candidates)
    _agoq_say "error: no working Python 3.12, 3.13 or 3.14 was found on the PATH, in pyenv or in uv." \
        $'\nInstall one, for example:' \
        $'\n  Debian, Ubuntu   sudo apt install python3.12 python3.12-venv' \
        $'\n  pyenv            pyenv install 3.12' \
        $'\n  uv               uv python install 3.12' \
        $'\n  conda            conda create -n agoq python=3.12 && conda activate agoq' \
        $'\nor name one: AGOQ_BASE_PYTHON=/path/to/python3.12'
    return 1
}

# Prints the version of the torch that interpreter "$1" has, if it is one that this project works with. A
# container's 2.11.0a0+gitabc.nv26.02 is one, and no wheel of PyPI could take its place.
_agoq_torch_of() {
    "$1" -c '
import importlib.metadata, re
version = importlib.metadata.version("torch")
if (2, 11) <= tuple(map(int, re.match(r"(\d+)\.(\d+)", version).groups())) < (3,):
    print(version)
' 2>/dev/null || true
}

# An environment at "$2" made from interpreter "$1", by uv where the interpreter cannot do it itself
# (Debian ships ensurepip apart). More arguments go to either.
_agoq_make_venv() {
    if "$1" -c 'import ensurepip, venv' >/dev/null 2>&1; then
        "$1" -m venv --clear "${@:3}" "$2"
    elif command -v uv >/dev/null; then
        uv venv --quiet --clear --seed --python "$1" "${@:3}" "$2"
    else
        _agoq_say "error: $1 lacks the modules venv and ensurepip." \
            $'\nInstall them (Debian, Ubuntu: sudo apt install python3-venv), or install uv.'
        return 1
    fi
}

# What the environment depends on. An environment whose stamp says the same is complete.
_agoq_stamp() {
    printf '%s\n' "$AGOQ_ROOT" "torch ${AGOQ_TORCH:-}"
    cksum <"$AGOQ_ROOT/pyproject.toml"
    grep -i '^version' "$1/pyvenv.cfg"
}

agoq_setup() {
    local venv="${AGOQ_VENV:-$AGOQ_ROOT/.venv}" base torch="${AGOQ_TORCH:-}" options=()
    export AGOQ_PYTHON="$venv/bin/python"
    if [ -f "$venv/agoq-stamp" ] && "$AGOQ_PYTHON" -c '' 2>/dev/null &&
        [ "$(_agoq_stamp "$venv")" = "$(cat "$venv/agoq-stamp")" ]; then
        return 0
    fi
    if [ -e "$venv" ] && [ ! -f "$venv/pyvenv.cfg" ] && [ -n "$(ls -A "$venv")" ]; then
        _agoq_say "error: $venv exists and is not a virtual environment." \
            "Move it away, or set AGOQ_VENV to another place."
        return 1
    fi
    if ! _agoq_fit "$AGOQ_PYTHON"; then
        base="$(agoq_find_python)" || return 1
        _agoq_say "Making $venv from $base ($("$base" -V 2>&1))"
        if [ -z "$torch" ] && [ -n "$(_agoq_torch_of "$base")" ]; then
            options=(--system-site-packages)
        fi
        _agoq_make_venv "$base" "$venv" "${options[@]}" || return 1
    fi
    if [ -z "$torch" ]; then
        torch="$(_agoq_torch_of "$AGOQ_PYTHON")"
    fi
    printf 'torch==%s\n' "${torch:-2.11.*}" >"$venv/agoq-torch.txt"
    _agoq_say "Installing AGoQ-Megatron and what it needs, with $(cat "$venv/agoq-torch.txt")" \
        "(PyTorch is large: minutes, the first time)"
    if ! "$AGOQ_PYTHON" -m pip install --disable-pip-version-check \
        --constraint "$venv/agoq-torch.txt" --editable "$AGOQ_ROOT[test]" >&2; then
        _agoq_say "error: the installation into $venv failed; pip's own words stand above." \
            "Run the same command again once that is resolved."
        return 1
    fi
    _agoq_stamp "$venv" >"$venv/agoq-stamp"
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then
    set -euo pipefail
    agoq_setup
    _agoq_say "Ready: $AGOQ_PYTHON"
fi
