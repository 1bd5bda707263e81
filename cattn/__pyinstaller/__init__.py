"""Where PyInstaller, by the entry point in pyproject.toml, finds the hook for cattn. Never imported by cattn."""

import os


def get_hook_dirs() -> list[str]:
    return [os.path.dirname(__file__)]
