#!/usr/bin/env bash
# cargo deny: licences, bans and sources of all dependencies from deny.toml, and known holes where the network lets us
# fetch their list. Part of make lint.
#
# cargo-deny takes minutes to build, so that it is not installed on the way: without it this says so and is content,
# unless DENY=required. `cargo install --locked cargo-deny` gets it.
set -euo pipefail
cd "$(dirname "$0")/.."

if ! cargo deny --version >/dev/null 2>&1; then
    echo "deny: SKIPPED, cargo-deny is not installed: cargo install --locked cargo-deny (DENY=required makes this an error)" >&2
    [ "${DENY:-}" != required ]
    exit
fi
cargo deny --locked --offline --all-features check --hide-inclusion-graph licenses bans sources
if timeout 60 cargo deny --locked fetch db >/dev/null 2>&1; then
    cargo deny --locked check --hide-inclusion-graph advisories
else
    echo "deny: advisories SKIPPED, their list cannot be fetched from here (DENY=required makes this an error)" >&2
    [ "${DENY:-}" != required ]
fi
