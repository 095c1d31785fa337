#!/usr/bin/env bash
# Runs the tests in .venv (made on the first run). Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
. examples/setup_venv.sh
exec .venv/bin/python -m pytest "$@"
