#!/bin/sh
# Make a virtual environment with everything that mmkd's demo and tests need. What is done already is skipped.
#   sh tools/setup.sh [FOLDER [REQUIREMENTS]]   by default .venv and requirements.txt
# PYTHON=/path/to/python chooses the interpreter.
set -eu
VENV=${1:-.venv}
REQUIREMENTS=${2:-requirements.txt}
cd "$(dirname "$0")/.."

fail() {
    echo "error: $*" >&2
    exit 1
}

stamp=$VENV/ready
if cat "$REQUIREMENTS" pyproject.toml | cmp -s - "$stamp" && [ -x "$VENV/bin/python" ]; then
    exit 0
fi

usable='import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))'
if [ -n "${PYTHON:-}" ]; then
    "$PYTHON" -c "$usable" 2>/dev/null || fail "PYTHON=$PYTHON is not Python 3.10, 3.11 or 3.12 with venv"
else
    for PYTHON in python3 python3.11 python3.12 python3.10 none; do
        [ "$PYTHON" = none ] && fail "no Python 3.10, 3.11 or 3.12 with venv found; install one, or name it: make PYTHON=/path/to/python"
        "$PYTHON" -c "$usable" 2>/dev/null && break
    done
fi
"$PYTHON" -c "import sysconfig, os, sys; sys.exit(not os.path.exists(os.path.join(sysconfig.get_paths()['include'], 'Python.h')))" ||
    fail "$PYTHON has no header files (Python.h), which mmcv is compiled with; install them (python3-dev or the like)"
compiler=${CXX:-c++}
command -v "$compiler" >/dev/null || fail "no C++ compiler ($compiler) found, and mmcv is compiled from source; install g++ or clang"
need=10 # PyTorch's CUDA build, which Linux gets by default, is most of it
free=$(df -Pk . | awk 'NR == 2 {print int($4 / 1048576)}')
[ "$free" -ge $need ] || fail "$free GiB free in $(pwd), and the environment takes up to $need GiB; make room"

say() {
    echo "[set-up $1/5] $2"
}

say 1 "virtual environment $VENV ($("$PYTHON" --version))"
[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
PIP="$VENV/bin/python -m pip --disable-pip-version-check install --quiet --constraint $REQUIREMENTS"
name() { # of a package that its maintained fork replaces, where the requirements say so
    grep -oE "^(onedl-)?$1" "$REQUIREMENTS"
}
$PIP --upgrade pip setuptools wheel ninja psutil
say 2 "PyTorch (up to a few minutes, by your connection)"
$PIP torch torchvision
say 3 "mmcv, compiled from source: about 12 minutes on 2 cores, once; pip keeps the result"
$PIP "$(name mmengine)"
export MMCV_CXX="$compiler" CXX="$PWD/tools/cxx20.sh" NVCC_APPEND_FLAGS=-std=c++20
$PIP --no-build-isolation "$(name mmcv)"
reason=$("$VENV/bin/python" -c 'import cv2' 2>&1) ||
    fail "OpenCV does not load (${reason##*: }); on Debian and Ubuntu: apt-get install libgl1 libglib2.0-0"
# pip may have kept a build for another torch, or one without CUDA
right='import sys, torch, mmcv.ops; from mmcv.ops import get_compiling_cuda_version as built
from torch.utils.cpp_extension import CUDA_HOME
sys.exit(torch.cuda.is_available() and CUDA_HOME is not None and built() == "not available")'
if ! "$VENV/bin/python" -W ignore -c "$right" 2>/dev/null; then
    echo "              the build that pip kept does not fit this PyTorch; compiling again"
    $PIP --no-build-isolation --no-deps --force-reinstall --no-cache-dir "$(name mmcv)"
fi
say 4 "mmdet, mmsegmentation and the tools"
$PIP -r "$REQUIREMENTS"
say 5 "mmkd itself, editable"
$PIP --no-build-isolation --no-deps -e .
"$VENV/bin/python" -W ignore - <<'PY'
import torch
import torchvision
from mmcv.ops import get_compiling_cuda_version

cuda = get_compiling_cuda_version()
built = 'CPU only' if cuda == 'not available' else f'CPU and CUDA {cuda}'
print(f'Ready: torch {torch.__version__}, torchvision {torchvision.__version__}, mmcv ops built for {built}, {torch.cuda.device_count()} GPU(s) found')
if torch.cuda.is_available() and cuda == 'not available':
    print('A GPU is there, but no CUDA toolkit (nvcc): mmcv\'s ops run on the CPU alone. See "On a GPU" in docs/get_started.md.')
PY
cat "$REQUIREMENTS" pyproject.toml >"$stamp"
