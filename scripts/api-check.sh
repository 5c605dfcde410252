#!/usr/bin/env bash
# Checks the API's description with a public validator, and a real daemon with a real sandbox
# against the description, with thousands of requests of schemathesis, all of whose checks are on.
# The versions of both are pinned; they are installed in target/schemathesis. EXAMPLES is the number
# of requests for each operation and phase [default: 60], SEED repeats a choice of requests.
set -euo pipefail
cd "$(dirname "$0")/.."

tool=target/schemathesis
if ! [ -x "$tool/bin/schemathesis" ]; then
    python3 -m venv "$tool"
    "$tool/bin/pip" install --quiet schemathesis==4.32.5 openapi-spec-validator==0.9.0
fi

# The daemon gets a network of its own. Its resolver refuses at once: the requests name random
# hosts, and a resolver that does not answer is waited for.
if [ "$(id -u)" = 0 ] && [ -z "${HAS_OWN_NETWORK:-}" ]; then
    echo 'nameserver 127.0.0.1' >target/api-check-resolv.conf
    HAS_OWN_NETWORK=yes exec unshare --net --mount sh -c 'ip link set lo up &&
        mount --bind target/api-check-resolv.conf /etc/resolv.conf && exec ./scripts/api-check.sh'
fi

data=$(mktemp -d)
trap 'kill "${daemon:-0}" "${bridge:-0}" 2>/dev/null || true; ./scripts/end-vms.sh "$data"; rm -rf "$data"' EXIT
dist/bhatti setup --data-dir "$PWD/target/test-data" --no-template
# The requests make images.
cp -a target/test-data/images "$data/images"
printf 'proxy_timeout_sec: 2\n' >"$data/config.yaml"
dist/bhatti serve --data-dir "$data" 2>"$data/log" &
daemon=$!
until [ -S "$data/bhatti.sock" ]; do sleep 0.1; kill -0 "$daemon"; done
ask() { curl --silent --show-error --fail --unix-socket "$data/bhatti.sock" "$@" >/dev/null; }
ask -X POST http://x/sandboxes -d '{"name":"dev","keep_hot":true}'
ask -X POST http://x/sandboxes/dev/checkpoint -d '{"name":"snap"}'
ask -X POST http://x/templates -d '{"name":"tmpl"}'
ask -X POST http://x/users -d '{"name":"bob"}'

# Requests are the admin's, through a relay: schemathesis does not support Unix sockets. This
# listener needs no keys, so they are not in its description.
python3 scripts/tcp-to-unix.py "$data/bhatti.sock" "$data/port" &
bridge=$!
until [ -s "$data/port" ]; do sleep 0.1; kill -0 "$bridge"; done
"$tool/bin/openapi-spec-validator" docs/openapi.json
python3 - <<'PYTHON' docs/openapi.json >"$data/openapi.json"
import json, sys
api = json.load(open(sys.argv[1]))
del api["security"]
for path in api["paths"].values():
    for operation in path.values():
        operation.pop("security", None)
json.dump(api, sys.stdout)
PYTHON
cat >"$data/schemathesis.toml" <<'TOML'
[parameters]
"path.sandbox" = "dev"
"path.snapshot" = "snap"
"path.template" = "tmpl"
"path.user" = "bob"
"path.port" = 8000

# Failures of applications in the guest and a lack of the host's memory or disk space are not the
# daemon's fault.
[checks.not_a_server_error]
expected-statuses = ["1xx", "2xx", "3xx", "4xx", 502, 503, 504, 507]

# A description cannot say which users and programs the guest has, which environment variables are
# allowed, or which options exclude each other.
[[operations]]
include-path-regex = "/(exec|files|files/mkdir|files/rename)$"
checks.positive_data_acceptance.enabled = false

[[operations]]
include-path = "/templates"
checks.positive_data_acceptance.enabled = false

# These open a WebSocket, which needs further headers.
[[operations]]
include-path-regex = "/(ws|forward/\\{port\\})$"
checks.positive_data_acceptance.enabled = false

# The application answers.
[[operations]]
include-path-regex = "/proxy/"
checks.positive_data_acceptance.enabled = false
checks.negative_data_rejection.enabled = false
TOML
# Exclude requests that delete or stop the one sandbox that all other requests use, and requests
# that create VMs without limit, and streams without an end.
"$tool/bin/schemathesis" --config-file "$data/schemathesis.toml" run "$data/openapi.json" \
    --url "http://127.0.0.1:$(cat "$data/port")" --phases examples,coverage,fuzzing --max-examples "${EXAMPLES:-60}" \
    --exclude-path-regex '(checkpoint|fork|resume|pause|stop|start|rotate-key)$' --exclude-method DELETE --exclude-path /sandboxes \
    --exclude-path '/sandboxes/{sandbox}/tar' --exclude-path /images/import --exclude-path /images/build --exclude-path /templates/build \
    --exclude-path '/sandboxes/{sandbox}/files/watch' --request-timeout 30 --suppress-health-check all \
    --continue-on-failure ${SEED:+--seed "$SEED"}
if grep --quiet ERROR "$data/log"; then
    grep ERROR "$data/log"
    exit 1
fi
