#!/usr/bin/env bash
# One sitting at a machine with GPUs: device, GPU tests, a training run on all GPUs.
#
#   benchmarks/gpu_session.sh [OUT] [RECIPE]     PYTHON=... names an interpreter that has torch and the base packages
#
# It exercises, it does not benchmark yet: the tiny recipe is far too small to say anything about GPU speed. Kernel
# comparisons and the cycle benchmark join it when they exist. It downloads and installs nothing.
set -euo pipefail
cd "$(dirname "$0")/.."

out=${1:-runs/gpu_session}
recipe=${2:-recipes/tiny/video_mirai.yaml}
python=${PYTHON:-python3}
export PYTHONPATH=$PWD:$PWD/launcher:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}
mkdir -p "$out"

gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())' 2>/dev/null) || gpus=0
if [ "$gpus" -eq 0 ]; then
  echo "gpu_session: '$python' has no torch, or its torch sees no CUDA device" >&2
  exit 20
fi

echo "== device"
{
  date -u +%FT%TZ
  git describe --always --dirty 2>/dev/null || echo "commit unknown: not a git checkout"
  nvidia-smi --query-gpu=index,name,memory.total,clocks.max.sm,power.limit,driver_version --format=csv
  "$python" -c 'import sys, torch; print("python", sys.version.split()[0], "torch", torch.__version__, "cuda", torch.version.cuda, "nccl", ".".join(map(str, torch.cuda.nccl.version())))'
} | tee "$out/device.txt"

echo "== GPU tests"
"$python" -m pytest tests -m gpu -q -s 2>&1 | tee "$out/tests.log"

echo "== $recipe on $gpus GPU(s)"
"$python" -m mirai_launch train "$recipe" --nproc "$gpus" --run-dir "$out/run" --resume auto 2>&1 | tee "$out/train.log"
