#!/usr/bin/env bash
# Installs what the tests and the demo need and this machine does not have: a Redis (or Valkey)
# server, PostgreSQL, setpriv and a C linker. For Debian and Ubuntu; elsewhere it says what is missing.
#
#
#   install-servers.sh              for the demo and the benchmark
#   install-servers.sh pgbouncer    for the tests: PgBouncer, too
#
# It installs programs only. No service is started and no database cluster is created: the tests
# and the demo start private servers of their own.
set -euo pipefail

say() { printf 'install-servers: %s\n' "$*"; }
fail() { printf 'install-servers: %s\n' "$*" >&2; exit 1; }
have() { command -v "$1" >/dev/null 2>&1; }

have_redis() { have redis-server || have valkey-server; }

have_postgres() {
    local initdb
    if have initdb && have postgres; then return 0; fi
    # Debian and Ubuntu keep the server's programs off the PATH.
    for initdb in /usr/lib/postgresql/*/bin/initdb; do
        if [ -x "$initdb" ] && [ -x "${initdb%/initdb}/postgres" ]; then return 0; fi
    done
    return 1
}

missing=()
have_redis || missing+=(redis-server)
have_postgres || missing+=(postgresql)
have setpriv || missing+=(util-linux)
# Rust links with it, and one of the libraries compiles C.
have cc || missing+=(gcc libc6-dev)
if [ "${1:-}" = pgbouncer ]; then
    have pgbouncer || [ -x /usr/sbin/pgbouncer ] || missing+=(pgbouncer)
fi

if [ ${#missing[@]} -eq 0 ]; then
    say "nothing is missing"
    exit 0
fi

have apt-get || fail "missing: ${missing[*]}. There is no apt-get here; please install them and try again."

if [ "$(id -u)" -eq 0 ]; then
    as_root=(env DEBIAN_FRONTEND=noninteractive)
elif have sudo; then
    as_root=(sudo env DEBIAN_FRONTEND=noninteractive)
else
    fail "missing: ${missing[*]}. Installing them takes root or sudo; as root: apt-get install ${missing[*]}"
fi

say "installing ${missing[*]}"

policy=/usr/sbin/policy-rc.d
cluster_conf=/etc/postgresql-common/createcluster.conf
our_policy=no
our_cluster_conf=no

clean_up() {
    if [ "$our_policy" = yes ]; then "${as_root[@]}" rm -f "$policy"; fi
    if [ "$our_cluster_conf" = yes ]; then
        # The package puts its own version beside ours.
        if [ -e "$cluster_conf.ucf-dist" ]; then
            "${as_root[@]}" mv -f "$cluster_conf.ucf-dist" "$cluster_conf"
        else
            "${as_root[@]}" rm -f "$cluster_conf"
        fi
    fi
}
trap clean_up EXIT

# Packages ask policy-rc.d before they start a service; 101 means "no".
if [ ! -e "$policy" ]; then
    our_policy=yes
    printf '#!/bin/sh\nexit 101\n' | "${as_root[@]}" tee "$policy" >/dev/null
    "${as_root[@]}" chmod 755 "$policy"
fi

# The package postgresql creates a cluster unless this file says otherwise. The package's own
# version takes its place when we are done.
if ! have_postgres && [ ! -e "$cluster_conf" ]; then
    our_cluster_conf=yes
    "${as_root[@]}" mkdir -p "${cluster_conf%/*}"
    printf 'create_main_cluster = false\n' | "${as_root[@]}" tee "$cluster_conf" >/dev/null
fi

"${as_root[@]}" apt-get update -q
# The file above is ours although it belongs to a package: keep it without asking.
"${as_root[@]}" apt-get install -q -y --no-install-recommends -o Dpkg::Options::=--force-confold "${missing[@]}"

# The package also has its service started at every boot, on the port that everybody uses.
if [[ " ${missing[*]} " == *" redis-server "* ]] && have systemctl; then
    "${as_root[@]}" systemctl disable redis-server >/dev/null 2>&1 || say "redis-server starts at the next boot; disable it if you do not want that"
fi

if [[ " ${missing[*]} " == *" pgbouncer "* ]] && have systemctl; then
    "${as_root[@]}" systemctl disable pgbouncer >/dev/null 2>&1 || say "pgbouncer starts at the next boot; disable it if you do not want that"
fi

have_redis || fail "redis-server was installed, but neither redis-server nor valkey-server is found"
have_postgres || fail "postgresql was installed, but its initdb is not found"
have setpriv || fail "util-linux was installed, but setpriv is not found"
say "done"
