#!/usr/bin/env bash
# Everything that wants a GPU, in under 9 minutes: the gpu tests, the kernels, whole steps against the usual method (with
# the matrix rate and peak memory), the speed ablation with AN's kinds of attention, a short training; with DALI also the
# data pipelines. Each part has its own time limit; one that fails is recorded and the others go on. JSON goes to OUT.
#
#     bash bench/gpu_check.sh [OUT]        # default: bench/results/gpu
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
OUT=$(realpath -m "${1:-bench/results/gpu}")
export HF_HUB_OFFLINE=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
mkdir -p "$OUT"
absent() { # absent MODULE...: those that PYTHON cannot import
    "$PYTHON" -c 'import sys; from importlib.util import find_spec
print(*(name for name in sys.argv[1:] if find_spec(name) is None))' "$@"
}
refuse() {
    echo "error: $1; bench/gpu_check.sh needs $2" >&2
    exit 2
}
missing=$(absent torch triton numpy timm 2>/dev/null) || refuse "$PYTHON does not run" "a Python, PYTHON=..."
[ -z "$missing" ] || refuse "$PYTHON has no $missing" "them"
"$PYTHON" -c "import torch; assert torch.cuda.is_available()" 2>/dev/null || refuse "torch sees no CUDA device" "one"
# pytest and hypothesis: the tests; sklearn: the usual method; tensorboard: the training; matplotlib: charts.
missing=$(absent pytest hypothesis sklearn tensorboard matplotlib)
echo "not installed: ${missing:-nothing that a part needs}"

part() { # part NAME SECONDS COMMAND...: run under a limit, remember status and duration
    local name=$1 limit=$2 start=$SECONDS
    shift 2
    timeout --kill-after=10 "$limit" "$@" >"$OUT/$name.log" 2>&1
    local status=$?
    printf '{"part": "%s", "status": %d, "seconds": %d, "limit": %d}\n' "$name" "$status" $((SECONDS - start)) "$limit" \
        | tee -a "$OUT/parts.jsonl"
    [ "$status" -eq 0 ] || tail -n 15 "$OUT/$name.log"
}

: >"$OUT/parts.jsonl"
rm -rf "$OUT/tests"
# A process per file: most of the time goes into compiling kernels, on cores that would otherwise idle.
gpu_tests() {
    local files
    mapfile -t files < <(find tests -name 'test_*.py' -print0 | xargs -0 grep -lE 'mark\.gpu|kernel_device' | sort)
    printf '%s\n' "${files[@]}" | xargs -P 8 -I{} bash -c \
        'name={}; name=${name#tests/}; name=${name%.py}; log=$1/${name//\//.}
        timeout 140 "$2" -m pytest -m gpu -q {} --junitxml="$log.xml" >"$log.log" 2>&1' _ "$1" "$2"
}
export -f gpu_tests
mkdir -p "$OUT/tests"
steps() { # steps NAME LIMIT ARGUMENTS...: a part of bench/throughput.py
    local name=$1 limit=$2
    shift 2
    part "$name" "$limit" "$PYTHON" bench/throughput.py voc.yaml --windows 3 --out "$OUT/$name.json" "$@"
}
part tests 150 bash -c 'gpu_tests "$@"' _ "$OUT/tests" "$PYTHON"
part kernels 130 "$PYTHON" bench/kernels.py --quick --out "$OUT/kernels.json"
steps throughput 70 --batch-sizes 16 4 --steps 4 --providers main --budget 45
steps ablations 75 --batch-sizes 16 --steps 4 --providers ablations --budget 50
steps losses 30 --losses-only --batch-sizes 16 --budget 20
part training 50 "$PYTHON" -m cosa_fast.demo run.device=cuda run.name=gpu_check run.output="$OUT/runs"
cp "$OUT/runs/gpu_check/results.json" "$OUT/training.json" 2>/dev/null
if [ -z "$(absent nvidia.dali 2>&1)" ]; then
    part data 30 "$PYTHON" bench/data.py demo.yaml --windows 2 --batches 10 --workers 4 --out "$OUT/data.json"
fi
"$PYTHON" -m bench.runs.summarise "$OUT" "$OUT/summary.json"
