#!/usr/bin/env bash
# Runs the whole suite under GCC's sanitizers, in a copy of this checkout, once for each instruction set that this CPU
# has, and stops at the first report:
#
#     tools/sanitize.sh [address] [thread]        both by default
#
# address    AddressSanitizer and UndefinedBehaviorSanitizer; and no leak of what the kernels themselves allocate
# thread     ThreadSanitizer. It sees nothing of the synchronisation inside GCC's OpenMP, so the modules are linked with
#            LLVM's, which tells it through Archer
#
# Before the tests, each has to see the errors planted into its copy of the kernels.
# Debian 12: apt-get install gcc libomp-14-dev python3-dev python3-venv
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
llvm=/usr/lib/llvm-14/lib
work=$(mktemp -d)
log=$work/log
python=$work/venv/bin/python
leak='^ +#1 .*/_kernels/'  # the caller of malloc: CPython and its packages leak as well, when they exit
reports="ERROR: AddressSanitizer|ThreadSanitizer: |: runtime error: |$leak"
export CATTN_NUM_THREADS=4  # where a test does not say how many

finish() {
    grep -lE "$reports" "$log"/* 2> /dev/null | xargs -r cat || true
    rm -rf "$work"
}
trap finish EXIT

# build SANITIZERS: a copy with planted errors, and a virtual environment with it and what the tests need.
build() {
    rm -rf "${work:?}"/*
    mkdir "$work/cattn" "$log"
    cd "$work/cattn"
    tar -C "$root" --exclude-vcs --exclude='*.so' --exclude=./build --exclude='./.*' -c . | tar -x
    echo 'include "planted.pxi"' >> cattn/_kernels/any_isa.pyx
    cat > cattn/_kernels/planted.pxi <<'END'
from cython.parallel cimport prange
from libc.stdlib cimport malloc
from libc.string cimport memset


def read_past(const real[::1] a):
    return (&a[0])[a.shape[0]]


def overflow(int n):
    return n + n


def leak(size_t size):
    memset(malloc(size), 0, size)


def race(Py_ssize_t[::1] a):
    cdef Py_ssize_t i
    for i in prange(1000, num_threads=2, nogil=True):
        (&a[0])[0] = i
END
    python3 -m venv "$work/venv"
    CATTN_SANITIZE=$1 "$python" -m pip install -q -e '.[test]'
}

# sanitized ARGUMENTS...: Python under the sanitizers. Their reports go into files, since tests read what processes
# print. setarch: the sanitizers of GCC 12 do not bear all the random addresses that newer kernels hand out.
sanitized() {
    env LD_PRELOAD="$preload" setarch -R "$python" "$@"
}

# sees REPORT CODE: the code, which makes a planted error, ends in this report.
sees() {
    sanitized -c "import numpy as np; from cattn._kernels import f32; $2" &> "$log/output" || true
    if ! grep -qE "$1" "$log"/*; then
        cat "$log"/*
        echo "$0: not reported: $2" >&2
        exit 1
    fi
    rm "$log"/*
}

# suite LEFT_OUT CHECK: for each instruction set, CHECK sees planted errors and the tests pass, but those LEFT_OUT;
# and no process that they started has left a report.
suite() {
    local isas isa other left_out
    isas=$(sanitized -c 'import cattn; print(*cattn.available_isas())')
    for isa in $isas; do
        # Type checkers over the sources, pictures by matplotlib, Sphinx: slow in here, and no kernel.
        left_out="test_types or plots or test_docs or $1"
        for other in $isas; do
            [ "$other" = "$isa" ] || left_out+=" or $other] or $other-"  # not as the beginning of another name
        done
        export CATTN_ISA=$isa
        "$2"
        sanitized -m pytest -q -s -x -p no:cacheprovider -k "not ($left_out)"
        if grep -qE "$reports" "$log"/* 2> /dev/null; then
            exit 1
        fi
        rm -f "$log"/*
    done
    unset CATTN_ISA
}

address() {
    build address,undefined
    preload="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)"
    # CPython's own allocator would hide its blocks, and what only they point to would look like a leak.
    export PYTHONMALLOC=malloc
    export ASAN_OPTIONS=abort_on_error=1:handle_segv=0:allocator_may_return_null=1:log_path=$log/asan
    export LSAN_OPTIONS=exitcode=0 UBSAN_OPTIONS=print_stacktrace=1
    # The first times the kernels. The next measure memory or limit it, and what is freed stays in quarantine for a while.
    # The next limit rights and hide /proc, and the sanitizers write files and read /proc. In a child of fork, nobody
    # releases the locks of their own malloc that another thread held.
    local left_out='flags_are_in_force'
    left_out+=' or no_page_more or eight_threads or scratch_stays_small or one_pool or last_blocks or first_calls_at_once'
    left_out+=' or behind_a_wall or without_preload or fork_while_others'
    suite "$left_out" sees_addresses
    unset PYTHONMALLOC
}

sees_addresses() {
    sees heap-buffer-overflow 'f32.read_past(np.ones(5, np.float32))'
    sees 'runtime error: signed integer overflow' 'f32.overflow(2**30)'
    sees "$leak" '[f32.leak(size) for size in range(1000, 1003)]'
}

thread() {
    LDFLAGS=-L$llvm build thread  # in there, libgomp.so is LLVM's
    preload=$(gcc -print-file-name=libtsan.so)
    export OMP_TOOL_LIBRARIES=$llvm/libarcher.so
    export OMP_WAIT_POLICY=passive  # tests have more threads than some machines CPUs
    export TSAN_OPTIONS=ignore_noninstrumented_modules=1:handle_segv=0:halt_on_error=1:allocator_may_return_null=1:log_path=$log/tsan
    # ThreadSanitizer allows no threads in a child of fork; calls_in_flight, in_a_child and behind_a_wall fork as well.
    # LLVM's OpenMP reads its environment otherwise than GCC's: OMP_NUM_THREADS=0 as 1, 2**31 (beyond int), limits, levels.
    local left_out='flags_are_in_force or fork or calls_in_flight or in_a_child or behind_a_wall'
    left_out+=' or nonsense_in_the_environment or odd_environments or environment_of_openmp or thread_limit'
    left_out+=' or test_environment and beyond'
    # It ends, or hangs, where it cannot start a thread; many keys are slow; and pages are ThreadSanitizer's, too.
    left_out+=' or too_few_threads or fewer_threads or one_pool or large_stacks or first_calls_at_once or last_blocks'
    left_out+=' or scratch_stays_small or each_call or streams_that_cannot'  # it dies without a standard output
    left_out+=' or test_ctrl_c and wide'  # between two looks for a signal there are seconds of such work, with SSE2
    suite "$left_out" sees_races
    unset OMP_TOOL_LIBRARIES OMP_WAIT_POLICY
}

sees_races() {
    sees 'ThreadSanitizer: data race' 'f32.race(np.zeros(1, np.intp))'
}

[ $# -gt 0 ] || set -- address thread
for part in "$@"; do
    case $part in
        address | thread) "$part" ;;
        *) echo "usage: $0 [address] [thread]" >&2; exit 2 ;;
    esac
    echo "$part: no report"
done
