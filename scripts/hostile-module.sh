#!/usr/bin/env bash
# Builds the kernel module of the tests' hostile guest (crates/bhatti/tests/guest/hostile.c) for the
# kernel that sandboxes boot:
#
#   ./scripts/hostile-module.sh DATA_DIR    writes DATA_DIR/hostile.ko, unless it is up to date
set -euo pipefail
cd "$(dirname "$0")/.."
data_dir=$1
source=crates/bhatti/tests/guest/hostile.c

kernel=$(grep -o '"package linux-image-[^"]*' "$data_dir/images/index.json" | cut -d' ' -f2,3)
version=${kernel#* }
release=${kernel% *}
release=${release#linux-image-}
made_of="$kernel $(sha256sum <"$source")"
if [ "$(cat "$data_dir/hostile.made-of" 2>/dev/null)" = "$made_of" ]; then
    exit 0
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
headers=linux-headers-$release
# The headers that all flavors share and the programs that build modules are separate packages.
others=$(apt-cache show "$headers=$version" | sed -n 's/^Depends: //p' | tr ',' '\n' |
    grep -o 'linux-headers-[^ ]*-common\|linux-kbuild-[^ ]*' | sort -u)
(
    cd "$work"
    # shellcheck disable=SC2086
    apt-get download -qq "$headers=$version" $others 2>/dev/null
    for package in *.deb; do
        dpkg-deb -x "$package" root
    done
)
sed -i "s|/usr/src/|$work/root/usr/src/|" "$work/root/usr/src/$headers/Makefile"
mkdir "$work/module"
cp "$source" "$work/module/"
echo 'obj-m := hostile.o' >"$work/module/Makefile"
# Build without BTF type information: it needs pahole, and nothing here reads it.
make -s -C "$work/root/usr/src/$headers" M="$work/module" CONFIG_DEBUG_INFO_BTF_MODULES= modules >"$work/log" 2>&1 || {
    cat "$work/log" >&2
    exit 1
}
strip --strip-debug "$work/module/hostile.ko"
cp "$work/module/hostile.ko" "$data_dir/"
echo "$made_of" >"$data_dir/hostile.made-of"
