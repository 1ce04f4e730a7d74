#!/usr/bin/env bash
# One sitting at a machine with a GPU: ceilings, tests, a certificate, real cycles, a profile, the replay step,
# attention, operators. Under nine minutes, each part with its own deadline; OUT/session.json is whole after each. A
# recipe is trained afterwards.
#
#   benchmarks/gpu_session.sh [--rehearse] [OUT] [RECIPE]
#
# --rehearse: small shapes, and on a CPU too: what needs CUDA says so. PYTHON names an interpreter (3.11 or later) with
# torch >= 2.11 and triton >= 3.6. WHEELS names a folder of wheels for what it lacks (benchmarks/README.md); they are
# unpacked below OUT, nothing is installed and nothing is downloaded.
set -euo pipefail
cd "$(dirname "$0")/.."

rehearse=()
if [ "${1:-}" = --rehearse ]; then
  rehearse=(--rehearse)
  shift
fi
out=${1:-runs/gpu_session}
recipe=${2:-}
python=${PYTHON:-python3}
mkdir -p "$out"
out=$(cd "$out" && pwd)
export PYTHONPATH=$PWD:$PWD/launcher:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}
if [ -n "${WHEELS:-}" ]; then
  "$python" -m pip install --quiet --no-index --no-deps --upgrade --target "$out/site" "$WHEELS"/*.whl
  export PYTHONPATH=$PYTHONPATH:$out/site
fi

gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())' 2>/dev/null) || gpus=none
if [ "$gpus" = none ]; then
  echo "gpu_session: '$python' has no torch; name another interpreter in PYTHON" >&2
  exit 20
elif [ "$gpus" -eq 0 ] && [ ${#rehearse[@]} -eq 0 ]; then
  echo "gpu_session: the torch of '$python' sees no CUDA device; --rehearse runs it without" >&2
  exit 20
fi
# Every section imports the trainer: what that lacks would end each of them, one after the other.
if ! lacking=$("$python" -c 'import benchmarks.session.section, pytest, pytest_timeout' 2>&1); then
  echo "gpu_session: '$python' cannot load the sections: ${lacking##*$'\n'}; put its wheel into WHEELS" >&2
  exit 20
fi

failed=0
"$python" -m benchmarks.session "$out" "${rehearse[@]}" || failed=$?
"$python" benchmarks/session/draw.py "$out/session.json" || failed=$?
if [ -n "$recipe" ]; then
  ranks=$((gpus > 0 ? gpus : 2))
  "$python" -m mirai_launch train "$recipe" --nproc "$ranks" --run-dir "$out/run" --resume auto 2>&1 | tee "$out/train.log"
fi
exit "$failed"
