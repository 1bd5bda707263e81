#!/usr/bin/env bash
# The tests of cattn.integrations, in a fresh virtual environment that has the libraries. Elsewhere they are skipped where
# one is missing; here a skip is a failure.
#
#     tools/test_integrations.sh
#
# Needs gcc and the network. PyTorch's wheels of PyPI bring gigabytes for GPUs on Linux; with
#
#     PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
#
# pip finds those without.
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q -e '.[dask,onnx,test]' tqdm

tests() {
    "$work/venv/bin/python" -m pytest -q -rs "$@" | tee "$work/log"
    if grep "^SKIPPED" "$work/log"; then
        exit 1
    fi
}

tests tests/test_integration_onnx.py docs/onnx.md
"$work/venv/bin/pip" install -q 'onnx==1.22.*'  # the oldest that is supported
tests tests/test_integration_onnx.py -k 'not beside_onnx'

tests tests/test_integration_dask.py docs/dask.md
"$work/venv/bin/pip" install -q 'dask==2023.7.*' 'distributed==2023.7.*'  # likewise
tests tests/test_integration_dask.py

"$work/venv/bin/pip" install -q torch==2.13.0
tests tests/test_integration_torch.py docs/pytorch.md
"$work/venv/bin/pip" install -q -e '.[huggingface]'
tests tests/test_integration_huggingface.py tests/test_models.py docs/huggingface.md
"$work/venv/bin/pip" install -q 'transformers==5.4.*'  # the oldest; there, two models have an attention of their own
tests tests/test_integration_huggingface.py -k 'not modernbert and not t5'
