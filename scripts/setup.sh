#!/usr/bin/env bash
# Creates .venv in the checkout, anew whenever pyproject.toml or the constraints change. Sourced by the other scripts;
# afterwards, $VENV/bin has everything.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
VENV="$PWD/.venv"
PYTHON="${PYTHON:-python3}"
state="$(cat pyproject.toml scripts/constraints.txt | cksum)"
if [ ! -x "$VENV/bin/hf-rebasin" ] || [ "$(cat "$VENV/.state" 2>/dev/null)" != "$state" ]; then
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
        echo "hf_rebasin needs Python 3.10 or newer; $PYTHON is $("$PYTHON" -V 2>&1). Set PYTHON=..." >&2
        exit 1
    }
    echo "installing into .venv (once) ..." >&2
    "$PYTHON" -m venv "$VENV"
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -c scripts/constraints.txt torch
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -c scripts/constraints.txt -e ".[dev]"
    echo "$state" > "$VENV/.state"
fi
