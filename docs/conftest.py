"""Pages whose code needs another library are skipped where it is not installed."""

import pytest

NEEDS = {"dask.md": "distributed", "huggingface.md": "transformers", "onnx.md": "onnx", "pytorch.md": "torch"}


@pytest.fixture(autouse=True)
def library(request):
    if request.path.name in NEEDS:
        pytest.importorskip(NEEDS[request.path.name])
