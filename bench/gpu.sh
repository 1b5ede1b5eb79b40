#!/usr/bin/env bash
# bench/gpu.sh OUT_DIR [--dry]
# Everything a GPU machine should say about linfast, in one call under 9 minutes, a short table last.
#
#   environment.txt  device, clocks before and after, versions
#   tests.log        the kernels' tests (tests/ops) on the GPU, against float64
#   sanitizer.log    compute-sanitizer memcheck and racecheck on one small run of every op
#   bench.log        every provider against float64 at the benchmarks' sizes, which fills the compile
#                    caches; then the benchmarks, one process a case
#   results.jsonl    their results
#   trace.json.gz, kernels.txt a profile
#   summary.txt      what happened, and the short table
#
# First, together: tests, sanitizers, checks. Then, alone: benchmarks, profile. Every step has its
# own time limit and writes as it goes, so a hang costs that step. Nothing is downloaded, and no
# setting of the card is touched. Without a GPU, or with --dry, it runs the same steps at tiny sizes
# on the CPU. PYTHON names the interpreter (default: python3).
set -uo pipefail

[ $# -ge 1 ] || { sed -n 2p "$0" | cut -c3-; exit 2; }
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
SECONDS=0
TOTAL=525 # seconds for everything before the summary
OPS=(affine_coupling channel_mix coupling_mix coupling_stack low_rank latent_matmul depthwise_conv group_norm_silu conv2d_fused)

export PYTHONUNBUFFERED=1 TORCHINDUCTOR_COMPILE_THREADS=4
device=cpu
if [ "${2:-}" != --dry ] && "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    device=cuda
fi

# step NAME LIMIT LOG COMMAND...: its output to LOG, how it ended and its seconds to summary.txt.
step() {
    local name=$1 limit=$2 log=$out/$3 start=$SECONDS left=$((TOTAL - SECONDS)) rc=0
    shift 3
    [ "$limit" -le "$left" ] || limit=$left
    if [ "$limit" -le 0 ]; then
        echo "$name: no time left" >>"$out/summary.txt"
        return
    fi
    printf '\n== %s\n' "$name" >>"$log"
    timeout --kill-after=5 "$limit" "$@" >>"$log" 2>&1 || rc=$?
    case $rc in
        0) echo "$name: ok, $((SECONDS - start)) s" ;;
        124 | 137) echo "$name: stopped at its limit of $limit s" ;;
        *) echo "$name: FAILED with status $rc, $((SECONDS - start)) s ($(basename "$log"))" ;;
    esac >>"$out/summary.txt"
}

describe() {
    "$python" -m pip --version
    "$python" -c 'import linfast.bench.environment as e, torch, sys; print(dict(e.describe(torch.device(sys.argv[1]))))' "$device"
    if command -v nvidia-smi >/dev/null; then nvidia-smi -q -d CLOCK,TEMPERATURE,PERFORMANCE; fi
}

install() { # linfast from this checkout, unless it already is
    (cd "$work" && "$python" -c 'import linfast.bench') 2>/dev/null && return
    "$python" -m pip install -q --no-deps --no-build-isolation -e . && return
    echo 'pip failed: linking kernels/ and bench/ into linfast/'
    ln -sfn ../kernels linfast/kernels && ln -sfn ../bench linfast/bench
}

tests() {
    local options=(-x) # a dry run: that the step works
    [ "$device" = cpu ] || options=(--maxfail=25 $("$python" -c 'import xdist; print("-n 6")' 2>/dev/null))
    local paths=(tests/ops)
    [ "$device" = cuda ] || paths=(tests/ops/test_low_rank_kernel.py -k "half_precision or opcheck")
    "$python" -m pytest -p no:cacheprovider --tb=short "${options[@]}" "${paths[@]}" -rfE
}

sanitize() { # without torch's caching allocator, which would hide reads past a tensor's end
    command -v compute-sanitizer >/dev/null || { echo 'compute-sanitizer is not on this machine'; return; }
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --error-exitcode 9 \
        "$python" -m linfast.bench --device "$device" --sizes tiny --check --no-compile "${OPS[@]/#/--case=}"
}

bench() { # CASE ARGUMENT...
    local name=$1
    shift
    "$python" -m linfast.bench --device "$device" "${sizes[@]}" --case "$name" "$@"
}

profile() {
    "$python" -m linfast.bench --device "$device" "${sizes[@]}" --profile "$work/profile" \
        --case affine_coupling --case group_norm_silu --case coupling_flow
    cp "$work/profile/kernels.txt" "$out/"
    cp "$work/profile/coupling_flow.trace.json.gz" "$out/trace.json.gz"
}

: >"$out/summary.txt"
for log in environment.txt tests.log sanitizer.log bench.log results.jsonl; do : >"$out/$log"; done
sizes=(--sizes gpu)
[ "$device" = cuda ] || sizes=(--sizes tiny --no-compile --budget 0.02)
export -f describe install tests sanitize bench profile
export device python work out
in_shell() { # a function of this file, under timeout
    printf '%s\n' bash -c "sizes=(${sizes[*]}); OPS=(${OPS[*]}); $1" "$0" "${@:2}"
}
run() { # NAME LIMIT LOG FUNCTION ARGUMENT...
    local name=$1 limit=$2 log=$3 function=$4
    shift 4
    mapfile -t command < <(in_shell "$function \"\$@\"" "$@")
    step "$name" "$limit" "$log" "${command[@]}"
}

run install 60 environment.txt install
run environment 30 environment.txt describe
cases=$("$python" -c 'from linfast.bench.cases import CASES; print(*CASES)')

run tests 230 tests.log tests &
run memcheck 230 sanitizer.log sanitize memcheck &
run racecheck 230 sanitizer.log sanitize racecheck &
if [ "$device" = cuda ]; then
    for name in $cases; do run "check $name" 230 bench.log bench "$name" --check & done
fi
wait

for name in $cases; do
    run "bench $name" 75 bench.log bench "$name" --json "$work/$name.jsonl"
    cat "$work/$name.jsonl" >>"$out/results.jsonl" 2>/dev/null
done
run profile 60 bench.log profile
run environment 30 environment.txt describe

{
    echo "device $device, $SECONDS s"
    "$python" -m linfast.bench.summary "$out"
} >>"$out/summary.txt" 2>&1
cat "$out/summary.txt"
