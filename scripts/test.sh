#!/usr/bin/env bash
# Installs what the tests need and runs all of them. What cannot run here says so at the end.
set -euo pipefail
cd "$(dirname "$0")/.."

./scripts/install-packages.sh test
# Some tests want a Docker, and none that is anybody's.
[ -n "${DOCKER_SOCK:-}" ] || exec ./scripts/with-docker.sh ./scripts/test.sh "$@"
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
# Once more on Docker, unless some tests were chosen.
if [ $# = 0 ] && [ -S "$DOCKER_SOCK" ]; then
    BHATTI_TEST_CONFIG="engine: docker,docker: $DOCKER_SOCK" \
        cargo nextest run --release --locked --workspace --profile ci \
        -E 'package(bhatti) & binary(~vm_) - binary(vm_docker)' || status=$?
elif [ $# = 0 ]; then
    echo "SKIPPED: the daemon's tests with engine docker, because no Docker runs here" >>target/skipped.txt
fi
cargo test --release --locked --workspace --doc --quiet || status=$?
./scripts/test-console.sh "$data_dir" || status=$?

if [ -s target/skipped.txt ]; then
    sort -u target/skipped.txt
fi
echo "skipped: $(sort -u target/skipped.txt 2>/dev/null | wc -l)"
exit "$status"
