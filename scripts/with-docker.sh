#!/usr/bin/env bash
# Runs a command with its own Docker daemon. DOCKER_SOCK names the daemon's socket. At the end, the
# script removes everything that the daemon made.
#
#   ./scripts/with-docker.sh COMMAND [ARGUMENT...]
#
# If Docker cannot run, DOCKER_SOCK names a socket that does not exist, and the tests report that.
set -euo pipefail

# In /tmp, because not every file system can hold container layers, and a socket's path must be
# short.
place=$(mktemp -d /tmp/bhatti-docker-XXXXXX)
export DOCKER_SOCK=$place/docker.sock
daemon=

clean_up() {
    if [ -n "$daemon" ]; then
        # Remove the containers that failed tests left. Ignore errors of a Docker that has ended.
        containers=$(docker --host "unix://$DOCKER_SOCK" ps --all --quiet || true)
        [ -z "$containers" ] || docker --host "unix://$DOCKER_SOCK" rm --force $containers >/dev/null || true
        kill "$daemon" || true
        wait "$daemon" || true
    fi
    rm -rf "$place"
}
trap clean_up EXIT

if [ "$(id -u)" = 0 ] && command -v dockerd >/dev/null; then
    # This Docker does not touch the machine's network: bhatti gives containers their networks.
    dockerd --data-root "$place/data" --exec-root "$place/exec" --pidfile "$place/pid" \
        --host "unix://$DOCKER_SOCK" --bridge none --iptables=false --ip6tables=false --ip-forward=false --ip-masq=false \
        >"$place/log" 2>&1 &
    daemon=$!
    for _ in $(seq 300); do
        docker --host "unix://$DOCKER_SOCK" version >/dev/null 2>&1 && break
        if ! kill -0 "$daemon" 2>/dev/null; then
            daemon=
            tail -3 "$place/log" >&2
            break
        fi
        sleep 0.1
    done
fi
"$@"
