#!/usr/bin/env bash
# Makes .venv with the test extras, then runs ruff and pytest. Arguments go to pytest: scripts/test.sh -m slow -k resume
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/_venv.sh
make_venv test
install_deepspeed
install_triton
.venv/bin/ruff check .
.venv/bin/ruff format --check .
# One worker per core, each test file in one of them (files share launched runs); tiny models gain nothing from threads.
export OMP_NUM_THREADS=1
exec .venv/bin/python -m pytest -n auto --maxprocesses 4 --dist loadfile "$@"
