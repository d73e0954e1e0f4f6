#!/usr/bin/env bash
# Everything that wants a GPU, in under 9 minutes: the gpu tests, the kernel and the end-to-end benchmark, a short
# training. Each part has its own time limit; one that fails is recorded and the others go on. JSON goes to OUT.
#
#     bash bench/gpu_check.sh [OUT]        # default: bench/results/gpu
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
OUT=$(realpath -m "${1:-bench/results/gpu}")
export HF_HUB_OFFLINE=1
mkdir -p "$OUT"
"$PYTHON" -c "import torch; assert torch.cuda.is_available()" 2>/dev/null || {
    echo "error: torch sees no CUDA device; bench/gpu_check.sh needs one" >&2
    exit 2
}

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
        'log=$1/$(basename {} .py); timeout 160 "$2" -m pytest -m gpu -q {} --junitxml="$log.xml" >"$log.log" 2>&1' _ "$1" "$2"
}
export -f gpu_tests
mkdir -p "$OUT/tests"
part tests 170 bash -c 'gpu_tests "$@"' _ "$OUT/tests" "$PYTHON"
part kernels 130 "$PYTHON" bench/kernels.py --quick --out "$OUT/kernels.json"
part throughput 130 "$PYTHON" bench/throughput.py voc.yaml --batch-sizes 16 4 --windows 3 --steps 5 --out "$OUT/throughput.json"
part losses 30 "$PYTHON" bench/throughput.py voc.yaml --losses-only --batch-sizes 16 --windows 5 --out "$OUT/losses.json"
part training 70 "$PYTHON" -m cosa_fast.demo run.device=cuda run.name=gpu_check run.output="$OUT/runs"
cp "$OUT/runs/gpu_check/results.json" "$OUT/training.json" 2>/dev/null
"$PYTHON" bench/summarise.py "$OUT" "$OUT/summary.json"
