#!/usr/bin/env bash
# Everything that wants a GPU, in nine minutes, from a clone that is not installed: bench/gpu/check.py says what and how.
#
#     bash bench/gpu_check.sh [OUT] [--more] [--dry]        # OUT: bench/results/gpu; another Python: PYTHON=...
exec "${PYTHON:-python}" "$(dirname "$0")/gpu/check.py" "$@"
