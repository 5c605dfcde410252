#!/usr/bin/env bash
# Runs the conformance tests of every engine, on this machine where they can run and in the KVM
# lab, and prints a table of engines, tests and results. FIRECRACKER_BIN names the firecracker
# binary, with its jailer beside it [default: firecracker on PATH].
set -euo pipefail
cd "$(dirname "$0")/.."

./scripts/install-packages.sh test
data_dir=$PWD/target/test-data
mkdir -p "$data_dir"
dist/bhatti setup --data-dir "$data_dir" --no-template

[ -n "${DOCKER_SOCK:-}" ] || exec ./scripts/with-docker.sh ./scripts/test-engines.sh

firecracker=${FIRECRACKER_BIN:-$(command -v firecracker || true)}
results=$(mktemp)
trap 'rm -f "$results"' EXIT
status=0

# Prints the path of the test program of an engine.
program_of() {
    cargo test --locked --no-run --message-format=json -p "$1" --test vm_conformance 2>/dev/null |
        sed -n 's/.*"executable":"\([^"]*vm_conformance-[^"]*\)".*/\1/p' | tail -1
}

# note NAME: records the result of each test in the output of a run.
note() {
    sed -n "s/^test \([a-z_]*\) \.\.\. \(ok\|FAILED\)$/$1\t\1\t\2/p" >>"$results"
}

skip() {
    printf '%s\t(all)\tSKIPPED: %s, because %s\n' "$1" "$1" "$2" >>"$results"
}

in_lab() {
    local program=$1
    shift
    cargo xtask kvm-lab --with dist --with target/test-data/images --with crates/bhatti-testkit --with "$program" \
        "$@" -- "$program" --test-threads=1
}

qemu=$(program_of bhatti-qemu)
"$qemu" --test-threads=1 | tee -a /dev/stderr | note "qemu here" || status=1
if [ -r /dev/kvm ] && grep -qwE 'vmx|svm' /proc/cpuinfo; then
    lab=0
else
    lab=1
    in_lab "$qemu" | tee -a /dev/stderr | note "qemu, KVM in the lab" || status=1
fi
if [ -S "$DOCKER_SOCK" ]; then
    "$(program_of bhatti-docker)" --test-threads=1 | tee -a /dev/stderr | note "docker here" || status=1
else
    skip "docker engine" "no Docker runs here"
fi
if [ -z "$firecracker" ]; then
    skip "firecracker engine" "no firecracker binary was found"
else
    program=$(program_of bhatti-firecracker)
    if [ "$lab" = 1 ]; then
        in_lab "$program" --with "$firecracker" --with "$(dirname "$firecracker")/jailer" \
            --env "FIRECRACKER_BIN=$firecracker" | tee -a /dev/stderr |
            note "firecracker, KVM in the lab" || status=1
    else
        FIRECRACKER_BIN=$firecracker "$program" --test-threads=1 | tee -a /dev/stderr | note "firecracker here" || status=1
    fi
fi

echo
sort "$results" | awk -F'\t' '{ printf "%-30s %-62s %s\n", $1, $2, $3 }'
awk -F'\t' '$3 == "ok" { ok++ } $3 == "FAILED" { failed++ } $3 ~ /^SKIPPED/ { skipped++ }
    END { printf "passed: %d, failed: %d, skipped: %d\n", ok, failed, skipped }' "$results"
exit "$status"
