#!/usr/bin/env bash
# Makes the missing inputs of tests and benchmarks: packages, the programs in dist/, and images
# and base snapshots in target/test-data. Running it again takes seconds.
set -euo pipefail
cd "$(dirname "$0")/.."

./scripts/install-packages.sh test
cargo nextest --version >/dev/null 2>&1 || cargo install --locked cargo-nextest
make --no-print-directory build
mkdir -p target/test-data
data_dir=$PWD/target/test-data
dist/bhatti setup --data-dir "$data_dir" --no-template
./scripts/hostile-module.sh "$data_dir"
# Further images have their own data directories, because most tests use only the minimal image. The
# images are built in parallel.
kernel_of() {
    grep -o '"kernel-[^"]*"' "$1/images/index.json" 2>/dev/null || true
}
with_images() {
    # Make the images again if they have another kernel.
    if [ "$(kernel_of "$1")" != "$(kernel_of "$data_dir")" ]; then
        rm -rf "$1/images"
        mkdir -p "$1"
        chmod 700 "$1"
        # Setup replaces the index file instead of writing to it, so the linked original stays as
        # it is.
        cp -a --link "$data_dir/images" "$1/"
        # Each directory needs its own lock file, so that both images can be built at once.
        rm -f "$1/images/.lock"
    fi
}
dev_dir=$PWD/target/test-data-dev
with_images "$dev_dir"
dist/bhatti setup --dev --data-dir "$dev_dir" --no-template &
dev_build=$!
builder_dir=$PWD/target/test-data-builder
with_images "$builder_dir"
dist/bhatti setup --builder --data-dir "$builder_dir" --no-template &
builder_build=$!
interpreter_dir=$PWD/target/test-data-interpreter
with_images "$interpreter_dir"
dist/bhatti setup --code-interpreter --data-dir "$interpreter_dir" --no-template &
interpreter_build=$!
trap 'kill "$dev_build" "$builder_build" "$interpreter_build" 2>/dev/null || true; wait' EXIT
containers_dir=$PWD/target/test-data-containers
with_images "$containers_dir"
# The tests' certificate authority, which this image trusts, and a server certificate that it signs.
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
# `setup --ca-certificate` would put the certificate here, but also rebuild the minimal image.
install -D -m 0644 "$tls/ca.pem" "$containers_dir/images/ca-certificates/tests.crt"
dist/bhatti image build -t containers --data-dir "$containers_dir" -p docker.io -p podman -p uidmap -p slirp4netns \
    -p busybox-static
wait "$dev_build"
wait "$builder_build"
wait "$interpreter_build"
trap - EXIT
# Run setup in a network namespace of its own: making the base snapshot configures bridges and
# nftables.
own_network=()
[ "$(id -u)" = 0 ] && own_network=(unshare --net)
"${own_network[@]}" dist/bhatti setup --data-dir "$data_dir"
# The template `code-interpreter-v1`, made again if its parts have changed.
parts=$(cat dist/lohar "$interpreter_dir/images/index.json" crates/bhatti/src/commands/setup/interpreter.rs \
    crates/bhatti/interpreter/bhatti_interpreter/*.* | sha256sum)
if [ "$(cat "$interpreter_dir/parts" 2>/dev/null)" != "$parts" ]; then
    find "$interpreter_dir" -mindepth 1 -maxdepth 1 -not -name images -exec rm -rf {} +
    "${own_network[@]}" dist/bhatti setup --code-interpreter --data-dir "$interpreter_dir"
    echo "$parts" >"$interpreter_dir/parts"
fi
