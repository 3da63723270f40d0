#!/bin/sh
# Makes the virtual environment of `make test-ascend` (first argument, default .venv-ascend): torch for the CPU beside
# triton-ascend, which cannot live with stock Triton; MLIR 19 from Debian, which runs the lowered kernels on x86; the real torch-npu
# over stand-ins of CANN's libraries that are built from one file of C; and the sources of three vllm-ascends and of Liger's kernels.
# Needs a network and, for MLIR, root and apt-get. What cannot be had is said, and the tests that need it skip.
set -eu
venv=${1:-.venv-ascend}
here=$(cd "$(dirname "$0")" && pwd)
[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
if ! "$venv/bin/python" -c "import torch, triton.backends.ascend, pytest" 2>/dev/null; then
    # pybind11 is imported by triton-ascend without being declared; numpy 2.3 breaks its front end
    "$venv/bin/pip" install -q "torch==2.13.0+cpu" 2>/dev/null || "$venv/bin/pip" install -q "torch==2.13.0"
    "$venv/bin/pip" uninstall -q -y triton triton-ascend  # both own the folder triton/: ours must come last and alone
    "$venv/bin/pip" install -q --no-deps "triton-ascend==3.2.0"
    "$venv/bin/pip" install -q "numpy<2.3" pybind11 pytest
fi
# What the learner imports, as far as it needs it here; emberl itself by links to these sources
if ! "$venv/bin/python" -c "import transformers, numba, pydantic, ray" 2>/dev/null; then
    "$venv/bin/pip" install -q "numpy<2.3" "transformers==5.5.4" "ray>=2.52" numba pydantic omegaconf safetensors xxhash zstandard packaging \
        psutil pyyaml typer rich tokenizers ||
        echo "test-ascend: transformers and what else the learner needs could not be had; its tests skip" >&2
fi
mkdir -p "$venv/src/emberl"
for folder in rl rollout rewards kernels configs; do
    ln -sfn "$(cd "$here/../.." && pwd)/$folder" "$venv/src/emberl/$folder"
done

# unpack NAME VERSION FOLDER [pip's options]: a wheel's files, not installed: importing them is a matter of each test
unpack() {
    name=$1 version=$2 folder=$3
    shift 3
    [ -d "$folder" ] && return
    wheel=$(mktemp -d)
    if "$venv/bin/pip" download -q --no-deps --only-binary :all: "$@" -d "$wheel" "$name==$version"; then
        "$venv/bin/python" -m zipfile -e "$wheel"/*.whl "$folder"
    else
        echo "test-ascend: no wheel of $name $version; the tests that read or run it skip" >&2
    fi
    rm -rf "$wheel"
}
unpack vllm-ascend 0.23.0 "$venv/vllm-ascend-0.23.0" --platform manylinux_2_34_x86_64 --python-version 3.11
unpack vllm-ascend 0.26.0rc1 "$venv/vllm-ascend-0.26.0rc1" --platform manylinux_2_34_x86_64 --python-version 3.11
# The newest one has no wheel. Its sources are what pip has unpacked when it fails to read their metadata, which needs a build.
newest="$venv/vllm-ascend-0.30.0rc2"
if [ ! -d "$newest" ]; then
    sources=$(mktemp -d)
    TMPDIR=$sources SOC_VERSION=ascend910b1 COMPILE_CUSTOM_KERNELS=0 "$venv/bin/pip" download -q --no-deps --no-clean --no-build-isolation \
        --no-binary :all: -d "$sources" vllm-ascend==0.30.0rc2 >/dev/null 2>&1 || true
    found=$(find "$sources" -type d -name vllm_ascend -path '*vllm-ascend_*' | head -n 1)
    if [ -n "$found" ]; then
        mkdir -p "$newest" && cp -r "$found" "$newest/"
    else
        echo "test-ascend: no sources of vllm-ascend 0.30.0rc2; the tests that read them skip" >&2
    fi
    rm -rf "$sources"
fi
unpack liger-kernel 0.8.5 "$venv/liger-kernel-0.8.5"
unpack torch-npu 2.13.0 "$venv/torch-npu-2.13.0"
unpack torch-npu 2.10.0.post4 "$venv/torch-npu-2.10.0" --platform manylinux_2_28_x86_64 --python-version 3.11
if command -v cc >/dev/null; then
    mkdir -p "$venv/cann"
    # the six that torch-npu links to; the others hold nothing that it needs when it is loaded
    for library in ascendcl acl_op_compiler hccl ge_runner graph acl_tdt_channel; do
        part=$([ $library = ascendcl ] && echo -DRUNTIME || [ $library = acl_op_compiler ] && echo -DCOMPILER || true)
        cc -shared -fPIC -O1 $part -o "$venv/cann/lib$library.so" "$here/cann_stub.c" -Wl,-soname,lib$library.so
    done
else
    echo "test-ascend: no C compiler; the tests on torch-npu skip" >&2
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
