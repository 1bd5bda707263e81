import pytest

import cattn
from cattn import _kernels


@pytest.fixture(params=cattn.available_isas())
def isa(request, monkeypatch):
    """Runs the test once with the kernels of each instruction set that this CPU has."""
    import importlib

    f32, f64 = (importlib.import_module(f"cattn._kernels.{request.param}{suffix}") for suffix in ("", "_f64"))
    monkeypatch.setattr(_kernels, "f32", f32)
    monkeypatch.setattr(_kernels, "f64", lambda: f64)
    return request.param
