import pytest
from hypothesis import HealthCheck, settings
from problems import ISAS

import cattn
from cattn import _kernels

# Programs of tests, for Linux; and this file, since the doctests of two modules of one name cannot be collected.
collect_ignore = ["guarded.py", "leaks.py", "conftest.py"]

# The same examples each time: what fails, fails again.
settings.register_profile("normal", derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
settings.register_profile("slow", settings.get_profile("normal"), max_examples=7000, print_blob=True)


def pytest_report_header():
    return "cattn: all tests take 4 to 8 minutes on 2 CPUs; with pytest-xdist installed, -n 2 takes less"


@pytest.fixture(autouse=True)
def default_number_of_threads():
    """No test leaves its number to the next."""
    yield
    cattn.set_num_threads(None)


def use(isa, monkeypatch):
    f32, f64 = (_kernels._load(_kernels.module_name(isa, precision)) for precision in ("f32", "f64"))
    monkeypatch.setattr(_kernels, "f32", f32)
    monkeypatch.setattr(_kernels, "f64", lambda: f64)


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    """Runs the test once with the kernels of each instruction set that this CPU has, but for those of the same bits."""
    use(request.param, monkeypatch)
    return request.param


@pytest.fixture
def on_every_isa(monkeypatch):
    """A function: what a call returns with each of them, in a list. For what takes longer to judge than to compute."""
    def results(call):
        found = []
        for isa in cattn.available_isas():
            use(isa, monkeypatch)
            found.append(call())
        return found

    return results
