#!/usr/bin/env bash
# bench/gpu.sh OUT [--dry] [--compile] [--only STAGE,STAGE]
# Runs all checks and benchmarks of linfast that need a GPU, in one call of 9.5 minutes: docs/gpu.md.
#
#   --dry      the same stages at tiny sizes on the CPU, the kernels in Triton's interpreter
#   --compile  for a second call, under 3 minutes: only the flows under torch.compile
#   --only     runs only these of the stages smoke, tests, memcheck, bench, profile, table
#
# PYTHON names the interpreter (default: python3). Pure-Python peers are found in build/peers. Nothing is
# downloaded or installed, and no setting of the card is changed. If it is killed, OUT/summary.txt remains.
set -euo pipefail
[ $# -ge 1 ] && [[ $1 != -* ]] || { sed -n 2p "$0" | cut -c3-; exit 2; }
out=$(realpath -m "$1")
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD:$PWD/build/peers${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" -m bench.gpu "$out" "${@:2}"
