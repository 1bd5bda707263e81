"""The library under which cattn is put: imported when it is used, and refused where it is too old."""

import importlib
import re


def library(name, oldest, extra):
    """The module `name`, of version `oldest` (two numbers) or newer. `extra` is cattn's that brings it, and the name of
    the module of cattn.integrations that needs it."""
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        got, cause = str(error), error
    else:
        found = getattr(module, "__version__", "0.0, a folder of this name")
        version = re.match(r"(\d+)\.(\d+)", found)
        if version is None or tuple(map(int, version.groups())) >= oldest:
            return module
        got, cause = f"this is {found}", None
    raise ImportError(f"cattn.integrations.{extra}: needs {name} {'.'.join(map(str, oldest))} or newer ({got}): "
                      f'`pip install "cattn[{extra}]"`') from cause
