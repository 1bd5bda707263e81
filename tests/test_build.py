"""What was built: the modules of each instruction set of the table, with the flags that make them fast, and a
package that is cheap to import."""

import importlib.machinery
import itertools
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import time
import tomllib
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import processes
import pytest

import cattn
from cattn import _kernels
from cattn._kernels.isa import ISAS, Isa, compiled_for

ROOT = processes.ROOT
python = partial(processes.python, without=("CATTN_ISA",))
SUFFIX = importlib.machinery.EXTENSION_SUFFIXES[0] if sysconfig.get_config_var("Py_GIL_DISABLED") else ".abi3.so"


def test_flags_are_in_force(isa):
    """Without -O3, or with inlining lost, a kernel is 5 to 8 times slower than it should be (75 % and more of the FMA
    peak) and everything else still passes. The only test that looks at the time."""
    if isa == "baseline":
        pytest.skip("without FMA in the instruction set the FMA peak says little")
    x = np.random.default_rng(0).standard_normal((512, 64)).astype(np.float32)

    def best_rate(work, repeats):
        rates = []
        for _ in range(repeats):
            start = time.perf_counter()
            flops = work()
            rates.append(flops / (time.perf_counter() - start))
        return max(rates)

    def attend():
        cattn.scaled_dot_product_attention(x, x, x, num_threads=1)
        return 4 * 512 * 512 * 64

    peak = best_rate(lambda: _kernels.f32.fma_flops(100_000, 1), 5)
    share = 0.0
    for _ in range(10):  # 20 calls are over in 12 ms: another process can hold the core for all of them
        share = max(share, best_rate(attend, 20) / peak)
        if share >= 0.25:
            break
    assert share >= 0.25, f"{share:.0%} of the FMA peak"


def test_modules_are_those_of_the_table():
    """One build of each, for the limited API where the interpreter has it: a forgotten other one would be imported."""
    folder = Path(_kernels.__file__).parent
    suffixes = importlib.machinery.EXTENSION_SUFFIXES
    built = [path.name for suffix in suffixes for path in folder.glob(f"*{suffix}")
             if "." not in path.name.removesuffix(suffix)]
    named = [name for row in compiled_for(platform.machine()) for name in row.modules.values()]
    assert sorted(built) == sorted(f"{name}{SUFFIX}" for name in [*named, "cpu", "memoryviews"])


def test_table():
    for machine in ("x86_64", "AMD64", "aarch64", "riscv64"):
        names = [row.name for row in compiled_for(machine)]
        assert names[-1] == "baseline" and len(set(names)) == len(names)
        assert all("f32" in row.precisions for row in compiled_for(machine))
        assert ("avx2" in names) == (machine in ("x86_64", "AMD64"))
    assert ISAS[-1].features == () and ISAS[-1].machines == () and ISAS[-1].precisions == ("f32", "f64")
    for better, worse in itertools.pairwise(ISAS):  # best first: more features
        assert set(worse.features) <= set(better.features)


def test_every_available_module_works(isa):
    for module, precision in ((_kernels.f32, "f32"), (_kernels.f64(), "f64")):
        assert module.__name__ == f"cattn._kernels.{_kernels.module_name(isa, precision)}"
    for dtype in (np.float32, np.float64):
        x = np.eye(3, dtype=dtype)
        np.testing.assert_allclose(cattn.scaled_dot_product_attention(x, x, x, scale=1000), x)


PLANTED = Isa("planted", (), (), precisions=("f32",))


def test_a_row_without_float64(monkeypatch):
    """Its own module in float32, and in float64 that of the best available row that has one."""
    [first, *_] = cattn.available_isas()
    [best, *_] = (name for name in cattn.available_isas() if _kernels.module_name(name, "f64") == f"{name}_f64")
    asked = []
    monkeypatch.setattr(_kernels, "compiled_for", lambda machine: (PLANTED, *compiled_for(machine)))
    monkeypatch.setattr(_kernels, "find_spec", lambda name: asked.append(name) or True)
    available = _kernels._find_isas()
    assert asked[0] == "cattn._kernels.planted" and [*available][:2] == ["planted", first]
    monkeypatch.setattr(_kernels, "_AVAILABLE", available)
    assert [_kernels.module_name("planted", precision) for precision in ("f32", "f64")] == ["planted", f"{best}_f64"]
    monkeypatch.setattr(_kernels, "isa", "planted")
    assert _kernels.f64().__name__ == f"cattn._kernels.{best}_f64"


@pytest.mark.parametrize(("names", "first", "last"), [
    ({"intel", "cascadelake"}, ["avx512_skylake", "avx512_intel"], []),
    ({"intel"}, ["avx512_intel"], ["avx512_skylake"]),
    (set(), [], ["avx512_skylake", "avx512_intel"]),
], ids=["cascadelake", "intel", "others"])
def test_rows_of_some_cpus(names, first, last, monkeypatch):
    """First on those CPUs; on others last, for those who ask for them."""
    monkeypatch.setattr(_kernels, "compiled_for", lambda machine: ISAS)
    monkeypatch.setattr(_kernels, "find_spec", lambda name: True)
    monkeypatch.setattr(_kernels, "cpu", SimpleNamespace(supports=lambda feature: True, is_a=names.__contains__))
    assert [*_kernels._find_isas()] == [*first, "avx512", "avx2", "baseline", *last]


def test_names_of_this_cpu():
    """Model 85 of Intel's family 6 is Skylake's server, Cascade Lake or Cooper Lake."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    said = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    if "vendor_id" not in said:
        pytest.skip("nothing here says whose CPU this is")
    is_a = _kernels.cpu.is_a
    intel = said["vendor_id"] == "GenuineIntel"
    assert is_a("intel") == intel
    skylake = intel and (said["cpu family"], said["model"]) == ("6", "85") and "avx512f" in said["flags"].split()
    assert sum(map(is_a, ("skylake-avx512", "cascadelake", "cooperlake"))) == skylake
    assert not is_a("nonsense")


@pytest.fixture
def sources(tmp_path):
    """What setup.py reads before it compiles: itself, and a table that has another row, first."""
    if not (ROOT / "setup.py").exists():
        pytest.skip("not a checkout")
    pytest.importorskip("Cython")
    pytest.importorskip("setuptools")

    def plant(row):
        kernels = tmp_path / "cattn" / "_kernels"
        kernels.mkdir(parents=True)
        shutil.copy(ROOT / "setup.py", tmp_path)
        table = (ROOT / "cattn/_kernels/isa.py").read_text()
        (kernels / "isa.py").write_text(f"{table}\n\nISAS = ({row!r}, *ISAS)\n")
        return tmp_path
    return plant


def test_extensions_are_those_of_the_table(sources):
    done = python("from setuptools import Extension; import distutils.core, json\n"
                  "made = distutils.core.run_setup('setup.py', stop_after='init').ext_modules\n"
                  "print(json.dumps([extension.name for extension in made]))", folder=sources(PLANTED), CATTN_ISAS="")
    assert done.returncode == 0, done.stderr
    named = [name for row in (PLANTED, *compiled_for(platform.machine())) for name in row.modules.values()]
    assert json.loads(done.stdout) == [f"cattn._kernels.{name}" for name in ["cpu", "memoryviews", *named]]


def test_a_feature_that_the_compiler_does_not_know(sources):
    """Said before anything is compiled: what would be compiled is not there."""
    folder = sources(Isa("planted", (), ("nonsense",)))
    done = subprocess.run([sys.executable, "setup.py", "build_ext"], cwd=folder, capture_output=True, text=True)
    assert last_error(done).startswith(f"{Path('cattn/_kernels/isa.py')}: row planted: feature 'nonsense': expected a ")


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the compiler has names for x86's CPUs")
def test_a_cpu_that_the_compiler_does_not_know(sources):
    folder = sources(Isa("planted", (), (), cpus=("nonsense",)))
    done = subprocess.run([sys.executable, "setup.py", "build_ext"], cwd=folder, capture_output=True, text=True)
    assert last_error(done).startswith(f"{Path('cattn/_kernels/isa.py')}: row planted: CPU 'nonsense': expected a ")


@pytest.mark.parametrize(("nonsense", "got"), [
    ("nonsense", "'nonsense'"), ("\udcff", r"'\udcff'"), ("x" * 5000, f"'{'x' * 40}'... (5000 characters)"),
], ids=["word", "no UTF-8", "long"])
def test_unknown_isa(nonsense, got):
    done = python("import cattn", CATTN_ISA=nonsense)
    assert done.returncode == 1
    choices = ", ".join(cattn.available_isas())
    assert done.stderr.splitlines()[-1] == f"ImportError: CATTN_ISA: expected one of {choices} on this CPU, got {got}"


@pytest.mark.parametrize("wanted", [*cattn.available_isas(), ""])
def test_isa_from_the_environment(wanted):
    """Only the modules of the chosen one are loaded; an empty variable is none."""
    done = python("import sys, json, numpy as np, cattn; x = np.eye(2); cattn.scaled_dot_product_attention(x, x, x)\n"
                  "print(json.dumps([cattn.isa, [n for n in sys.modules if n.startswith('cattn._kernels.')]]))",
                  CATTN_ISA=wanted)
    assert done.returncode == 0, done.stderr
    chosen, modules = json.loads(done.stdout)
    assert chosen == (wanted or cattn.available_isas()[0])
    kernels = [_kernels.module_name(chosen, precision) for precision in ("f32", "f64")]
    assert set(modules) == {f"cattn._kernels.{name}" for name in ("cpu", "isa", "memoryviews", *kernels)}


def test_import_is_light():
    """Beyond numpy's: no thread, no process, no package that takes time, and float64 only when it is asked for."""
    done = python("""
import json, os, sys, threading
import numpy
def count():
    return len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else threading.active_count()
before, modules = count(), set(sys.modules)
import cattn
print(json.dumps([count() - before, threading.active_count(), sorted(set(sys.modules) - modules)]))
""")
    assert done.returncode == 0, done.stderr
    more_threads, python_threads, modules = json.loads(done.stdout)
    assert more_threads == 0 and python_threads == 1
    packages = {name.split(".")[0] for name in modules}
    assert packages.isdisjoint({"multiprocessing", "concurrent", "subprocess", "asyncio", "torch", "scipy", "ml_dtypes",
                                "Cython", "setuptools", "matplotlib", "tqdm", "hypothesis", "pytest", "onnx", "dask",
                                "distributed"})
    assert not [name for name in modules if name.endswith("_f64") or name.startswith(("numpy.random", "numpy.ma"))]
    assert {"cattn.__pyinstaller", "cattn.integrations"}.isdisjoint(modules)


def test_public_names():
    assert sorted(cattn.__all__) == cattn.__all__
    for name in cattn.__all__:
        assert hasattr(cattn, name)
    assert (Path(cattn.__file__).parent / "py.typed").exists()


def test_tab_completion_shows_the_api_alone():
    """A shell leaves out names with an underscore."""
    done = python("import cattn, json; print(json.dumps([dir(cattn), dir(cattn.reference)]))")
    assert done.returncode == 0, done.stderr
    for module, names in zip((cattn, cattn.reference), json.loads(done.stdout), strict=True):
        assert [name for name in names if not name.startswith("_")] == module.__all__


# What is not there.


@pytest.fixture
def installation(tmp_path):
    """A copy of the package that lacks something, as a checkout or an installation."""
    def copy(*missing, checkout=False):
        package = tmp_path / "cattn"
        shutil.copytree(ROOT / "cattn", package, ignore=shutil.ignore_patterns("*.pyx", "__pycache__", *missing))
        if (ROOT / "cattn.libs").exists():  # of a wheel: its OpenMP runtime
            shutil.copytree(ROOT / "cattn.libs", tmp_path / "cattn.libs")
        if checkout:
            (package / "_kernels" / "cpu.pyx").touch()
        return tmp_path
    return copy


def last_error(done):
    assert done.returncode == 1
    return done.stderr.splitlines()[-1]


def test_a_checkout_that_is_not_built(installation):
    folder = installation("*.so", checkout=True)
    done = python("import cattn", folder=folder)
    assert last_error(done) == ("ImportError: cattn: the compiled module cattn._kernels.cpu is missing: "
                                f"`pip install -e .` in {folder} builds it")
    assert "ModuleNotFoundError: No module named 'cattn._kernels.cpu'\n\nThe above exception was" in done.stderr


def test_an_installation_without_modules(installation):
    folder = installation("*.so")
    assert last_error(python("import cattn", folder=folder)) == (
        "ImportError: cattn: the compiled module cattn._kernels.cpu is missing: "
        f"`pip install --force-reinstall --no-deps cattn` brings it back to {folder / 'cattn' / '_kernels'}")


def test_an_installation_without_kernels(installation):
    """The last of the table, which every CPU runs."""
    missing = (f"{row.name}*.so" for row in ISAS)
    done = python("import cattn", folder=installation(*missing, checkout=True))
    assert last_error(done).startswith(
        "ImportError: cattn: the compiled module cattn._kernels.baseline is missing: `pip install -e .`")
    assert "ModuleNotFoundError" in done.stderr


def test_an_installation_without_float64(installation):
    code = "import numpy as np, cattn; x = np.eye(2, dtype={}); cattn.scaled_dot_product_attention(x, x, x)"
    folder, double = installation("*_f64*"), _kernels.module_name(cattn.available_isas()[0], "f64")
    assert python(code.format("'f4'"), folder=folder).returncode == 0
    assert last_error(python(code.format("'f8'"), folder=folder)).startswith(
        f"ImportError: cattn: the compiled module cattn._kernels.{double} is missing: `pip")


def test_an_installation_without_what_all_modules_import(installation):
    assert last_error(python("import cattn", folder=installation("memoryviews*"))).startswith(
        "ImportError: cattn: the compiled module cattn._kernels.memoryviews is missing: `pip")


def test_a_frozen_application_without_modules(installation):
    done = python("import sys; sys.frozen = True; import cattn", folder=installation("*.so"))
    assert last_error(done) == (
        "ImportError: cattn: the compiled module cattn._kernels.cpu is missing: freeze the application with all "
        "modules of cattn._kernels, which are imported by name: PyInstaller finds them by the hook of an installed "
        "cattn, other tools want them listed")


def test_what_is_missing_inside_a_module_is_not_the_module(monkeypatch):
    monkeypatch.setattr(importlib, "import_module", raising(ModuleNotFoundError("No module named 'abc'", name="abc")))
    with pytest.raises(ModuleNotFoundError, match="No module named 'abc'"):
        _kernels._load("cpu")


def raising(error):
    def function(*arguments):
        raise error
    return function


NOT_FOUND = "cannot open shared object file: No such file or directory"


@pytest.mark.parametrize(("error", "cure"), [
    (f"libgomp.so.1: {NOT_FOUND}", "the OpenMP runtime libgomp.so.1 is not on this system: `apt-get install libgomp1`"),
    ("Error loading shared library libgomp.so.1: No such file or directory (needed by /cattn/_kernels/avx2.abi3.so)",
     "the OpenMP runtime libgomp.so.1 is not on this system: `apt-get install libgomp1`"),
    (f"libgomp-24e2ab19.so.1.0.0: {NOT_FOUND}",
     "the OpenMP runtime libgomp-24e2ab19.so.1.0.0 of the wheel is missing: `pip install"),
    (f"libomp.so.5: {NOT_FOUND}", "the OpenMP runtime libomp.so.5 is not on this system: `apt-get install libomp5`"),
    ("dlopen(/cattn/_kernels/baseline.abi3.so, 0x0002): Library not loaded: /opt/homebrew/opt/libomp/lib/libomp.dylib",
     "the OpenMP runtime libomp.dylib is not on this system: `apt-get install libomp5`"),
], ids=["glibc", "musl", "wheel", "LLVM", "macOS"])
def test_without_the_openmp_runtime(monkeypatch, error, cure):
    """What the dynamic linkers of glibc, musl and macOS say."""
    cause = ImportError(error)
    monkeypatch.setattr(importlib, "import_module", raising(cause))
    with pytest.raises(ImportError) as raised:
        _kernels._load(cattn.isa)
    assert str(raised.value).startswith(f"cattn: {cure}") and raised.value.__cause__ is cause


@pytest.mark.parametrize("error", [
    "libgomp.so.1: version `GOMP_5.0' not found (required by /cattn/_kernels/avx2.abi3.so)",
    f"libm.so.7: {NOT_FOUND}",
    "/usr/lib/libgomp.so.1: cannot allocate memory in static TLS block",
], ids=["version", "no libm", "no room"])
def test_other_errors_of_the_dynamic_linker(monkeypatch, error):
    """They say what is wrong."""
    cause = ImportError(error)
    monkeypatch.setattr(importlib, "import_module", raising(cause))
    with pytest.raises(ImportError) as raised:
        _kernels._load(cattn.isa)
    assert raised.value is cause


def test_modules_whose_openmp_runtime_is_not_on_the_system(installation):
    folder = installation()
    modules = [path for path in folder.glob(f"cattn/_kernels/*{SUFFIX}") if b"libgomp.so.1\0" in path.read_bytes()]
    if not modules or (folder / "cattn.libs").exists():
        pytest.skip("built with another OpenMP runtime, a copy of its own, or none")
    for path in modules:
        path.write_bytes(path.read_bytes().replace(b"libgomp.so.1\0", b"libgomp.so.9\0"))
    done = python("import cattn", folder=folder)
    assert last_error(done).startswith(
        "ImportError: cattn: the OpenMP runtime libgomp.so.9 is not on this system: `apt-get install libgomp1` (Debian")
    assert f"ImportError: libgomp.so.9: {NOT_FOUND}\n\nThe above exception was" in done.stderr


# PyInstaller.


def hook_folders():
    """Where the entry point sends PyInstaller."""
    project = tomllib.loads(Path(__file__).parents[1].joinpath("pyproject.toml").read_text())["project"]
    module, function = project["entry-points"]["pyinstaller40"]["hook-dirs"].split(":")
    return getattr(importlib.import_module(module), function)()


def test_hook_for_pyinstaller():
    """It names each module of the table that this machine has, and loads none."""
    [folder] = hook_folders()
    hook = os.path.join(folder, "hook-cattn.py")
    done = python(f"""
import json, runpy, sys
hidden = runpy.run_path({hook!r})["hiddenimports"]
print(json.dumps([hidden, [name for name in sys.modules if name.startswith(("cattn", "numpy", "PyInstaller"))]]))
""")
    assert done.returncode == 0, done.stderr
    hidden, modules = json.loads(done.stdout)
    named = [name for row in compiled_for(platform.machine()) for name in row.modules.values()]
    assert sorted(hidden) == sorted(f"cattn._kernels.{name}" for name in ["cpu", "memoryviews", *named])
    assert modules == []


@pytest.mark.slow
def test_a_frozen_application(tmp_path):
    pytest.importorskip("PyInstaller")
    (tmp_path / "application.py").write_text("""
import sys
import numpy as np
import cattn

for dtype in (np.float32, np.float64):
    x = np.eye(3, dtype=dtype)
    assert np.allclose(cattn.scaled_dot_product_attention(x, x, x, scale=1000), x)
assert cattn.MultiHeadAttention(16, 4, seed=0)(np.ones((2, 3, 16), np.float32)).shape == (2, 3, 16)
cattn.preload()
print(sys.frozen, *cattn.available_isas())
""")
    command = [sys.executable, "-m", "PyInstaller", "--paths", ROOT, "application.py"]
    for folder in hook_folders():  # of a checkout that is not installed
        command += ["--additional-hooks-dir", folder]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    done = subprocess.run([tmp_path / "dist/application/application"], capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()) == (0, ["True", *cattn.available_isas()]), done.stderr
