#!/usr/bin/env bash
# Kills the VMs of a data directory whose daemon has ended.
set -euo pipefail
directory=$1
for command_line in /proc/[0-9]*/cmdline; do
    if { tr '\0' ' ' <"$command_line"; } 2>/dev/null | grep --quiet "^qemu-system.*$directory/"; then
        kill -9 "$(basename "$(dirname "$command_line")")" 2>/dev/null || true
    fi
done
