#!/usr/bin/env bash
# Makes what tests and benchmarks need, where it is missing: packages, the programs in dist/, and images and base snapshots in
# target/test-data. Running it again takes seconds.
set -euo pipefail
cd "$(dirname "$0")/.."

./scripts/install-packages.sh test
cargo nextest --version >/dev/null 2>&1 || cargo install --locked cargo-nextest
make --no-print-directory build
mkdir -p target/test-data
data_dir=$PWD/target/test-data
dist/bhatti setup --data-dir "$data_dir" --no-template
./scripts/hostile-module.sh "$data_dir"
# Further images have directories of their own: most tests have the minimal one alone. Each is built beside the other.
kernel_of() {
    grep -o '"kernel-[^"]*"' "$1/images/index.json" 2>/dev/null || true
}
with_images() {
    # One with another kernel is made anew.
    if [ "$(kernel_of "$1")" != "$(kernel_of "$data_dir")" ]; then
        rm -rf "$1/images"
        mkdir -p "$1"
        chmod 700 "$1"
        # The index is replaced, not written, so the other one stays as it is.
        cp -a --link "$data_dir/images" "$1/"
        # A lock of its own, so that both can be built at once.
        rm -f "$1/images/.lock"
    fi
}
dev_dir=$PWD/target/test-data-dev
with_images "$dev_dir"
dist/bhatti setup --dev --data-dir "$dev_dir" --no-template &
dev_build=$!
trap 'kill "$dev_build" 2>/dev/null || true; wait' EXIT
containers_dir=$PWD/target/test-data-containers
with_images "$containers_dir"
# An authority of the tests' own, which this image trusts, and a server's certificate by it.
tls=$containers_dir/tls
if [ ! -e "$tls/server.pem" ]; then
    mkdir -p "$tls"
    openssl req -x509 -newkey rsa:2048 -nodes -days 3650 -subj "/CN=Authority of bhatti's tests" \
        -keyout "$tls/ca.key" -out "$tls/ca.pem" 2>/dev/null
    openssl req -newkey rsa:2048 -nodes -subj /CN=localhost -keyout "$tls/server.key" -out "$tls/server.csr" 2>/dev/null
    openssl x509 -req -in "$tls/server.csr" -CA "$tls/ca.pem" -CAkey "$tls/ca.key" -CAcreateserial -days 3650 \
        -extfile <(echo subjectAltName=DNS:localhost) -out "$tls/server.crt" 2>/dev/null
    cat "$tls/server.crt" "$tls/server.key" >"$tls/server.pem"
fi
# Where `setup --ca-certificate` puts it. That would make the minimal image anew, too.
install -D -m 0644 "$tls/ca.pem" "$containers_dir/images/ca-certificates/tests.crt"
dist/bhatti image build containers --data-dir "$containers_dir" -p docker.io -p podman -p uidmap -p slirp4netns \
    -p busybox-static
wait "$dev_build"
trap - EXIT
# The base snapshot is made in a network namespace of its own: it configures bridges and nftables.
own_network=()
[ "$(id -u)" = 0 ] && own_network=(unshare --net)
"${own_network[@]}" dist/bhatti setup --data-dir "$data_dir"
