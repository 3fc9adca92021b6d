#!/usr/bin/env bash
# Train rows of the study with several seeds, and report which effects of the thesis come out:
#   bash examples/reproduce.sh [key=value ...] [--data scenes|flickr8k|DIR] [--rows 3,5,6,17,23] [--seeds 3]
#       [--budget-minutes N] [--out DIR]
# The same command goes on where it was stopped; docs/reproduction.md has all of it.
set -euo pipefail
source "$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/setup.sh"
exec emkum reproduce "$@"
