#!/usr/bin/env bash
# Sets up .venv where needed, then checks style and runs the tests. Arguments go to pytest, for example:
#   bash tests/run.sh tests/evaluation -k recall
# EMKUM_TEST_WORKERS sets the number of test processes (2 where unset).
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"
source examples/setup.sh

# One thread a process: the worker processes and the gloo processes that tests start would fight over the cores.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

sources=(setup.py tests)
for folder in emkum user_dir examples; do
    if [ -d "$folder" ]; then sources+=("$folder"); fi
done
echo "tests: ruff check ${sources[*]}"
ruff check "${sources[@]}"
echo "tests: pytest"
python -m pytest -n "${EMKUM_TEST_WORKERS:-2}" "$@"
