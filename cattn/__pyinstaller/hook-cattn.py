"""What PyInstaller does not see: the modules that cattn/_kernels imports by name. Those of every instruction set of the
table, since the frozen application may run on another CPU."""

import os
import platform
import runpy

# The table alone: to import cattn here would load OpenMP and numpy into PyInstaller.
_compiled_for = runpy.run_path(os.path.join(os.path.dirname(__file__), os.pardir, "_kernels", "isa.py"))["compiled_for"]

hiddenimports = ["cattn._kernels.cpu", "cattn._kernels.memoryviews"] + [
    f"cattn._kernels.{name}" for row in _compiled_for(platform.machine()) for name in row.modules.values()
]
