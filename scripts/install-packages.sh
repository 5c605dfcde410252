#!/usr/bin/env bash
# Installs the missing packages that bhatti needs on Debian 12, with apt. Needs root or sudo.
#
#   ./scripts/install-packages.sh         packages to run bhatti
#   ./scripts/install-packages.sh test    also packages for the tests
set -euo pipefail

readonly backports=bookworm-backports
readonly backports_list=/etc/apt/sources.list.d/bhatti-backports.list
readonly qemu_needed=10

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi
}

apt() {
    as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq -o Dpkg::Use-Pty=0 "$@" >/dev/null
}

has() {
    command -v "$1" >/dev/null || [ -x "/usr/sbin/$1" ] || [ -x "/sbin/$1" ]
}

qemu_major() {
    qemu-system-x86_64 --version 2>/dev/null | sed -n '1s/^QEMU emulator version \([0-9]*\).*/\1/p'
}

# QEMU and qemu-utils must come from one suite: installing one from another suite removes the other.
qemu_is_there() {
    local major
    major=$(qemu_major)
    [ "${major:-0}" -ge "$qemu_needed" ] && has qemu-img
}

# The mirror of Debian's archive that this machine uses already.
mirror() {
    apt-get indextargets --format '$(LABEL)|$(CODENAME)|$(REPO_URI)' 'Created-By: Packages' |
        awk -F'|' '$1 == "Debian" && $2 == "bookworm" { print $3; exit }'
}

kernel_is_known() {
    apt-cache madison linux-image-cloud-amd64 2>/dev/null | grep -q "$backports"
}

add_backports() {
    apt-get indextargets --format '$(CODENAME)' 'Created-By: Packages' | grep -qx "$backports" && return
    local uri
    uri=$(mirror)
    if [ -z "$uri" ]; then
        # apt reports no mirror if its package lists were never fetched or were deleted.
        apt update
        uri=$(mirror)
    fi
    if [ -z "$uri" ]; then
        echo "error: no mirror of Debian 12 (bookworm) is configured in apt" >&2
        exit 1
    fi
    echo "deb $uri $backports main" | as_root tee "$backports_list" >/dev/null
}

missing=()
need() {
    has "$1" || missing+=("$2")
}
need mmdebstrap mmdebstrap
need mke2fs e2fsprogs
need curl curl
need tar tar
need nft nftables
if [ "$(id -u)" != 0 ]; then
    # Without root, mmdebstrap and mke2fs work under these.
    need fakeroot fakeroot
    need fakechroot fakechroot
fi
if [ "${1:-}" = test ]; then
    need ps procps
    need unshare util-linux
    need ip iproute2
    need ping iputils-ping
    need age age
    need strace strace
    need tmux tmux
    need mkfs.xfs xfsprogs
    need dockerd docker.io
    need docker-registry docker-registry
    need skopeo skopeo
    need umoci umoci
    need busybox busybox-static
    need npm npm
    has chromium-browser || need chromium chromium
    python3 -c 'import ensurepip' 2>/dev/null || missing+=(python3-venv)
fi

if ! qemu_is_there || ! kernel_is_known || [ ${#missing[@]} -gt 0 ]; then
    add_backports
    apt update
fi
if ! qemu_is_there; then
    apt install -y --no-install-recommends -t "$backports" qemu-system-x86 qemu-utils
fi
if [ ${#missing[@]} -gt 0 ]; then
    apt install -y --no-install-recommends "${missing[@]}"
fi
