"""Pages whose code needs another library are skipped where it is not installed."""

import pytest

NEEDS = {"onnx.md": "onnx", "pytorch.md": "torch", "huggingface.md": "transformers"}


@pytest.fixture(autouse=True)
def library(request):
    if request.path.name in NEEDS:
        pytest.importorskip(NEEDS[request.path.name])
