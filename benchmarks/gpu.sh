#!/usr/bin/env bash
# Everything that needs a GPU: machine, tests, compute-sanitizer, benchmarks, tuning.
#
#   [OUT=DIR] [MINUTES=9] [PYTHON=python3] benchmarks/gpu.sh [STAGE ...]      (or: make gpu)
#
# Stages: info tests sanitize bench tune; default: all. A stage that fails or reaches its share of
# MINUTES does not stop the next one. Logs and results are in OUT at once: a stop loses nothing.
set -u
cd "$(dirname "$0")/.." || exit 2
out=${OUT:-runs/gpu}
minutes=${MINUTES:-9}
python=${PYTHON:-python3}
export PYTHONPATH=.:kernels${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
mkdir -p "$out" || exit 2
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
  echo "gpu.sh needs a CUDA device and a torch that finds it; PYTHON=... names another Python" >&2
  exit 2
}
parallel=()
"$python" -c 'import xdist' 2>/dev/null && parallel=(-n "${WORKERS:-6}" --dist loadfile)

share() { # seconds that are PERCENT of the time
  awk -v minutes="$minutes" -v percent="$1" 'BEGIN { printf "%d", minutes * 60 * percent / 100 }'
}

failed=()
stage() { # NAME PERCENT COMMAND...: run with a limit, and log
  local name=$1 seconds code
  seconds=$(share "$2")
  shift 2
  echo "== $name (at most $seconds s)" | tee "$out/$name.log"
  timeout --signal=INT --kill-after=15 "$seconds" "$@" 2>&1 | tee -a "$out/$name.log"
  code=${PIPESTATUS[0]}
  case $code in
    0) ;;
    124 | 137) failed+=("$name (limit reached)") ;;
    *) failed+=("$name (exit code $code)") ;;
  esac
}

run() {
  case $1 in
    info) stage info 10 bash -c \
      'nvidia-smi; "$0" -m mae_kernels; "$0" -m torch.utils.collect_env' "$python" ;;
    tests) stage tests 38 "$python" -m pytest -q -p no:cacheprovider "${parallel[@]}" -m gpu \
      --junitxml="$out/tests.xml" tests ;;
    sanitize) stage sanitize 14 "$python" tools/sanitize.py --seconds "$(share 13)" ;;
    bench) stage bench 30 "$python" -m benchmarks all --device cuda --out "$out" \
      --minutes "$(awk -v s="$(share 28)" 'BEGIN { print s / 60 }')" ;;
    tune) stage tune 8 "$python" tools/tune.py --out "$out" \
      --minutes "$(awk -v s="$(share 7)" 'BEGIN { print s / 60 }')" ;;
    *) echo "unknown stage '$1'; stages are info tests sanitize bench tune" >&2; exit 2 ;;
  esac
}

[ $# -gt 0 ] || set -- info tests sanitize bench tune
for name; do run "$name"; done
printf 'not passed: %s\n' "${failed[@]:-none}" | tee "$out/summary.log"
[ ${#failed[@]} = 0 ]
