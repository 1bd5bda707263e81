"""Nothing outside an array is read or written, not one byte: guarded.py, in processes that a SIGSEGV may end."""

import signal
import sys

import pytest
from processes import program_of, python

import cattn

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mprotect through ctypes")
each_isa = pytest.mark.parametrize("isa", cattn.available_isas())


def run(code, isa=cattn.isa):
    return python(program_of("guarded", code), CATTN_ISA=isa)


def assert_clean(code, isa):
    done = run(code, isa)
    assert done.returncode == 0, f"{done.returncode} in {done.stdout.splitlines()[-1:]}\n{done.stderr[-2000:]}"
    assert done.stdout


@pytest.mark.parametrize("at_end", [True, False])
def test_guards_work(at_end):
    assert run(f"guarded.touch_outside({at_end})").returncode == -signal.SIGSEGV


@each_isa
def test_some_head_dims(isa):
    """Each with every dtype and both kernels."""
    assert_clean("guarded.attention(range(1, 131, 7)); guarded.many_keys(); guarded.tables([1, 2, 9, 16, 33]); "
                 "guarded.gradients(range(1, 131, 7)); guarded.linear_gradients([1, 9, 48, 130]); "
                 "guarded.projections([1, 9, 16, 96, 130]); guarded.rotary([2, 3, 16, 33, 64, 66, 530]); "
                 "guarded.packed([1, 8, 16, 32, 48, 64, 80]); guarded.merges([1, 5, 16, 33, 64, 130])", isa)


@pytest.mark.slow
@each_isa
def test_every_head_dim(isa):
    assert_clean("guarded.attention(list(range(1, 131)) * 5); guarded.gradients(range(1, 131)); "
                 "guarded.linear_gradients(range(1, 131)); guarded.tables(range(1, 131)); "
                 "guarded.projections(range(1, 270)); guarded.rotary(range(2, 131)); guarded.packed(range(1, 131)); "
                 "guarded.merges(range(1, 131))", isa)
