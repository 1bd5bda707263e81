#!/usr/bin/env bash
# The aarch64 build: cross-compiled, then tested under qemu-user.
#
#     tools/test_aarch64.sh [--cache FOLDER] [pytest's arguments]
#
# On Debian 12, as root (debootstrap), after: apt install debootstrap gcc-aarch64-linux-gnu qemu-user-static python3-pip
set -euo pipefail
cache=${TMPDIR:-/tmp}/cattn-aarch64
if [[ ${1-} == --cache ]]; then
    cache=$2
    shift 2
fi
mkdir -p "$cache"
cache=$(realpath "$cache")
cd "$(dirname "$0")/.."

# Python and what it links to, unpacked only: no package is configured, so nothing runs as arm64 outside the emulator.
root=$cache/root
if [[ ! -e $root.done ]]; then
    rm -rf "$root"
    debootstrap --arch=arm64 --foreign --variant=minbase --include=python3,libpython3.11-dev,libgomp1,libstdc++6 \
        bookworm "$root" http://deb.debian.org/debian
    for package in "$root"/var/cache/apt/archives/*.deb; do
        dpkg-deb --fsys-tarfile "$package" | tar -x -C "$root" --keep-directory-symlink
    done
    touch "$root.done"
fi
site=$cache/site
packages=(numpy 'Cython>=3.3' 'setuptools>=77.0.3' pytest pytest-xdist hypothesis ml_dtypes gunicorn threadpoolctl)
if [[ $(cat "$site.done" 2> /dev/null) != "${packages[*]}" ]]; then
    rm -rf "$site"
    python3 -m pip install --target "$site" --python-version 3.11 --only-binary=:all: \
        --platform manylinux_2_28_aarch64 --platform manylinux_2_17_aarch64 "${packages[@]}"
    echo "${packages[*]}" > "$site.done"
fi

# A command, so that tests can start it as sys.executable; with -L the emulated Python finds its files in $root first.
python=$cache/python
cat > "$python" <<END
#!/bin/sh
exec qemu-aarch64-static -L "$root" -0 "\$0" "$root/usr/bin/python3.11" "\$@"
END
chmod +x "$python"
export PYTHONPATH=$site

# setup.py in the emulated Python believes itself on aarch64; the compiler it starts runs natively.
source=$cache/source
rm -rf "$source"/{cattn,tests,bench}
mkdir -p "$source"
git ls-files -z | xargs -0 cp -p --parents -t "$source"
cd "$source"
CC=aarch64-linux-gnu-gcc CFLAGS="-I$root/usr/include/python3.11 -idirafter $root/usr/include" \
    "$python" setup.py build_ext --inplace
# The benchmark, the demo and the pictures add nothing that depends on the CPU. Limits of memory would be the
# emulator's, the C compiler is this machine's, and signals wait for the emulator.
"$python" -m pytest -p no:cacheprovider -n auto --ignore=tests/test_bench.py --ignore=tests/test_minilm.py \
    --ignore=tests/test_plots.py --ignore=cattn/plots.py --ignore=tests/test_memory.py \
    --ignore=tests/test_interrupt.py \
    --deselect=tests/test_fork.py::test_openmp_that_cannot_dissolve_its_pool "$@"
