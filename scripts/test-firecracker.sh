#!/usr/bin/env bash
# Runs the daemon's tests on Firecracker, on this machine or, without KVM, in the KVM lab. Arguments
# select test programs, such as `vm_network` [default: all]. FIRECRACKER_BIN names the firecracker
# binary, with its jailer beside it [default: firecracker on PATH].
set -euo pipefail
cd "$(dirname "$0")/.."

firecracker=${FIRECRACKER_BIN:-$(command -v firecracker || true)}
if [ -z "$firecracker" ]; then
    echo "SKIPPED: firecracker engine, because no firecracker binary was found"
    echo "skipped: 1"
    exit 0
fi
./scripts/install-packages.sh test
mkdir -p target/test-data
dist/bhatti setup --data-dir "$PWD/target/test-data" --no-template

# All VM test programs except those for a single engine and the conformance suites.
programs=$(cargo test --locked --no-run --message-format=json --workspace 2>/dev/null |
    sed -n 's/.*"executable":"\([^"]*\/vm_[a-z]*-[0-9a-f]*\)".*/\1/p' | grep -vE '/vm_(docker|guest|conformance)-' | sort -u)
[ $# = 0 ] || programs=$(grep -E "/($(IFS='|' && echo "$*"))-" <<<"$programs")
# Beginnings of the names of skipped tests. These tests build images, or look for the tools that
# this needs. Building images is the same on every engine, and needs Debian's archive.
left_out=(image_is image_trusts docker_and_podman doctor_finds)
is_lab=true
if [ -r /dev/kvm ] && grep -qwE 'vmx|svm' /proc/cpuinfo; then
    is_lab=false
else
    left_out+=(large_file)
    echo "SKIPPED: large_file_goes_up_and_down_in_constant_memory with engine firecracker, because the lab, emulated twice, moves a MiB in a second"
fi
run=$(mktemp -p target --suffix .sh)
trap 'rm -f "$run"' EXIT
{
    echo 'status=0'
    for program in $programs; do
        echo "echo '# $(basename "$program")'; '$program' --test-threads=${TEST_THREADS:-1} ${left_out[*]/#/--skip } || status=1"
    done
    echo 'cat target/skipped.txt 2>/dev/null | sort -u; exit "$status"'
} >"$run"

config="engine: firecracker,firecracker: $firecracker,boot_timeout_sec: 180"
if ! "$is_lab"; then
    BHATTI_TEST_CONFIG=$config bash "$run"
    exit
fi
carried=()
# The daemon into which tests inject faults.
faulty=$(dirname "$(dirname "$(head -n 1 <<<"$programs")")")/bhatti
for path in dist "$faulty" target/test-data/images "$run" crates/bhatti-testkit crates/bhatti "$firecracker" "$(dirname "$firecracker")/jailer" $programs; do
    carried+=(--with "$path")
done
cargo xtask kvm-lab "${carried[@]}" --env "BHATTI_TEST_CONFIG=$config" --env "TMPDIR=$PWD/target" \
    --env "INSTA_WORKSPACE_ROOT=$PWD" -- bash "$run"
