#!/usr/bin/env bash
# Tries the newest package of target/debian, or the one that is named, in a fresh Debian: installs it in a chroot, looks at
# what is there, purges it and looks for what is left; then boots that Debian in a container (systemd-nspawn, no network but
# its own loopback), where the units run against a Redis, a PostgreSQL and a simulated relay. It takes root.
#
#   LAB       the standpipe-lab whose relay it uses (target/release/standpipe-lab)
#   SUITE     the Debian release (bookworm)
#   MIRROR    where debootstrap gets it (http://deb.debian.org/debian)
#   FRESH     1 gets it anew; otherwise the one of the last time is copied, which was never run
#   SYSTEMD   no leaves out everything that takes a running systemd, and says so
set -euo pipefail
umask 022
cd "$(dirname "$0")/.."

suite=${SUITE:-bookworm}
mirror=${MIRROR:-http://deb.debian.org/debian}
base=$PWD/target/debian/$suite
passed=0
failed=0

say() { printf 'test-deb: %s\n' "$*"; }
fail() { printf 'test-deb: %s\n' "$*" >&2; exit 1; }
result() {
    if [ "$1" = ok ]; then passed=$((passed + 1)); else failed=$((failed + 1)); fi
    printf '%-4s  %s\n' "$1" "$2"
}
# check WHAT COMMAND...: passes when the command succeeds.
check() {
    local what=$1
    shift
    if "$@" >"$work/output" 2>&1; then result ok "$what"; else
        result FAIL "$what"
        sed 's/^/      /' "$work/output"
    fi
}

[ "$(id -u)" -eq 0 ] || fail "debootstrap and chroot take root"
if [ $# -gt 0 ]; then package=$1; else
    package=$(ls -t target/debian/standpipe_*.deb 2>/dev/null | head -n 1)
fi
[ -f "${package:-}" ] || fail "there is no package; make deb makes one"
lab=${LAB:-${CARGO_TARGET_DIR:-target}/release/standpipe-lab}
[ -x "$lab" ] || fail "there is no $lab; make build makes it"

missing=()
command -v debootstrap >/dev/null || missing+=(debootstrap)
[ "${SYSTEMD:-}" = no ] || command -v systemd-nspawn >/dev/null || missing+=(systemd-container)
if [ ${#missing[@]} -gt 0 ]; then
    command -v apt-get >/dev/null || fail "missing: ${missing[*]}"
    say "installing ${missing[*]}"
    apt-get update -q >/dev/null
    DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends "${missing[@]}" >/dev/null
fi

[ "${FRESH:-}" != 1 ] || rm -rf "$base"
if [ ! -e "$base.complete" ] || [ ! -d "$base" ]; then
    say "getting $suite"
    rm -rf "$base" "$base.complete"
    mkdir -p "$base"
    LC_ALL=C.UTF-8 debootstrap --variant=minbase \
        --include=adduser,ca-certificates,dbus,postgresql,redis-server,systemd,systemd-sysv \
        "$suite" "$base" "$mirror" >"$base.log" 2>&1 || { tail "$base.log" >&2; fail "debootstrap failed"; }
    touch "$base.complete"
fi

work=$(mktemp -d)
root=$(mktemp -d "$PWD/target/debian/test.XXXXXX")
container=""
clean_up() {
    if [ -n "$container" ] && kill "$container" 2>/dev/null; then wait "$container" || true; fi
    rm -rf "$work" "$root" "${root%/*}/.#${root##*/}.lck"
}
trap clean_up EXIT
cp -a --reflink=auto "$base/." "$root"
# debootstrap leaves the name and the nameservers of this machine.
printf 'tower\n' >"$root/etc/hostname"
mkdir "$root/test"
cp "$package" "$root/test/standpipe.deb"
# The simulated relay is not packed.
cp "$lab" "$root/test/standpipe-lab"
say "testing $package in $suite"

# ---------------------------------------------------------------------------------------------
# In a chroot

# DEBIAN_FRONTEND alone, as little as a package may count on.
inside() { chroot "$root" env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C.UTF-8 DEBIAN_FRONTEND=noninteractive "$@"; }
exits() { # exits CODE COMMAND...
    local expected=$1 code=0
    shift
    "$@" || code=$?
    [ "$code" -eq "$expected" ] || { echo "ended with $code instead of $expected"; return 1; }
}
# Everything that is there but what dpkg, apt and the tools for users note for themselves.
everything() {
    (cd "$root" && find . \( -path ./proc -o -path ./sys -o -path ./dev -o -path ./run -o -path ./test -o -path ./var/lib/dpkg \
        -o -path ./var/cache -o -path ./var/log -o -name 'passwd-' -o -name 'group-' -o -name '*shadow-' \) -prune \
        -o -printf '%y %m %U %G %p %l\n' | LC_ALL=C sort)
    inside cat /etc/passwd /etc/group /etc/shadow /etc/gshadow
}
is() { # is PATH "MODE OWNER:GROUP"
    local found
    found=$(inside stat --format='%a %U:%G' "$1")
    [ "$found" = "$2" ] || { echo "$1 is $found instead of $2"; return 1; }
}

everything >"$work/before"
check "installs with what the fresh system has" inside dpkg -i /test/standpipe.deb
check "needs no other library" bash -c "! chroot '$root' ldd /usr/bin/standpipe | grep 'not found'"
check "--version says the package's version" bash -c "
    version=\$(dpkg-deb -f '$package' Version)
    chroot '$root' /usr/bin/standpipe --version | grep -F \"standpipe \$(echo \"\${version%-*}\" | tr '~' -)\""
check "run with the settings as installed ends with 64: they name no database" exits 64 inside bash -c \
    'set -a; . /etc/standpipe/standpipe.env; standpipe run'
check "check with settings that cannot be used ends with 64" exits 64 inside env BATCH_SIZE=many standpipe check
check "check without servers ends with 69" exits 69 inside standpipe check
check "the program is root's, and everybody's to run" is /usr/bin/standpipe "755 root:root"
check "the settings are root's to write and standpipe's to read" is /etc/standpipe/standpipe.env "640 root:standpipe"
check "their folder is nobody else's to look into" is /etc/standpipe "750 root:standpipe"
check "the settings are a conffile" bash -c \
    "chroot '$root' dpkg-query -W -f '\${Conffiles}' standpipe | grep -q /etc/standpipe/standpipe.env"
check "the user is a system user without a shell or a home" bash -c "
    IFS=: read -r _ _ uid _ _ home shell < <(chroot '$root' getent passwd standpipe)
    [ \"\$uid\" -lt 1000 ] && [ \"\$home\" = /nonexistent ] && [ \"\$shell\" = /usr/sbin/nologin ]"
check "the user standpipe can read the settings" inside setpriv --reuid standpipe --regid standpipe --clear-groups \
    cat /etc/standpipe/standpipe.env
check "the user nobody cannot" exits 1 inside setpriv --reuid nobody --regid nogroup --clear-groups \
    cat /etc/standpipe/standpipe.env
check "the files are as they were packed" inside dpkg --verify standpipe
for unit in standpipe standpipe-reader standpipe-worker; do
    check "$unit.service is in order" inside systemd-analyze verify --man=no "/usr/lib/systemd/system/$unit.service"
done
for page in standpipe standpipe-run standpipe-check standpipe-dead-letters-list; do
    check "there is a manual page $page(1)" inside test -s "/usr/share/man/man1/$page.1.gz"
done
for file in bash-completion/completions/standpipe zsh/vendor-completions/_standpipe fish/vendor_completions.d/standpipe.fish; do
    check "there is $file" inside test -s "/usr/share/$file"
done
check "the completions of bash load" inside bash --norc -c \
    '. /usr/share/bash-completion/completions/standpipe && complete -p standpipe'
check "there are the licence and the runbook" inside test -s /usr/share/doc/standpipe/copyright -a \
    -s /usr/share/doc/standpipe/operations.md

# A setting of one's own, and permissions of one's own, outlive a new version.
printf 'BATCH_SIZE=100\n' >>"$root/etc/standpipe/standpipe.env"
check "installs again over itself" inside dpkg -i /test/standpipe.deb
check "changed settings stay" grep -q '^BATCH_SIZE=100$' "$root/etc/standpipe/standpipe.env"
check "so do their permissions" is /etc/standpipe/standpipe.env "640 root:standpipe"
printf 'DATABASE_URL=postgres://\n' >"$root/etc/standpipe/worker.env"
check "is removed" inside dpkg --remove standpipe
check "the settings outlive that" inside test -e /etc/standpipe/standpipe.env
check "is purged" inside dpkg --purge standpipe
everything >"$work/after"
check "nothing is left" diff "$work/before" "$work/after"

# ---------------------------------------------------------------------------------------------
# Under systemd

if [ "${SYSTEMD:-}" = no ]; then
    say "NOT TRIED: the units under a running systemd, against servers, and their removal while they run"
else
    install -m 755 scripts/test-deb-inside.sh "$root/test/inside.sh"
    cat >"$root/etc/systemd/system/test.service" <<'UNIT'
[Unit]
Description=Test of the package
After=postgresql.service redis-server.service
[Service]
Type=oneshot
ExecStart=/test/inside.sh
StandardOutput=file:/test/log
StandardError=file:/test/log
TimeoutStartSec=600
ExecStopPost=systemctl --no-block poweroff
[Install]
WantedBy=multi-user.target
UNIT
    inside systemctl --quiet enable test.service
    say "booting it"
    timeout 700 systemd-nspawn --quiet --directory "$root" --machine "standpipe-test-$$" --register=no --keep-unit \
        --private-network --console=pipe --boot </dev/null >"$work/boot" 2>&1 &
    container=$!
    wait "$container" || true
    container=""
    if [ ! -s "$root/test/results" ]; then
        tail -n 20 "$work/boot" "$root/test/log" >&2 || true
        fail "systemd did not come up in a container here; SYSTEMD=no leaves this part out"
    fi
    while read -r code what; do result "$code" "$what"; done <"$root/test/results"
    if grep -q '^FAIL' "$root/test/results" || [ ! -e "$root/test/complete" ]; then
        [ -e "$root/test/complete" ] || result FAIL "the tests in the container come to their end"
        sed 's/^/      /' "$root/test/log" | tail -n 200
    fi
fi

printf '%d passed, %d failed\n' "$passed" "$failed"
[ "$failed" -eq 0 ]
