#!/usr/bin/env bash
# Trains small models independently, aligns and merges them, and writes a report. Takes the options of
# `hf-rebasin demo`.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
exec "$VENV/bin/hf-rebasin" demo "$@"
