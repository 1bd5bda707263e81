#!/usr/bin/env bash
# The tests that compare with PyTorch, in a fresh virtual environment that has it. Elsewhere they are skipped where it is
# missing; here a skip is a failure.
#
#     tools/test_torch.sh
#
# Needs gcc and the network: PyTorch is 200 MB.
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

python3 -m venv "$work/venv"
# Of CPUs alone: any other version may bring gigabytes of libraries for GPUs.
"$work/venv/bin/pip" install -q torch==2.13.0
"$work/venv/bin/pip" install -q -e '.[test]'
"$work/venv/bin/python" -m pytest -q -rs $(grep -l 'importorskip("torch")' tests/*.py) | tee "$work/log"
if grep "^SKIPPED.*torch" "$work/log"; then
    exit 1
fi
