#!/usr/bin/env bash
# Runs a command with a Docker of its own: DOCKER_SOCK names its socket, and what it made is gone at the end.
#
#   ./scripts/with-docker.sh COMMAND [ARGUMENT...]
#
# Where Docker cannot run, DOCKER_SOCK names a socket that is not there, and the tests say so.
set -euo pipefail

# Not on a file system that a container's layers cannot lie on, and short: a socket's path is.
place=$(mktemp -d /tmp/bhatti-docker-XXXXXX)
export DOCKER_SOCK=$place/docker.sock
daemon=

clean_up() {
    if [ -n "$daemon" ]; then
        # Whatever a test that failed has left. A Docker that has ended meanwhile has nothing to say.
        containers=$(docker --host "unix://$DOCKER_SOCK" ps --all --quiet || true)
        [ -z "$containers" ] || docker --host "unix://$DOCKER_SOCK" rm --force $containers >/dev/null || true
        kill "$daemon" || true
        wait "$daemon" || true
    fi
    rm -rf "$place"
}
trap clean_up EXIT

if [ "$(id -u)" = 0 ] && command -v dockerd >/dev/null; then
    # It has nothing to do with this machine's network: containers are given theirs by bhatti.
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
