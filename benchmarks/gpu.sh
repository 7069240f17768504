#!/usr/bin/env bash
# Everything that needs a GPU, on a machine as it is found: builds, tests, measures. About twelve
# minutes on an H100. Writes JSON and logs to the folder given (default: gpu-results).
#
#     bash benchmarks/gpu.sh [FOLDER]
#
# Nothing is fetched: torch, triton, scikit-build-core, pybind11 and pytest have to be there. STEPS
# chooses among the steps; without "install" the sources are used as they lie, without C++ kernels.
# Only if it names them are these run: "order", models whose channels were chosen one by one, then put
# in order; "tiles", every tile of the CUDA C++ kernel for Hopper and cuBLAS, of which tune_sm90 makes the table;
# "profile", what Nsight Compute says of some layers.
set -euo pipefail
cd "$(dirname "$0")/.."
results=$(mkdir -p "${1:-gpu-results}" && cd "${1:-gpu-results}" && pwd)
export DISCO_KERNELS_REQUIRE_GPU=1 PYTHONUNBUFFERED=1 PIP_DISABLE_PIP_VERSION_CHECK=1

failed=()
say() { printf '\n=== %s\n' "$*"; }

wanted() { [[ " ${STEPS:-install tests ranks sanitizer models shard gather-pack tf32 max-autotune} " == *" $1 "* ]]; }

export PYTHONPATH="$PWD/python:$PWD"
if wanted install; then
  say "install"
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  install=(python3 -m pip install --quiet --no-build-isolation --no-deps --target "$site" .)
  if command -v nvcc >/dev/null; then
    DISCO_KERNELS_FORCE_CUDA=1 "${install[@]}" ||
      { echo "the CUDA kernels do not build here: CuPy compiles them"; DISCO_KERNELS_SKIP_CUDA=1 "${install[@]}"; }
  else
    "${install[@]}"
  fi
  # The tests and benchmarks lie in this folder, and so do the sources, which must not be found.
  cp -r tests benchmarks "$site"
  export PYTHONPATH="$site"
  cd "$site"
fi
python3 -m disco_kernels

if wanted tests; then
  say "tests"
  # Kernels are compiled as they are met: side by side where pytest-xdist is there.
  parallel=$(python3 -c 'import xdist' 2>/dev/null && echo "-n 12" || true)
  # Both ways to the CUDA kernels, where the extension has some.
  launchers="not builtin"
  python3 -c 'import disco_kernels._C as c; c.cuda_launch' 2>/dev/null && launchers=""
  # shellcheck disable=SC2086
  timeout -k 10 180 python3 -m pytest tests/triton/test_kernels.py tests/cuda/test_gpu.py tests/cuda/test_conv2d_sm90.py tests/cuda/test_cublas.py \
    -m "not slow" -q -p no:cacheprovider -k "$launchers" $parallel 2>&1 | tee "$results/tests.log" | tail -n 5 ||
    { echo "tests: failed, see $results/tests.log"; failed+=(tests); }
fi

if wanted ranks; then
  say "ranks"
  timeout -k 10 300 python3 -m pytest tests/gpu -q -p no:cacheprovider 2>&1 | tee "$results/ranks.log" | tail -n 5 ||
    { echo "ranks: failed, see $results/ranks.log"; failed+=(ranks); }
fi

if wanted sanitizer && command -v compute-sanitizer >/dev/null; then
  say "compute-sanitizer"
  timeout -k 10 180 compute-sanitizer --tool memcheck --error-exitcode 1 \
    python3 -m pytest tests/triton/test_kernels.py tests/cuda/test_gpu.py -q \
    -k "groups_of_16_bytes or few_channels or messages_beside or (misaligned and not cupy)" >"$results/sanitizer.log" 2>&1 &&
    tail -n 2 "$results/sanitizer.log" ||
    { echo "compute-sanitizer found something or does not work here:"; tail -n 5 "$results/sanitizer.log"; failed+=(sanitizer); }
fi

run() { # name, time limit, module, arguments
  say "$1"
  local name=$1 limit=$2 module=$3
  shift 3
  timeout -k 10 "$limit" python3 -m "benchmarks.$module" "$@" --json "$results/$name.json" 2>&1 |
    tee "$results/$name.log" | grep --line-buffered -E "times the speed|useful|GB/s|best|WRONG|Error" ||
    { echo "$name: no result"; failed+=("$name"); }
}

deit=(--source timm --model deit_small_patch16_224)
if wanted models; then
  run resnet50-bf16 90 bench_gpu_model --batches 1,32,128
  run deit-small-bf16 60 bench_gpu_model "${deit[@]}" --batches 1,32,128
fi
if wanted order; then
  run resnet50-order-bf16 120 bench_gpu_model --group-size 1 --order --batches 32,128
  run deit-small-order-bf16 90 bench_gpu_model "${deit[@]}" --group-size 1 --order --batches 32,128
fi
if wanted tiles; then
  run sm90-tiles 240 bench_triton_tiles --sm90-alone --linears --batches 128,32,1
  python3 -m benchmarks.tune_sm90 "$results/sm90-tiles.json" "$results/tuned.py" ||
    { echo "tuned.py: not made"; failed+=(tuned); }
fi
if wanted profile && command -v ncu >/dev/null; then
  say "profile"
  timeout -k 10 240 ncu --profile-from-start off --clock-control none --print-details all \
    --section SpeedOfLight --section WarpStateStats --section MemoryWorkloadAnalysis \
    --section ComputeWorkloadAnalysis --section LaunchStats --section Occupancy \
    python3 -m benchmarks.profile_layers >"$results/profile.log" 2>&1 ||
    { echo "profile: failed"; failed+=(profile); }
  grep -E "^[0-9]+ |Duration|Tensor|error" "$results/profile.log" | tail -n 80 || true
fi
if wanted shard; then
  run resnet50-shard-bf16 120 bench_gpu_shard
  run deit-small-shard-bf16 120 bench_gpu_shard "${deit[@]}"
fi
if wanted gather-pack; then run gather-pack 120 bench_gpu_gather_pack; fi
if wanted tf32; then
  run resnet50-tf32 90 bench_gpu_model --dtype float32 --tf32 --batches 32,128
fi
if wanted max-autotune; then
  # Searching among convolutions that are not cuDNN's takes minutes, and Triton's templates took twice
  # cuDNN's time wherever they were tried.
  export TORCHINDUCTOR_MAX_AUTOTUNE_CONV_BACKENDS=ATEN TORCHINDUCTOR_MAX_AUTOTUNE_GEMM_BACKENDS=ATEN
  run resnet50-bf16-max-autotune 150 bench_gpu_model --batches 128 --max-autotune
  run resnet50-shard-bf16-max-autotune 150 bench_gpu_shard --batches 128 --max-autotune
fi

# What did not do is named again, and later steps ran all the same: a GPU may be lent for minutes.
if ((${#failed[@]})); then
  say "failed: ${failed[*]}"
  exit 1
fi
