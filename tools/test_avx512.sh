#!/usr/bin/env bash
# The AVX-512 build: the whole suite natively where the CPU has it. Elsewhere, or with --emulate, a selection of tests
# that reaches every kernel, in Bochs: an emulated PC that boots a kernel with Python, NumPy, pytest and the modules in
# its initramfs.
#
#     tools/test_avx512.sh [--emulate] [--cache FOLDER]
#
# On Debian 12, after: apt install debootstrap gcc python3-dev python3-pip; the emulator needs root (debootstrap, chroot).
set -euo pipefail
emulate=
cache=${TMPDIR:-/tmp}/cattn-avx512
while (($#)); do
    case $1 in
        --emulate) emulate=yes ;;
        --cache) cache=$2; shift ;;
        *) echo "usage: $0 [--emulate] [--cache FOLDER]" >&2; exit 2 ;;
    esac
    shift
done
mkdir -p "$cache"
cache=$(realpath "$cache")
cd "$(dirname "$0")/.."

site=$cache/site source=$cache/source
packages=(numpy 'Cython>=3.3' 'setuptools>=77.0.3' pytest hypothesis ml_dtypes gunicorn threadpoolctl)
if [[ $(cat "$site.done" 2> /dev/null) != "${packages[*]}" ]]; then
    rm -rf "$site"
    python3 -m pip install --target "$site" "${packages[@]}"
    echo "${packages[*]}" > "$site.done"
fi
export PYTHONPATH=$site
rm -rf "$source"/{cattn,tests,bench}
mkdir -p "$source"
git ls-files -z | xargs -0 cp -p --parents -t "$source"
cd "$source"
python3 setup.py build_ext --inplace

available=$(python3 -c 'import cattn; print(*cattn.available_isas())')
if [[ ! $emulate && " $available " == *" avx512 "* ]]; then
    echo "This CPU has AVX-512: the whole suite, natively, but for the pictures, which need matplotlib"
    for CATTN_ISA in avx512 avx512_intel avx512_skylake; do
        export CATTN_ISA
        python3 -m pytest -p no:cacheprovider --ignore=tests/test_plots.py --ignore=cattn/plots.py
    done
    exit
fi

# The emulator, a kernel and a boot loader, from Debian 13 (Bochs 3): unpacked only, no package is configured.
debian=$cache/debian
if [[ ! -e $debian.done ]]; then
    rm -rf "$debian"
    debootstrap --foreign --variant=minbase \
        --include=bochs,bochs-term,busybox-static,isolinux,linux-image-cloud-amd64,syslinux-common,xorriso \
        trixie "$debian" http://deb.debian.org/debian
    for package in "$debian"/var/cache/apt/archives/*.deb; do
        dpkg-deb --fsys-tarfile "$package" | tar -x -C "$debian" --keep-directory-symlink
    done
    touch "$debian.done"
fi

tests=(
    tests/test_kernels.py
    tests/test_attention.py::test_{dtypes,query_rows,keys,many_keys,head_dims,grouped_queries}
    tests/test_attention.py::test_{mask_dtypes,kv_lens,softcap,alibi,sinks,dropout_keeps_what_the_reference_keeps}
    tests/test_attention.py::test_{what_is_attended_goes_through,rows_that_see_nothing,some_rows_see_nothing}
    tests/test_attention.py::test_{every_half_is_read_in_keys_and_masks,results_are_rounded_to_nearest_even}
    tests/test_attention.py::test_{large_and_small_values,values_near_the_largest_number}
    tests/test_positional.py::test_{half_an_ulp,layouts_hold_the_same_columns,out}
)

# The guest sees this machine's Python, `site` and `source` at their own paths, and the libraries they load.
guest=$cache/guest iso=$debian/iso
rm -rf "$guest" "$iso"
mkdir -p "$guest"/{bin,dev,proc,sys,tmp} "$iso"
python=$(python3 -c 'import os, sys; print(os.path.realpath(sys.executable))')
stdlib=$(python3 -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')
tar -C / -c --exclude="${stdlib##*/}/site-packages" --exclude="${stdlib##*/}/test" --exclude='*/config-*' \
    --exclude='numpy/*/tests' --exclude=Cython --exclude=setuptools --exclude=build \
    "${python#/}" "${stdlib#/}" "${site#/}" "${source#/}" | tar -x -C "$guest"
{ find "$guest" -name '*.so*'; echo "$python"; } | xargs ldd | grep -o '/[^ :]*' | sort -u | grep -v "^$guest" |
    sed 's|^/||' | tar -C / -chT - | tar -x -C "$guest"
cp "$debian/usr/bin/busybox" "$guest/bin"
cat > "$guest/init" <<END
#!/bin/busybox sh
/bin/busybox mount -t proc none /proc
/bin/busybox mount -t sysfs none /sys
/bin/busybox mount -t devtmpfs none /dev
exec > /dev/ttyS0 2>&1
/bin/busybox grep -m1 'model name' /proc/cpuinfo
cd $source
export PYTHONPATH=$PYTHONPATH
for CATTN_ISA in avx512 avx512_intel avx512_skylake; do
    export CATTN_ISA
    $python -m pytest -p no:cacheprovider -q --color=no -k 'not avx2 and not baseline' ${tests[*]}
    echo "\$CATTN_ISA: pytest ended with status \$?"
done
/bin/busybox sleep 1
/bin/busybox poweroff -f
END
chmod +x "$guest/init"
(cd "$guest" && find . | "$debian/usr/bin/busybox" cpio -o -H newc > "$iso/initrd")
cp "$debian"/boot/vmlinuz-* "$iso/vmlinuz"
cp "$debian"/usr/lib/{ISOLINUX/isolinux.bin,syslinux/modules/bios/ldlinux.c32} "$iso"
echo "default vmlinuz initrd=initrd rdinit=/init console=ttyS0 quiet mitigations=off" > "$iso/isolinux.cfg"
chroot "$debian" xorriso -as mkisofs -quiet -o /boot.iso -b isolinux.bin -c boot.cat -no-emul-boot -boot-load-size 4 \
    -boot-info-table /iso
cat > "$debian/bochsrc" <<END
cpu: model=corei7_icelake_u, ips=100000000
memory: guest=1024, host=1024
romimage: file=/usr/share/bochs/BIOS-bochs-latest
vgaromimage: file=/usr/share/bochs/VGABIOS-lgpl-latest
ata0-master: type=cdrom, path=/boot.iso, status=inserted
boot: cdrom
com1: enabled=1, mode=file, dev=/serial
display_library: term
panic: action=fatal
log: /log
END
: > "$debian/serial"
tail -f "$debian/serial" &
trap 'kill $!' EXIT
# Bochs itself ends with status 1 when the guest turns off.
TERM=linux timeout 1h chroot "$debian" bochs -q -f /bochsrc < /dev/null > /dev/null || true
[[ $(grep -c ': pytest ended with status 0' "$debian/serial") == 3 ]]
