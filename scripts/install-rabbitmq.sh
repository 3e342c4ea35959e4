#!/usr/bin/env bash
# Puts a RabbitMQ server into target/tools/rabbitmq, for the tests, and prints its path on the last line. For Debian and Ubuntu:
# it unpacks the packages and installs nothing, neither server nor service.
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf 'install-rabbitmq: %s\n' "$*"; }
fail() { printf 'install-rabbitmq: %s\n' "$*" >&2; exit 1; }

root="$PWD/target/tools/rabbitmq"
if [ -e "$root/unpacked" ]; then
    say "$root"
    exit 0
fi
command -v apt-get >/dev/null || fail "cannot get RabbitMQ's packages: there is no apt-get"

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
chmod 755 "$folder"
packages=(rabbitmq-server)
for name in asn1 base crypto eldap ftp inets mnesia os-mon parsetools public-key runtime-tools snmp ssl syntax-tools tftp tools xmerl; do
    packages+=("erlang-$name")
done
get() { (cd "$folder" && apt-get download -q "${packages[@]}" >"$folder/log" 2>&1); }
if ! get; then
    # A fresh machine has no package lists; only root may fetch them.
    if [ "$(id -u)" -eq 0 ]; then apt-get update -q >/dev/null 2>&1 || true; fi
    get || fail "RabbitMQ's packages cannot be downloaded ($(tail -1 "$folder/log")); as root: apt-get update"
fi
rm -rf "$root"
mkdir -p "$root"
for package in "$folder"/*.deb; do dpkg-deb -x "$package" "$root"; done
chmod -R a+rX "$root"
touch "$root/unpacked"
say "$root"
