#!/usr/bin/env bash
# Tests the web console in a real browser against the program in dist/, in its own
# network namespace.
#
#   ./scripts/test-console.sh DATA_DIR      a data directory that `bhatti setup` has filled
#
# Leaves screenshots in target/console.
set -euo pipefail
cd "$(dirname "$0")/.."

data_dir=$(realpath "$1")
chromium=$(command -v chromium || command -v chromium-browser)
own_network=()
[ "$(id -u)" = 0 ] && own_network=(unshare --net)

cd web
npm ci --no-fund --no-audit --silent
npm run --silent check
made=$(mktemp -d)
trap 'rm -rf "$made"' EXIT
npm run --silent build -- "$made"
if ! diff -rq "$made" ../crates/bhatti-server/console; then
    echo "error: crates/bhatti-server/console does not match the build of web/: run \`npm ci && npm run build\` in web/, then \`make build\`" >&2
    exit 1
fi
export BHATTI=$PWD/../dist/bhatti BHATTI_DATA=$data_dir CHROMIUM=$chromium SCREENSHOTS=$PWD/../target/console
"${own_network[@]}" sh -c 'ip link set lo up 2>/dev/null; exec npm run --silent test'
