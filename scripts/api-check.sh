#!/usr/bin/env bash
# Sends a real daemon with a real sandbox thousands of requests that the API's description allows,
# with schemathesis. No response may be a server error. The version of schemathesis is pinned; it
# is installed in target/schemathesis.
set -euo pipefail
cd "$(dirname "$0")/.."

tool=target/schemathesis
if ! [ -x "$tool/bin/schemathesis" ]; then
    python3 -m venv "$tool"
    "$tool/bin/pip" install --quiet schemathesis==4.32.5
fi

data=$(mktemp -d)
trap 'kill "${daemon:-0}" "${bridge:-0}" 2>/dev/null || true; ./scripts/end-vms.sh "$data"; rm -rf "$data"' EXIT
dist/bhatti setup --data-dir "$PWD/target/test-data" --no-template
ln -s "$PWD/target/test-data/images" "$data/images"
printf 'proxy_timeout_sec: 2\n' >"$data/config.yaml"
dist/bhatti serve --data-dir "$data" 2>"$data/log" &
daemon=$!
until [ -S "$data/bhatti.sock" ]; do sleep 0.1; kill -0 "$daemon"; done
ask() { curl --silent --show-error --fail --unix-socket "$data/bhatti.sock" "$@" >/dev/null; }
ask -X POST http://x/sandboxes -d '{"name":"dev","keep_hot":true}'
ask -X POST http://x/sandboxes/dev/checkpoint -d '{"name":"snap"}'
ask -X POST http://x/templates -d '{"name":"tmpl"}'
ask -X POST http://x/users -d '{"name":"bob"}'

# Requests are the admin's, through a relay: schemathesis does not support Unix sockets.
python3 scripts/tcp-to-unix.py "$data/bhatti.sock" "$data/port" &
bridge=$!
until [ -s "$data/port" ]; do sleep 0.1; kill -0 "$bridge"; done
cat >"$data/schemathesis.toml" <<'TOML'
[parameters]
"path.sandbox" = "dev"
"path.snapshot" = "snap"
"path.template" = "tmpl"
"path.user" = "bob"
"path.port" = 8000

# Failures of applications in the guest and a lack of free host memory are not the daemon's fault.
[checks.not_a_server_error]
expected-statuses = ["1xx", "2xx", "3xx", "4xx", 502, 503, 504]
TOML
# Exclude requests that delete or stop the one sandbox that all other requests use, and requests
# that create VMs without limit.
"$tool/bin/schemathesis" --config-file "$data/schemathesis.toml" run "http://127.0.0.1:$(cat "$data/port")/openapi.json" \
    --url "http://127.0.0.1:$(cat "$data/port")" --checks not_a_server_error --phases examples,coverage,fuzzing --max-examples 60 \
    --exclude-path-regex '(checkpoint|fork|resume|pause|stop|start|rotate-key)$' --exclude-method DELETE --exclude-path /sandboxes \
    --exclude-path '/sandboxes/{sandbox}/tar' --request-timeout 30 --suppress-health-check all --continue-on-failure
if grep --quiet ERROR "$data/log"; then
    grep ERROR "$data/log"
    exit 1
fi
