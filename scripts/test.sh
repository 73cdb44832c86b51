#!/usr/bin/env bash
# Runs all checks of the project: lint, format, types, tests; with --slow, only the tests that take minutes. Other
# options are passed to pytest.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
if [ "${1:-}" = --slow ]; then
    shift
    exec "$VENV/bin/python" -m pytest -n 2 --slow -m slow "$@"
fi
"$VENV/bin/ruff" check .
"$VENV/bin/ruff" format --check .
"$VENV/bin/mypy"
exec "$VENV/bin/python" -m pytest -n 2 "$@"
