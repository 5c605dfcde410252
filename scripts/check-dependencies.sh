#!/usr/bin/env bash
# Checks licenses, sources and duplicate versions of dependencies with cargo-deny and deny.toml.
# With `advisories`, checks for known vulnerabilities instead, whose database is on the network.
set -euo pipefail
cd "$(dirname "$0")/.."

# Compiled without optimization: that is done in a fraction of the time, and it runs for seconds.
cargo deny --version >/dev/null 2>&1 || cargo install --quiet --debug --locked --no-default-features cargo-deny
if [ "${1:-}" = advisories ]; then
    cargo deny --locked check advisories
    exit
fi
cargo deny --locked check bans licenses sources
