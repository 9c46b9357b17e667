#!/usr/bin/env bash
# Everything that only a GPU can show, in one command of under ten minutes and without a network.
#
#   benchmarks/gpu_check.sh OUT_DIR [STEP...]
#
# Steps, in this order; without names, all of them:
#   build           csrc with CUDA (if that fails, without), then what `llava_fast doctor` says of this machine
#   select          verdicts for NeXT-7B, inference and a training step (`llava-fast tune`); later steps use them
#   launches        kernels, graphs and copies launched for an image's prompt and for a token, and their times
#   answer          a 128-token answer of NeXT-7B beside transformers as it is
#   decode          decoding alone beside it
#   answer-compiled decode-compiled  the same beside transformers under torch.compile with a static cache
#   path            uint8 tiles to inputs_embeds of NeXT-7B on the Triton kernels, beside transformers as it is
#   path-compiled   the same beside transformers under torch.compile
#   measure         every op: its error against float64, its time beside PyTorch, a copy and its floor
#   tests           the kernels' tests on the GPU, one pytest process for each file
#   train-step      a packed training step of NeXT-7B's widths, 8 layers, beside transformers
#   path-graphs     the path on the Triton kernels, replayed from CUDA graphs
#   path-reference  the path on the ops' PyTorch references: unfused, cuBLAS
#   tune            launch configurations: OUT_DIR/<gpu>.json
#   measure-tuned   every op again, with those
#   sanitizer       csrc's tests under compute-sanitizer; some machines refuse it, which is said and is no failure
#
# The steps share BUDGET seconds (default 530). Each has a share of them and what the steps before it left over, so no
# step starves a later one. Work that is cut off keeps what it has. Two names stand for several steps, for 15 minutes of
# a GPU in two calls:
#   BUDGET=480 benchmarks/gpu_check.sh out first    # build select launches answer decode answer-compiled decode-compiled
#   BUDGET=290 benchmarks/gpu_check.sh out second   # build tests train-step sanitizer
#
# Everything comes together in OUT_DIR/gpu.json. A call adds to the one that it finds there, if the commit is the same,
# so a new OUT_DIR goes on with an earlier call's work, its verdicts too, if that call's gpu.json is put into it first.
# Logs are in logs-<time>.tar.gz. Outside a git checkout LLAVA_FAST_COMMIT says which commit this is. PYTHON is the interpreter
# (default python3).
#
# To keep a result:
#   cp OUT_DIR/gpu.json benchmarks/results/<date>-<gpu>-gpu.json; cp OUT_DIR/<gpu>.json llava_fast/ops/tuned/
#   python -m benchmarks.performance_page
# and once more for the path with the tuned tables: benchmarks/gpu_check.sh OUT_DIR build path path-compiled
#
# Needs a GPU of capability 8.0 or later, nvcc 12 or 13, and torch, triton, transformers, pybind11, ninja, setuptools
# and pytest. Exit status: 0 if every step passed, 1 if one failed, 2 for a wrong call or no GPU.

set -uo pipefail
usage() { sed -n '2,/^$/s/^#\( \|$\)//p' "$0"; }
declare -A share=([build]=70 [select]=150 [launches]=50 [answer]=60 [decode]=50 [answer-compiled]=60
  [decode-compiled]=60 [train-step]=70 [path]=45 [path-compiled]=100 [measure]=90 [tests]=90 [path-graphs]=30
  [path-reference]=30 [tune]=60 [measure-tuned]=35 [sanitizer]=40)
order=(build select launches answer decode answer-compiled decode-compiled path path-compiled measure tests train-step
  path-graphs path-reference tune measure-tuned sanitizer)
declare -A groups=([first]="build select launches answer decode answer-compiled decode-compiled"
  [second]="build tests train-step sanitizer")
case ${1:-} in
  -h | --help) usage && exit 0 ;;
  "" | -*) usage >&2 && exit 2 ;;
esac
out=$(realpath -m "$1")
shift
wanted=()
for name in "$@"; do
  if [[ -v groups[$name] ]]; then
    read -ra steps <<<"${groups[$name]}"
    wanted+=("${steps[@]}")
    continue
  fi
  wanted+=("$name")
  if [[ ! -v share[$name] ]]; then
    echo "no step is called '$name'; there are: ${order[*]}" >&2
    exit 2
  fi
done
cd "$(dirname "$0")/.." || exit 2
mkdir -p "$out"
python=${PYTHON:-python3}
export LLAVA_FAST_CACHE="$out/verdicts" # of this run alone
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
command -v nvcc >/dev/null || export PATH="$PATH:${CUDA_HOME:-/usr/local/cuda}/bin"
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader || { echo "no GPU here"; exit 2; }

# When each chosen step must have ended, in seconds from the start.
declare -A deadline=()
total=0 sum=0
chosen() { ((${#wanted[@]} == 0)) || [[ " ${wanted[*]} " == *" $1 "* ]]; }
for name in "${order[@]}"; do if chosen "$name"; then total=$((total + share[$name])); fi; done
for name in "${order[@]}"; do
  if chosen "$name"; then
    sum=$((sum + share[$name]))
    deadline[$name]=$((${BUDGET:-530} * sum / total))
  fi
done

failed=0
: >"$out/steps"
said() { # step, words: to the terminal and into gpu.json
  echo "== $1: $2"
  echo "$1: $2" >>"$out/steps"
}

step() { # step, command...: logs to OUT_DIR/step.log, says how it went, remembers a failure, goes on
  local name=$1 allowed=$((deadline[$1] - SECONDS)) start=$SECONDS status=0
  shift
  if ((allowed < 3)); then
    said "$name" "not run, no time left"
    failed=1
    return 1
  fi
  timeout -k 5 "$allowed" "$@" >>"$out/$name.log" 2>&1 || status=$?
  case $status in
    0) said "$name" "ok, $((SECONDS - start)) s" ;;
    124 | 137) said "$name" "cut off after $((SECONDS - start)) s" ;;
    *) said "$name" "failed with exit status $status, $((SECONDS - start)) s" ;;
  esac
  if ((status)); then
    failed=1
    tail -n 12 "$out/$name.log"
  fi
  return $status
}

encode() { # step, LLAVA_FAST_BACKEND, sides
  LLAVA_FAST_BACKEND=$2 step "$1" "$python" -m benchmarks.run encode --model llava-next-7b-encoder --image-size 672x672 \
    --dtype bfloat16 --device cuda --iters 50 --backend "$3" --output-json "$out/$1.json"
}

suite() { # step, suite, sides, more options: of the whole model, on the verdicts that `select` found
  local name=$1 kind=$2 sides=$3
  shift 3
  LLAVA_FAST_SELECT=cached step "$name" "$python" -m benchmarks.run "$kind" --model llava-next-7b \
    --image-size 672x672 --dtype bfloat16 --device cuda --backend "$sides" "$@" --output-json "$out/$name.json"
}

# One test file: JUnit to OUT_DIR/tests/<name>.xml, its exit status to OUT_DIR/tests/exits. Interrupted in time, pytest
# still writes what it has. (The function runs in a shell of its own, so a crash of pytest is no signal to xargs.)
test_file() { # file, OUT_DIR/tests, python, second of the epoch at which to stop
  local name status=0 left=$(($4 - $(date +%s)))
  name=$(basename "$1" .py)
  if ((left < 1)); then left=1; fi
  timeout -s INT -k 5 "$left" "$3" -m pytest -q -p no:cacheprovider --junitxml="$2/$name.xml" "$1" \
    >"$2/$name.log" 2>&1 || status=$?
  echo "$1 $status" >>"$2/exits"
  ((status == 0)) || { echo "$1: exit status $status: $(tail -n 1 "$2/$name.log")" && false; }
}
export -f test_file

rm -rf "$out/tests" "$out"/*.log "$out"/ops*.json "$out"/{path,answer,decode,train,launches}*.json # an earlier call's are in gpu.json
if [[ -f $out/gpu.json ]]; then timeout 60 "$python" -m benchmarks.gpu_check restore "$out" || failed=1; fi
for name in "${order[@]}"; do
  chosen "$name" || continue
  case $name in
    build)
      deadline[build-without-cuda]=$((deadline[build] + 20))
      LLAVA_FAST_CUDA=1 step build "$python" setup.py build_ext --inplace ||
        LLAVA_FAST_CUDA=0 step build-without-cuda "$python" setup.py build_ext --inplace
      timeout 30 "$python" -m llava_fast doctor 2>&1 | tee "$out/doctor.log"
      ;;
    select)
      LLAVA_FAST_SELECT=first-use step select "$python" -m benchmarks.gpu_check select \
        --budget $((deadline[select] - SECONDS > 60 ? deadline[select] - SECONDS - 40 : 20))
      ;;
    launches)
      LLAVA_FAST_SELECT=cached step launches "$python" -m benchmarks.gpu_check launches --output "$out/launches.json"
      ;;
    answer) suite answer generate llava_fast,hf-eager --new-tokens 128 --iters 5 ;;
    decode) suite decode decode llava_fast,hf-eager --new-tokens 64 --iters 5 ;;
    answer-compiled) suite answer-compiled generate llava_fast,hf-compile --new-tokens 128 --iters 5 ;;
    decode-compiled) suite decode-compiled decode llava_fast,hf-compile --new-tokens 64 --iters 5 ;;
    train-step) suite train-step train-step llava_fast,hf-eager --layers 8 --iters 5 ;;
    path) encode path triton llava_fast,hf-eager ;;
    path-compiled) encode path-compiled triton llava_fast,hf-compile ;;
    path-graphs) encode path-graphs triton llava_fast-graphs,hf-eager ;;
    path-reference) encode path-reference reference llava_fast,hf-eager ;;
    measure)
      step measure "$python" -m benchmarks.gpu_check measure --output "$out/ops.json"
      ;;
    tests)
      mkdir -p "$out/tests"
      : >"$out/tests/exits"
      stop=$(($(date +%s) + deadline[tests] - SECONDS - 10)) # before xargs itself is cut off
      # The largest files first: they take longest.
      # shellcheck disable=SC2012
      ls -S tests/ops/test_*.py tests/models/test_{encode_graphs,vision,assembled_inputs,gpu_decoding}.py >"$out/tests/files"
      step tests xargs -a "$out/tests/files" -P "$(nproc)" -I{} \
        bash -c 'test_file "$@"' test {} "$out/tests" "$python" "$stop"
      ;;
    tune) step tune "$python" -m benchmarks.tune --output-dir "$out" ;;
    measure-tuned)
      step measure-tuned "$python" -m benchmarks.gpu_check measure --output "$out/ops-tuned.json" --tables "$out"
      ;;
    sanitizer)
      context="import ctypes as c; d = c.CDLL('libcuda.so.1'); p = c.c_void_p()
assert d.cuInit(0) == 0 and d.cuDevicePrimaryCtxRetain(c.byref(p), 0) == 0"
      if ! command -v compute-sanitizer >/dev/null; then
        said sanitizer "not run, compute-sanitizer is not on PATH"
      elif ! timeout 20 compute-sanitizer "$python" -c "$context" >"$out/sanitizer.log" 2>&1; then
        said sanitizer "refused by this machine: $(grep -m 1 -iE 'error|fail|unable' "$out/sanitizer.log")"
      else
        # Each tensor in memory of its own, or an access beyond one would fall into PyTorch's cache unseen.
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 step sanitizer compute-sanitizer --report-api-errors no --error-exitcode 9 \
          "$python" -m pytest -q -x -p no:cacheprovider -k native tests/ops/test_image.py tests/ops/test_token_pack.py
      fi
      ;;
  esac
done

tail -n 100 "$out/measure.log" "$out/measure-tuned.log" 2>/dev/null
for log in "$out"/path*.log; do [[ -f $log ]] && tail -n 8 "$log"; done
timeout 30 "$python" -m benchmarks.gpu_check collect "$out" || failed=1
cat "$out/steps"
cd "$out" && logs=(./*.log) # into one archive: few files travel more easily
if [[ -d tests ]]; then logs+=(tests); fi
tar -czf "logs-$(date +%H%M%S).tar.gz" --remove-files "${logs[@]}"
echo "$SECONDS s"
exit $failed
