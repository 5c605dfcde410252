#!/usr/bin/env bash
# Installs the packages that the tests need and runs all tests. Prints the tests that cannot run
# here at the end, before the failed tests.
set -euo pipefail
cd "$(dirname "$0")/.."

./scripts/install-packages.sh test
# Some tests need a Docker daemon of their own, never the machine's.
[ -n "${DOCKER_SOCK:-}" ] || exec ./scripts/with-docker.sh ./scripts/test.sh "$@"
./scripts/test-data.sh
data_dir=$PWD/target/test-data
rm -f target/skipped.txt target/failed.txt

status=0
took=" programs and images $SECONDS s,"
# run NAME COMMAND...: runs one suite and records its failure for the summary.
run() {
    local name=$1 log=target/log-$1.txt code=0 start=$SECONDS
    shift
    "$@" 2>&1 | tee "$log" || code=$?
    took+=" $name $((SECONDS - start)) s,"
    [ "$code" = 0 ] && return
    status=$code
    ./scripts/failed-tests.sh "$name" "$log" >>target/failed.txt
}

run test-programs cargo nextest run --locked --workspace --profile ci --no-run
run tests cargo nextest run --locked --workspace --profile ci "$@"
# Run the daemon's tests again on Docker, unless the arguments select tests.
if [ $# = 0 ] && [ -S "$DOCKER_SOCK" ]; then
    BHATTI_TEST_CONFIG="engine: docker,docker: $DOCKER_SOCK" \
        run docker cargo nextest run --locked --workspace --profile ci \
        -E 'package(bhatti) & binary(~vm_) - binary(vm_docker)'
elif [ $# = 0 ]; then
    echo "SKIPPED: the daemon's tests with engine docker, because no Docker runs here" >>target/skipped.txt
fi
# The short form of `make power-loss`.
run power-loss cargo xtask power-loss --points 60 --starts 6 --seed 1
run doctests cargo test --locked --workspace --doc --quiet
run console ./scripts/test-console.sh "$data_dir"
# The short form of `make api-check`.
EXAMPLES=5 SEED=1 run api-check ./scripts/api-check.sh
run e2b ./scripts/test-e2b.sh
own_network=()
[ "$(id -u)" = 0 ] && own_network=(unshare --net)
run quickstart "${own_network[@]}" ./scripts/test-quickstart.sh

if [ -s target/skipped.txt ]; then
    sort -u target/skipped.txt
fi
if [ $# = 0 ]; then
    echo "left to make test-long: $(cargo nextest list --locked --workspace --profile long --message-format oneline 2>/dev/null | wc -l) tests"
fi
echo "took:${took%,}"
echo "skipped: $(sort -u target/skipped.txt 2>/dev/null | wc -l)"
# Print failures last, so that the end of a truncated log shows them.
if [ -s target/failed.txt ]; then
    cat target/failed.txt
fi
exit "$status"
