"""The extension modules of each row of the ISA table (cattn/_kernels/isa.py), all from the same sources.

Switches, from the environment:
    CATTN_SANITIZE=address,undefined    build with these sanitizers
    CATTN_ANNOTATE=1                    write Cython's annotated HTML beside the sources
    CATTN_ISAS=avx2,baseline            build these rows of the table alone, to try an edit of a kernel
"""

import multiprocessing
import os
import platform
import runpy
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError

KERNELS = Path("cattn/_kernels")
TABLE = KERNELS / "isa.py"
ISAS = runpy.run_path(str(TABLE))["compiled_for"](platform.machine())
MEMORYVIEWS = "cattn._kernels.memoryviews"  # Cython writes it: what typed memoryviews need, once for all modules
DEPENDS = ["setup.py", str(TABLE)]  # the flags; Cython adds the headers
FEATURES = list(dict.fromkeys(feature for isa in ISAS for feature in isa.features))
CPUS = list(dict.fromkeys(cpu for isa in ISAS for cpu in isa.cpus))
WANTED = [name for name in os.environ.get("CATTN_ISAS", "").split(",") if name] or [isa.name for isa in ISAS]
if not set(WANTED) <= {isa.name for isa in ISAS}:
    known = ", ".join(isa.name for isa in ISAS)
    raise SystemExit(f"CATTN_ISAS: expected some of {known}, got {os.environ['CATTN_ISAS']!r}")

FLAGS = [
    # -O3 and forced inlining make the register tiles: without either the kernels are 5 to 8 times slower, and
    # tests/test_build.py fails.
    "-O3",
    "-DCYTHON_INLINE=__attribute__((always_inline)) inline",
    "-ffp-contract=fast",  # a * b + c is one FMA, in clang as well
    "-fno-math-errno",
    "-fno-trapping-math",
    "-g0",  # Python's own flags may ask for debug information: 1.5 MB a module
    # Never -ffast-math (it folds the rounding of exp2 away: errors of 0.25), never -march=native (25 % slower).
]
SANITIZE = [
    f"-fsanitize={os.environ['CATTN_SANITIZE']}",
    "-fno-sanitize-recover=undefined",
    "-fstrict-overflow",  # most Pythons ask for -fwrapv, under which signed overflow is defined and not reported
    "-g",
    "-O1",  # with the checks in them, the kernels take 3 minutes a module to compile at -O3, 1 at -O1
    "-fexpensive-optimizations",  # where GCC makes FMAs: without, -O1 has none, and exp2 is less exact than promised
] if os.environ.get("CATTN_SANITIZE") else []

# What tells the sources their precision, which is float32.
PRECISIONS = {"f32": [], "f64": [("CATTN_DOUBLE", None)]}

# One wheel for every Python from 3.11 on, the first whose limited API has buffers. Free-threaded interpreters have no
# limited API: a wheel for each version.
LIMITED_API = [] if sysconfig.get_config_var("Py_GIL_DISABLED") else [("Py_LIMITED_API", "0x030B0000")]

# Processes that translate to C. Other ways to start them than fork would run this file anew.
TRANSLATORS = os.cpu_count() if multiprocessing.get_start_method() == "fork" else 0

DIRECTIVES = {
    "language_level": 3,
    "boundscheck": False,
    "wraparound": False,
    "initializedcheck": False,
    "cdivision": True,
    "freethreading_compatible": True,
}

OPENMP = "#include <omp.h>\nint main(void) { return omp_get_max_threads() == 0; }\n"


class BuildExt(build_ext):
    """Asks the compiler at hand whether it knows the features and the CPUs of the table, and whether it has OpenMP;
    without, the loops over tasks are serial. All that before anything is translated to C."""

    def build_extensions(self):
        self._check_table()
        openmp = ["-fopenmp"] if self._compiles(OPENMP, "-fopenmp") else []
        if not openmp:
            self.warn("the compiler has no OpenMP: cattn will use one thread")
        for extension in self.extensions:
            # cpu is imported before OpenMP is told anything: neither it nor what it needs must load it.
            if extension.name not in ("cattn._kernels.cpu", MEMORYVIEWS):
                extension.extra_compile_args += openmp
                extension.extra_link_args += openmp
        self._translate()
        self.parallel = self.parallel or os.cpu_count()
        self.start, self.built = time.monotonic(), 0
        super().build_extensions()

    def _translate(self):
        """To C, each source once: all modules of kernels are the same, but for flags, macros and their names."""
        sources = dict.fromkeys(extension.sources[0] for extension in self.extensions)
        translated = cythonize(
            [Extension(f"cattn._kernels.{Path(source).stem}", [source], depends=DEPENDS) for source in sources],
            compiler_directives=DIRECTIVES,
            annotate=bool(os.environ.get("CATTN_ANNOTATE")),
            build_dir="build/cython",
            nthreads=TRANSLATORS,
            shared_utility_qualified_name=MEMORYVIEWS,
        )
        in_c = dict(zip(sources, translated, strict=True))
        for extension in self.extensions:
            known = in_c[extension.sources[0]]
            source, name = Path(known.sources[0]), extension.name.rpartition(".")[2]
            own, text = source.with_stem(name), source.read_text()
            text = text.replace(f'"cattn._kernels.{source.stem}"', f'"{extension.name}"')
            text = text.replace(f"PyInit_{source.stem}", f"PyInit_{name}")
            if not own.exists() or own.read_text() != text:
                own.write_text(text)
            extension.sources, extension.depends = [str(own)], known.depends

    def build_extension(self, extension):
        super().build_extension(extension)
        self.built += 1
        seconds = time.monotonic() - self.start
        print(f"cattn: {extension.name} is ready, {self.built} of {len(self.extensions)}, {seconds:.0f} s",
              file=sys.stderr, flush=True)

    def _check_table(self):
        if self._knows(FEATURES, CPUS) or not self._knows([], []):  # where nothing compiles, the compiler says why
            return
        features = [feature for feature in FEATURES if self._knows([feature], [])]
        cpus = [cpu for cpu in CPUS if self._knows([], [cpu])]
        for isa in ISAS:
            for feature in isa.features:
                if feature not in features:
                    raise SystemExit(
                        f"{TABLE}: row {isa.name}: feature {feature!r}: expected a name that the compiler has both in "
                        f'-m{feature} and in __builtin_cpu_supports("{feature}"); of the table it knows '
                        f"{', '.join(features) or 'none'}")
            for cpu in isa.cpus:
                if cpu not in cpus:
                    raise SystemExit(
                        f"{TABLE}: row {isa.name}: CPU {cpu!r}: expected a name that the compiler has in "
                        f'__builtin_cpu_is("{cpu}"); of the table it knows {", ".join(cpus) or "none"}')

    def _knows(self, features, cpus):
        asks = "".join(f' && __builtin_cpu_supports("{feature}")' for feature in features)
        asks += "".join(f' && __builtin_cpu_is("{cpu}")' for cpu in cpus)
        return self._compiles(f"int main(void) {{ return 1{asks}; }}\n", *(f"-m{feature}" for feature in features))

    def _compiles(self, program, *flags):
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "program.c")
            source.write_text(program)
            try:
                objects = self.compiler.compile([str(source)], output_dir=folder, extra_postargs=list(flags))
                self.compiler.link_executable(objects, str(Path(folder, "program")), extra_postargs=list(flags))
            except (CompileError, LinkError):
                return False
        return True


def extension(name, source, flags, macros=()):
    return Extension(
        f"cattn._kernels.{name}",
        [str(KERNELS / source)],
        include_dirs=[str(KERNELS / "base")],
        define_macros=[*macros, *LIMITED_API],
        py_limited_api=bool(LIMITED_API),
        extra_compile_args=[*FLAGS, *flags, *SANITIZE],
        extra_link_args=SANITIZE,
    )


def extensions():
    asks = {name: " ".join(f'X("{known}")' for known in table)
            for name, table in (("CATTN_CPU_FEATURES", FEATURES), ("CATTN_CPU_NAMES", CPUS))}
    yield extension("cpu", "cpu.pyx", [], list(asks.items()))
    yield extension("memoryviews", "memoryviews.c", [])
    for isa in ISAS:
        if isa.name in WANTED:
            flags = [*(f"-m{feature}" for feature in isa.features), *isa.flags]
            for precision, name in isa.modules.items():
                yield extension(name, "any_isa.pyx", flags, PRECISIONS[precision])


setup(
    ext_modules=list(extensions()),
    cmdclass={"build_ext": BuildExt},
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if LIMITED_API else {},
)
