#!/usr/bin/env bash
# Installs what the tests need and runs all of them. What cannot run here says so at the end.
set -euo pipefail
cd "$(dirname "$0")/.."

./scripts/install-packages.sh test
cargo nextest --version >/dev/null 2>&1 || cargo install --locked cargo-nextest
make --no-print-directory build
mkdir -p target/test-data
data_dir=$PWD/target/test-data
dist/bhatti setup --data-dir "$data_dir" --no-template
# What touches a network runs in one of its own.
own_network=()
[ "$(id -u)" = 0 ] && own_network=(unshare --net)
"${own_network[@]}" dist/bhatti setup --data-dir "$data_dir"
rm -f target/skipped.txt

status=0
cargo nextest run --release --locked --workspace --profile ci "$@" || status=$?
cargo test --release --locked --workspace --doc --quiet || status=$?
./scripts/test-console.sh "$data_dir" || status=$?

if [ -s target/skipped.txt ]; then
    sort -u target/skipped.txt
fi
echo "skipped: $(sort -u target/skipped.txt 2>/dev/null | wc -l)"
exit "$status"
