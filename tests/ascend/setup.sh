#!/bin/sh
# Makes the virtual environment of `make test-ascend` (first argument, default .venv-ascend): torch for the CPU beside
# triton-ascend, which cannot live with stock Triton, and MLIR 19 from Debian, which runs the lowered kernels on x86.
# Needs a network and, for MLIR, root and apt-get; without them the tests that run kernels skip and say so.
set -eu
venv=${1:-.venv-ascend}
[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
if ! "$venv/bin/python" -c "import torch, triton.backends.ascend, pytest" 2>/dev/null; then
    # pybind11 is imported by triton-ascend without being declared; numpy 2.3 breaks its front end
    "$venv/bin/pip" install -q "torch==2.13.0+cpu" 2>/dev/null || "$venv/bin/pip" install -q "torch==2.13.0"
    "$venv/bin/pip" uninstall -q -y triton triton-ascend  # both own the folder triton/: ours must come last and alone
    "$venv/bin/pip" install -q --no-deps "triton-ascend==3.2.0"
    "$venv/bin/pip" install -q "numpy<2.3" pybind11 pytest
fi
# vllm-ascend's sources, to be read: 27 MB that are unpacked, not installed
if [ ! -d "$venv/vllm-ascend-0.23.0" ]; then
    wheel=$(mktemp -d)
    if "$venv/bin/pip" download -q --no-deps --only-binary :all: --platform manylinux_2_34_x86_64 --python-version 3.11 \
        -d "$wheel" "vllm-ascend==0.23.0"; then
        "$venv/bin/python" -m zipfile -e "$wheel"/*.whl "$venv/vllm-ascend-0.23.0"
    else
        echo "test-ascend: no wheel of vllm-ascend 0.23.0; the tests of its sources skip" >&2
    fi
    rm -rf "$wheel"
fi
if [ ! -x /usr/lib/llvm-19/bin/mlir-opt ] || ! command -v cc >/dev/null; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends \
            mlir-19-tools llvm-19 libmlir-19 gcc libc6-dev >/dev/null ||
            echo "test-ascend: apt-get could not install MLIR 19; lowered kernels will not be executed" >&2
    else
        echo "test-ascend: MLIR 19 needs root and apt-get; lowered kernels will not be executed" >&2
    fi
fi
