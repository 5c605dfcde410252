#!/usr/bin/env bash
# From a fresh clone to a command in a microVM. Running it again takes seconds and keeps the sandbox
# `dev` with all its files.
#
# BHATTI_DATA_DIR names the data directory [default: /var/lib/bhatti for root, else
# ~/.local/share/bhatti].
set -euo pipefail
cd "$(dirname "$0")/.."

bhatti=$PWD/dist/bhatti
if [ -n "${BHATTI_DATA_DIR:-}" ]; then
    data_dir=$BHATTI_DATA_DIR
elif [ "$(id -u)" = 0 ]; then
    data_dir=/var/lib/bhatti
else
    data_dir=$HOME/.local/share/bhatti
fi
export BHATTI_DATA_DIR=$data_dir

step() {
    local title=$1 began ended
    shift
    began=$(date +%s%N)
    "$@"
    ended=$(date +%s%N)
    printf '%-42s %8.2f s\n' "$title" "$(((ended - began) / 10000000))e-2"
}

health() {
    "$bhatti" --json list >/dev/null 2>&1
}

start_daemon() {
    if health; then
        return
    fi
    mkdir -p -m 0700 "$data_dir"
    setsid "$bhatti" serve >>"$data_dir/serve.log" 2>&1 </dev/null &
    for _ in $(seq 500); do
        if health; then
            return
        fi
        sleep 0.02
    done
    echo "error: the daemon did not start; see $data_dir/serve.log" >&2
    exit 1
}

# Creates the sandbox `dev` unless it exists. Never destroys it: the disk belongs to the user.
create_sandbox() {
    "$bhatti" --quiet create --name dev --if-exists return >/dev/null
    if ! "$bhatti" --quiet start dev >/dev/null; then
        echo "error: the existing sandbox \`dev\` does not start; its disk is kept" >&2
        echo "hint: boot the sandbox from its disk: $bhatti start dev --cold-boot" >&2
        exit 1
    fi
}

step 'install packages' ./scripts/install-packages.sh
step 'build' make --no-print-directory build
step 'bhatti setup' "$bhatti" setup
step 'start the daemon' start_daemon
step 'bhatti create --name dev' create_sandbox
echo
echo "\$ bhatti exec dev -- uname -a"
step '' "$bhatti" exec dev -- uname -a
echo "\$ bhatti exec dev -- python3 -c 'print(6*7)'"
step '' "$bhatti" exec dev -- python3 -c 'print(6*7)'
cat <<TEXT

The sandbox \`dev\` is a virtual machine with a kernel of its own. Try:
  $bhatti exec dev -- cat /proc/cpuinfo
  tar c README.md | $bhatti exec dev -- tar xv -C /workspace
  $bhatti list
  $bhatti destroy dev
  $bhatti doctor
To have \`bhatti\` on your PATH: make install
To stop the daemon (its sandboxes keep running until they are destroyed):
  kill \$(cat $data_dir/daemon.lock)
TEXT
