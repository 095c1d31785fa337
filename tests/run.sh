#!/usr/bin/env bash
# Runs all tests in .venv (made on the first run), eight minutes on two cores. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
. examples/setup_venv.sh
exec .venv/bin/python -m pytest -m "slow or not slow" "$@"
