#!/usr/bin/env bash
# Everything that only a GPU can show, in one command of under ten minutes and without a network: builds csrc with CUDA,
# runs the kernels' tests on the GPU and csrc under compute-sanitizer, tunes, and times every op and the whole path.
#
#   benchmarks/gpu_check.sh OUT_DIR
#
# Needs a GPU of capability 8.0 or later, nvcc 12 or 13, and python3 with torch, triton, transformers, pybind11, ninja,
# setuptools and pytest (with pytest-xdist the tests compile their kernels side by side). Results: OUT_DIR/gpu.json, OUT_DIR/<gpu>.json (launch configurations), logs. To keep them:
#   cp OUT_DIR/gpu.json benchmarks/results/<date>-<gpu>-ops.json; cp OUT_DIR/<gpu>.json llava_fast/ops/tuned/
set -uo pipefail
out=$(realpath -m "${1:?usage: benchmarks/gpu_check.sh OUT_DIR}")
cd "$(dirname "$0")/.."
mkdir -p "$out"
python=${PYTHON:-python3}
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
command -v nvcc >/dev/null || export PATH="$PATH:${CUDA_HOME:-/usr/local/cuda}/bin"
budget=${BUDGET:-570} # seconds for everything
failed=0

step() { # name, seconds allowed, command...: logs to OUT_DIR/name.log, remembers a failure, goes on
  local name=$1 limit=$2 left=$((budget - SECONDS))
  shift 2
  if ((left < 10)); then
    echo "== $name: no time left, not run"
    failed=1
    return 1
  fi
  if ((limit > left)); then limit=$left; fi
  echo "== $name"
  local start=$SECONDS
  if timeout "$limit" "$@" >"$out/$name.log" 2>&1; then echo "   ok, $((SECONDS - start)) s"; else
    echo "   FAILED ($?), $((SECONDS - start)) s; the end of $out/$name.log:"
    tail -n 15 "$out/$name.log"
    failed=1
    return 1
  fi
}

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader || { echo "no GPU here"; exit 2; }
LLAVA_FAST_CUDA=1 step build 120 "$python" setup.py build_ext --inplace ||
  LLAVA_FAST_CUDA=0 step build-without-cuda 60 "$python" setup.py build_ext --inplace
step doctor 60 "$python" -m llava_fast doctor
workers=()
if "$python" -c "import xdist" 2>/dev/null; then workers=(-n "$(($(nproc) < 12 ? $(nproc) : 12))"); fi
step tests 180 "$python" -m pytest -q -p no:cacheprovider "${workers[@]}" --junitxml="$out/tests.xml" \
  tests/ops tests/models/test_encode_graphs.py tests/models/test_vision.py tests/models/test_assembled_inputs.py
step tune 180 "$python" -m benchmarks.tune --output-dir "$out"
step measure 120 "$python" -m benchmarks.gpu_check --output "$out/gpu.json" --tables "$out" --tests "$out/tests.xml"
path=("$python" -m benchmarks.run encode --model llava-next-7b-encoder --image-size 672x672 --dtype bfloat16 --device cuda)
LLAVA_FAST_BACKEND=triton step path-triton 100 "${path[@]}" --backend llava_fast,hf-eager,hf-compile --iters 50 \
  --output-json "$out/path-triton.json"
LLAVA_FAST_BACKEND=reference step path-reference 60 "${path[@]}" --backend llava_fast,hf-eager --iters 50 \
  --output-json "$out/path-reference.json"
if command -v compute-sanitizer >/dev/null; then # last: it is slow, and some machines refuse it
  step sanitizer 60 compute-sanitizer --report-api-errors no --error-exitcode 9 \
    "$python" -m pytest -q -p no:cacheprovider tests/ops/test_image.py
else
  echo "== sanitizer: compute-sanitizer is not on PATH, not run"
fi
tail -n 8 "$out"/path-*.log
tail -n 60 "$out/measure.log"
tar -C "$out" -czf "$out/logs.tar.gz" --remove-files $(cd "$out" && ls ./*.log) # few files travel more easily
exit $failed
