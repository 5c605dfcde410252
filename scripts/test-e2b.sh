#!/usr/bin/env bash
# Runs E2B's packages, unmodified, against a real daemon with real sandboxes, in a network of its
# own. The packages' versions are pinned; they are installed in target/e2b.
#
#   ./scripts/test-e2b.sh [PYTEST ARGUMENT...]
set -euo pipefail
cd "$(dirname "$0")/.."

tool=$PWD/target/e2b
if ! [ -x "$tool/bin/pytest" ]; then
    python3 -m venv "$tool"
    "$tool/bin/pip" install --quiet e2b==2.63.0 pytest==9.0.1
fi
mkdir -p "$tool/js"
cp tests/e2b/package.json tests/e2b/package-lock.json tests/e2b/sdk.test.js "$tool/js/"
(cd "$tool/js" && npm ci --no-fund --no-audit --silent)

if [ "$(id -u)" = 0 ] && [ -z "${HAS_OWN_NETWORK:-}" ]; then
    HAS_OWN_NETWORK=yes exec unshare --net sh -c 'ip link set lo up && exec "$0" "$@"' "$0" "$@"
fi
data=$(mktemp -d)
trap 'kill "${daemon:-0}" 2>/dev/null || true; ./scripts/end-vms.sh "$data"; rm -rf "$data"' EXIT
dist/bhatti setup --data-dir "$PWD/target/test-data" --no-template
cp -a target/test-data/images "$data/images"
printf 'listen: 127.0.0.1:7070\n' >"$data/config.yaml"
dist/bhatti serve --data-dir "$data" 2>"$data/log" &
daemon=$!
until [ -S "$data/bhatti.sock" ]; do sleep 0.1; kill -0 "$daemon"; done
key=$(dist/bhatti --data-dir "$data" user create alice | grep --only-matching 'bht_[0-9a-f]*')
export E2B_API_KEY=e2b_${key#bht_} E2B_API_URL=http://127.0.0.1:7070 E2B_SANDBOX_URL=http://127.0.0.1:7070
status=0
"$tool/bin/pytest" -q -p no:cacheprovider tests/e2b "$@" || status=$?
(cd "$tool/js" && npm test --silent) || status=$?
if grep --quiet ERROR "$data/log"; then
    grep ERROR "$data/log"
    status=1
fi
exit "$status"
