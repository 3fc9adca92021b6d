#!/usr/bin/env bash
# Train from a recipe: bash examples/train.sh RECIPE.yaml [key=value ...]
set -euo pipefail
source "$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/setup.sh"
exec emkum train "$@"
