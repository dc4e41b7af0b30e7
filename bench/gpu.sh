#!/usr/bin/env bash
# On a machine with a GPU: builds, tests, checks with compute-sanitizer and measures the CUDA kernels, without the
# network and in under nine minutes (the limits below add up to less). Short tables come last; everything else is in
# the output folder.
#
#   bench/gpu.sh [--dry-run] [output folder, default gpu-results]
#
# PYTHON (python3) must have torch with CUDA, numpy, pytest, scikit-build-core, nanobind, cmake and ninja. Peers are
# measured where they are installed: flashinfer-python, fusedtok. --dry-run prints the commands and runs none.
set -euo pipefail
cd "$(dirname "$0")/.."

dry_run=false
out=gpu-results
for argument in "$@"; do
  case $argument in
    --dry-run) dry_run=true ;;
    -*) echo "usage: bench/gpu.sh [--dry-run] [output folder]" >&2 && exit 2 ;;
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
run build 170 "${build[@]}"
export PYTHONPATH="$PWD/$site${PYTHONPATH:+:$PYTHONPATH}"
run info 10 "$python" -m tokenstep.cli.main info

# ---- tests on the device --------------------------------------------------------------------------------------------
# The package of this build, not the one beside the sources: tests find it on PYTHONPATH. Longer ones, 100,000 rows of the
# sampler among them, are for a call of their own: pytest -m "cuda and slow" tests/cuda tests/simt.
tests=("$python" -m pytest -q -p no:cacheprovider -m "cuda and not slow")
run tests 75 "${tests[@]}" tests/cuda tests/simt/test_sample*.py
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

# ---- measure --------------------------------------------------------------------------------------------------------
# bench NAME SECONDS ARGUMENTS...: the results go to NAME.json.
measured=()
bench() {
  local name=$1 seconds=$2
  shift 2
  measured+=("$name")
  run "bench-$name" "$seconds" "$python" -m tokenstep.cli.main bench "$@" --device cuda --json "$out/$name.json"
}
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

if $dry_run; then exit 0; fi
for name in "${measured[@]}"; do
  if [[ -s $out/bench-$name.log ]]; then grep -E '^\||^Medians|^Timed|^Refused' "$out/bench-$name.log" || true; fi
done
if ((${#failed[@]})); then
  echo "failed: ${failed[*]}"
  exit 1
fi
echo "all steps passed"
