#!/usr/bin/env bash
# Runs all tests in .venv (made on the first run), two files at once with a thread each. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
. examples/setup_venv.sh
export OMP_NUM_THREADS=1
exec .venv/bin/python -m pytest -m "slow or not slow" --numprocesses 2 --dist loadfile "$@"
