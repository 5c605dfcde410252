#!/usr/bin/env bash
# Runs E2B's packages, unmodified, against a real daemon with real sandboxes, in a network of its
# own. The packages' versions are pinned; they are installed in target/e2b.
#
#   ./scripts/test-e2b.sh [PYTEST ARGUMENT...]
set -euo pipefail
cd "$(dirname "$0")/.."

tool=$PWD/target/e2b
packages="e2b==2.63.0 e2b-code-interpreter==2.11.5 pytest==9.0.1"
if [ "$(cat "$tool/packages" 2>/dev/null)" != "$packages" ]; then
    python3 -m venv "$tool"
    # shellcheck disable=SC2086
    "$tool/bin/pip" install --quiet $packages
    echo "$packages" >"$tool/packages"
fi
mkdir -p "$tool/js"
cp tests/e2b/package.json tests/e2b/*.test.js "$tool/js/"
if ! cmp --silent tests/e2b/package-lock.json "$tool/js/package-lock.json"; then
    cp tests/e2b/package-lock.json "$tool/js/"
    if ! (cd "$tool/js" && npm ci --no-fund --no-audit --silent); then
        rm "$tool/js/package-lock.json"
        exit 1
    fi
fi

if [ "$(id -u)" = 0 ] && [ -z "${HAS_OWN_NETWORK:-}" ]; then
    HAS_OWN_NETWORK=yes exec unshare --net sh -c 'ip link set lo up && exec "$0" "$@"' "$0" "$@"
fi
data=$(mktemp -d)
trap 'kill "${daemon:-0}" 2>/dev/null || true; ./scripts/end-vms.sh "$data"; rm -rf "$data"' EXIT
# With the template `code-interpreter-v1`. No daemon writes to a file of an image or a snapshot.
made=target/test-data-interpreter
cp -a --link $made/images $made/snapshots $made/templates "$data/"
rm -f "$data"/{images,templates}/.lock*
cp -a $made/state.db $made/secret.key $made/engine "$data/"
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
