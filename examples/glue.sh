#!/usr/bin/env bash
# Fine-tune a text encoder on every prepared task of GLUE, with several seeds, and make one table:
#   bash examples/glue.sh SOURCE [key=value ...] [--data DIR] [--tasks a,b] [--seeds 1,2,3] [--out DIR]
set -euo pipefail
source "$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/setup.sh"
exec emkum glue "$@"
