#!/usr/bin/env bash
# Puts promtool into target/tools unless there is one on the PATH, and says on its last line where it is. For Debian and
# Ubuntu: it takes the program out of the package prometheus and installs nothing, neither server nor service.
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf 'install-promtool: %s\n' "$*"; }
fail() { printf 'install-promtool: %s\n' "$*" >&2; exit 1; }

tools="$PWD/target/tools"
if found=$(command -v promtool); then
    say "$found"
    exit 0
fi
if [ -x "$tools/promtool" ]; then
    say "$tools/promtool"
    exit 0
fi
command -v apt-get >/dev/null || fail "there is no promtool and no apt-get here; install Prometheus's promtool"

mkdir -p "$tools"
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
chmod 755 "$folder"
get() { (cd "$folder" && apt-get download -q prometheus >/dev/null 2>&1); }
if ! get; then
    # A fresh machine has no lists of packages; only root may fetch them.
    if [ "$(id -u)" -eq 0 ]; then apt-get update -q >/dev/null 2>&1 || true; fi
    get || fail "the package prometheus, which holds promtool, cannot be downloaded; as root: apt-get update"
fi
dpkg-deb --fsys-tarfile "$folder"/prometheus_*.deb | tar -x -C "$folder" ./usr/bin/promtool
install -m 755 "$folder/usr/bin/promtool" "$tools/promtool"
say "$tools/promtool"
