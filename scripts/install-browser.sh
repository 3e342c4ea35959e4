#!/usr/bin/env bash
# Installs Chromium for `make test-ui` where there is none. For Debian and its relatives; elsewhere it says what is missing.
set -euo pipefail

say() { printf 'install-browser: %s\n' "$*"; }
fail() { printf 'install-browser: %s\n' "$*" >&2; exit 1; }

have_browser() {
    local name
    for name in chromium chromium-browser google-chrome; do
        if command -v "$name" >/dev/null 2>&1; then return 0; fi
    done
    return 1
}

if have_browser; then
    say "nothing is missing"
    exit 0
fi

command -v apt-get >/dev/null 2>&1 || fail "no Chromium, and no apt-get to install it with; please install chromium and try again."

if [ "$(id -u)" -eq 0 ]; then
    as_root=(env DEBIAN_FRONTEND=noninteractive)
elif command -v sudo >/dev/null 2>&1; then
    as_root=(sudo env DEBIAN_FRONTEND=noninteractive)
else
    fail "no Chromium. Installing it takes root or sudo; as root: apt-get install chromium"
fi

say "installing chromium (about 400 MB), for this test alone"
"${as_root[@]}" apt-get update -q
"${as_root[@]}" apt-get install -q -y --no-install-recommends chromium
have_browser || fail "chromium was installed, but is not found"
say "done"
