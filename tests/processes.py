"""Programs and their errors; the code of a test in a Python process of its own; what stands in for one of bench."""

import os
import subprocess
import sys
from pathlib import Path

import cattn

ROOT = Path(cattn.__file__).parents[1]  # there, a new process imports this cattn


def python(code, *, folder=ROOT, without=(), **variables):
    """The ended process of this code in this folder, its output as text. Its environment is this process's, `without`
    some variables, with these."""
    environment = {name: value for name, value in os.environ.items() if name not in without} | variables
    return subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)


def program_of(module, code):
    """Code that finds this module, which lies beside the tests."""
    return f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import {module}; {code}"


def line_of_error(capsys, main, arguments, program):
    """The one line on stderr of a call of a program's main that must fail."""
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith(f"{program}: ")
    assert err.count("\n") == 1
    return err


class FakeProcess:
    """Answers as a worker does: each request by its answer, or by the next of a list of them."""

    def __init__(self, **answers):
        self.answers = answers

    def ask(self, method, *arguments):
        answer = self.answers[method]
        if isinstance(answer, list):
            answer = answer.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self):
        self.answers = None
