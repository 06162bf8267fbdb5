#!/usr/bin/env bash
# What needs a GPU, most important first, in two calls that fit a short loan of a machine.
#
#   [OUT=DIR] [MINUTES=8] [PYTHON=python3] [WHEELS=DIR] benchmarks/gpu.sh [1 | 2 | STAGE ...]
#
# Call 1 (8 minutes): info cases right trainer attention ops step sanitize.
# Call 2 (4 minutes): again tune counters small.
# Each stage has a limit, in proportion to MINUTES. A stage that fails or reaches it does not stop
# the next one. Logs and results are in OUT at once: a stop loses nothing.
set -u
cd "$(dirname "$0")/.." || exit 2
out=${OUT:-runs/gpu}
python=${PYTHON:-python3}
mkdir -p "$out" || exit 2
out=$(cd "$out" && pwd)
export PYTHONPATH=.:kernels${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
# One cache for all processes: what one of them has compiled, the others find.
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$out/cache/triton}
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$out/cache/inductor}

# Extra packages from WHEELS, found before those of the machine. Wheels are zip archives.
if [ -n "${WHEELS:-}" ]; then
  for wheel in "$WHEELS"/*.whl; do
    "$python" -m zipfile -e "$wheel" "$out/packages" || exit 2
  done
  export PYTHONPATH=$PYTHONPATH:$out/packages
fi
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
  echo "gpu.sh needs a CUDA device and a torch that finds it; PYTHON=... names another Python" >&2
  exit 2
}
parallel=() # processes share one GPU: their kernels are small
"$python" -c 'import xdist' 2>/dev/null && parallel=(-n "${WORKERS:-6}")

case ${1:-1} in
  1) shift $(($# > 0)); total=480; set -- info cases right trainer attention ops step sanitize ;;
  2) total=240; set -- again tune counters small ;;
  *) total=480 ;;
esac
minutes=${MINUTES:-$((total / 60))}

limit() { # seconds of a stage that has SECONDS of the usual time
  awk -v m="$minutes" -v s="$1" -v t="$total" 'BEGIN { printf "%d", m * 60 * s / t }'
}

failed=()
stage() { # NAME SECONDS COMMAND...: run with a limit, and log
  local name=$1 seconds code begin=$SECONDS how
  seconds=$(limit "$2")
  shift 2
  echo "== $name (at most $seconds s)" | tee -a "$out/$name.log"
  timeout --signal=INT --kill-after=15 "$seconds" "$@" 2>&1 | tee -a "$out/$name.log"
  code=${PIPESTATUS[0]}
  case $code in
    0) how=passed ;;
    5) how="no test was selected" ;;
    124 | 137) how="limit reached" ;;
    *) how="exit code $code" ;;
  esac
  [ "$how" = passed ] || failed+=("$name ($how)")
  printf '%-10s %4d s of %4d s  %s\n' "$name" $((SECONDS - begin)) "$seconds" "$how" >> "$out/summary.log"
}

tests() { # NAME SECONDS PYTEST-ARGUMENT...
  local name=$1 seconds=$2
  shift 2
  stage "$name" "$seconds" "$python" -m pytest -q -m gpu -o cache_dir="$out/cache/pytest" \
    --junitxml="$out/$name.xml" "$@"
}

bench() { # NAME SECONDS KIND ARGUMENT...: fails unless each case has a time of ours
  local name=$1 seconds=$2 kind=$3
  shift 3
  stage "$name" "$seconds" "$python" - "$kind" "$out/$name.json" --device cuda --dtype "$dtype" \
    --minutes "$(awk -v s="$(limit "$seconds")" 'BEGIN { print 0.9 * s / 60 }')" "$@" <<'PYTHON'
import json, sys
from benchmarks.__main__ import main

kind, path, *words = sys.argv[1:]
code = main([kind, "--out", path, *words])
rows = json.load(open(path))["rows"]
ours = [row for row in rows if row["provider"] == "ours"]
missing = [row for row in ours if row["time"] is None]
for row in missing:
    print(f"not measured: ours, {row['case']}, {row['shape']}, {row['phase']}: {row['reason']}")
sys.exit(code or (1 if missing or not ours else 0))
PYTHON
}

dtype=$("$python" -c 'import torch; print("bf16" if torch.cuda.get_device_capability() >= (8, 0) else "fp16")')
run() {
  case $1 in
    info) stage info 10 bash -c 'nvidia-smi || echo "no nvidia-smi: clocks and driver are not known"
      "$0" -m mae_kernels && "$0" -m torch.utils.collect_env' "$python" ;;
    cases) # what the checker runs later, without it: fills the cache of kernels
      stage cases 20 "$python" tools/sanitize.py cases ;;
    right) # one sample of each op, of the sizes of ViT-B
      tests right 110 "${parallel[@]}" tests/kernels/test_gpu.py -k "beyond or \
        ((B/16 or (attention and (50 and 12 or 197 and 16 and 32)) or sssd_loss or crop_resize or \
        (rgb and 16 and not nhwc) or decoder \
        or 4096 or 196) and (accuracy or compiled or captured) and not fp16)" ;;
    trainer) tests trainer 40 "${parallel[@]}" tests/sssd_fast/test_step_gpu.py \
      -k "(captured and bf16 and true and 1) or (waits and bf16)" ;;
    attention) bench attention 30 attention --sample "50 x 12 x 64" "197 x 16 x 32" --provider \
      ours "sdpa auto" "sdpa flash" "sdpa cudnn" "sdpa efficient" ;;
    ops) bench ops 60 ops --samples 30 --provider ours "plain compiled" --sample "encoder B/16" B/16 \
      "rgb 16" "decoder 512" rgb "patch rgb 16 nchw uint8 ids" "decoder rgb" 4096 "196 patches" ;;
    step) bench step 125 step --model ViT-B-224 --task SSSD --provider ours published \
      "published, compiled" "plain, compiled" ;;
    sanitize) stage sanitize 80 "$python" tools/sanitize.py --tool memcheck racecheck \
      --seconds "$(limit 75)" ;;
    again) # what failed before; nothing if nothing failed
      if [ -s "$out/cache/pytest/v/cache/lastfailed" ]; then
        tests again 60 --last-failed tests/kernels/test_gpu.py tests/sssd_fast/test_step_gpu.py
      fi ;;
    tune) stage tune 90 "$python" tools/tune.py --out "$out" --op attention sssd_loss gelu_linear \
      crop_resize masked_reconstruction_loss --minutes "$(awk -v s="$(limit 80)" 'BEGIN { print s / 60 }')" ;;
    counters) stage counters 45 ncu --clock-control none --set full --kernel-name-base function \
      --kernel-name 'regex:_(losses|attention|backward_keys)_kernel' --force-overwrite \
      --export "$out/counters" "$python" - <<'PYTHON'
import torch
import mae_kernels as mk

for sample in mk.samples():  # one launch of each kernel, at 256 images
    if str(sample) in ("attention 197 x 16 x 32", "sssd_loss rgb") and sample.size == "model":
        tensors, options = sample.make(mk.Draw("cuda", torch.bfloat16, 256))
        leaves = [tensors[name].requires_grad_() for name in sample.gradients]
        out = sample.function(**tensors, **options)
        first = out if isinstance(out, torch.Tensor) else out[0]
        torch.autograd.grad(first, leaves, torch.ones_like(first))
PYTHON
      ;;
    small) bench small 40 step --model ViT-B-224 --task SSSD --batch 64 --provider ours ;;
    *) echo "unknown stage '$1'; see the head of benchmarks/gpu.sh" >&2; exit 2 ;;
  esac
}

for name; do run "$name"; done
cat "$out/summary.log"
printf 'not passed: %s\n' "${failed[*]:-none}" | tee -a "$out/summary.log"
[ ${#failed[@]} = 0 ]
