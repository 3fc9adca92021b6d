#!/usr/bin/env bash
# The whole way once, on rendered scenes: data, a self-supervised image teacher, a student without and with
# distillation, one table and two pictures.
#
#   bash examples/quickstart.sh [FOLDER]      results go to FOLDER (runs/quickstart); a second start goes on there
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
out="${1:-$root/runs/quickstart}"
source "$root/examples/setup.sh"
mkdir -p "$out"
start=$SECONDS

step() { echo; echo "== $* ($((SECONDS - start)) s)"; }

step "1/5 scenes: rendered images with captions"
emkum prepare scenes --out "$out/scenes" --num-images 5000 --seed 1

step "2/5 teacher: Data2Vec 2 on the images alone, no captions, no labels"
emkum train "$root/examples/scenes_teacher.yaml" data="$out/scenes" save_dir="$out/teacher"

step "3/5 student: image-text contrast alone"
emkum train "$root/examples/scenes_itc.yaml" data="$out/scenes" save_dir="$out/itc"

step "4/5 student: image-text contrast and distillation from the teacher"
emkum train "$root/examples/scenes.yaml" data="$out/scenes" save_dir="$out/itc_kd" \
    teacher="data2vec2:$out/teacher/checkpoint_last.pt"

step "5/5 retrieval on the held-out test scenes"
emkum report "ITC alone=$out/itc" "ITC + KD=$out/itc_kd" --data "$out/scenes" --split test --out "$out/report"
echo
echo "quickstart: done in $((SECONDS - start)) s, set-up excluded; results in $out/report"
