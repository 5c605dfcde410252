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
# The image `dev` in a directory of its own: most tests have the minimal one alone.
dev_dir=$PWD/target/test-data-dev
if [ ! -e "$dev_dir/images/index.json" ]; then
    mkdir -p "$dev_dir"
    chmod 700 "$dev_dir"
    cp -a --link "$data_dir/images" "$dev_dir/"
    # The index is replaced, not written, so the other one stays as it is.
fi
dist/bhatti setup --dev --data-dir "$dev_dir" --no-template
# The base snapshot is made in a network namespace of its own: it configures bridges and nftables.
own_network=()
[ "$(id -u)" = 0 ] && own_network=(unshare --net)
"${own_network[@]}" dist/bhatti setup --data-dir "$data_dir"
