#!/usr/bin/env bash
# Runs `make quickstart` three times on its own data directory and checks that a file in
# /workspace is still there: with the sandbox running, and with the sandbox stopped. Uses the
# images of target/test-data, so run `scripts/test-data.sh` first.
set -euo pipefail
cd "$(dirname "$0")/.."

data_dir=$(mktemp -d /tmp/bhatti-quickstart-XXXXXX)
export BHATTI_DATA_DIR=$data_dir
clean_up() {
    dist/bhatti --quiet destroy --yes dev >/dev/null 2>&1 || true
    if [ -s "$data_dir/daemon.lock" ]; then
        daemon=$(cat "$data_dir/daemon.lock")
        kill "$daemon" 2>/dev/null || true
        tail --pid="$daemon" -f /dev/null
    fi
    ./scripts/end-vms.sh "$data_dir"
    rm -rf "$data_dir"
}
trap clean_up EXIT
ln -s "$PWD/target/test-data/images" "$data_dir/images"

quickstart() {
    make --no-print-directory quickstart </dev/null >"$data_dir/output" 2>&1 && return
    echo "FAILED: make quickstart, $1"
    tail -n 40 "$data_dir/output" "$data_dir/serve.log"
    exit 1
}
expect() {
    local seen
    seen=$(dist/bhatti exec dev -- cat /workspace/kept)
    [ "$seen" = "$2" ] && return
    echo "FAILED: the file in /workspace is \`$seen\` instead of \`$2\` $1"
    exit 1
}

quickstart 'the first time'
grep -qx 42 "$data_dir/output" || { echo 'FAILED: make quickstart printed no 42'; exit 1; }
dist/bhatti exec dev -- sh -c 'echo one >/workspace/kept'
quickstart 'with the sandbox running'
expect 'after the second run' one
dist/bhatti exec dev -- sh -c 'echo two >/workspace/kept'
dist/bhatti stop dev >/dev/null
quickstart 'with the sandbox stopped'
expect 'after the third run' two
echo 'quickstart: ok, three runs kept the file in /workspace'
