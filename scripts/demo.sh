#!/usr/bin/env bash
# Trains small models apart, aligns and merges them, reports. Options are those of `hf-rebasin demo`.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
exec "$VENV/bin/hf-rebasin" demo "$@"
