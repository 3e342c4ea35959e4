#!/usr/bin/env bash
# The part of test-deb.sh that runs in the container, under systemd. One line for each check goes to /test/results, and
# everything else to the log.
set -uo pipefail
export PATH=/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C.UTF-8 DEBIAN_FRONTEND=noninteractive

settings=/etc/standpipe/standpipe.env
check() { # check WHAT COMMAND...
    local what=$1 code=ok
    shift
    printf -- '--- %s\n' "$what"
    "$@" || code=FAIL
    echo "$code $what" | tee -a /test/results
}
# within SECONDS COMMAND...: succeeds as soon as the command does.
within() {
    local end=$((SECONDS + $1))
    shift
    until "$@" >/dev/null 2>&1; do
        [ "$SECONDS" -lt "$end" ] || { "$@"; return 1; }
        sleep 0.5
    done
}
property() { systemctl show --property="$2" --value "$1"; }
property_is() {
    local value
    value=$(property "$1" "$2")
    [ "$value" = "$3" ] || { echo "$1: $2 is $value instead of $3"; return 1; }
}
healthy() { env -i HTTP_ADDR="127.0.0.1:${1:-9464}" standpipe healthcheck; }
query() { runuser -u postgres -- psql -X -q -A -t -d "${2:-standpipe}" -c "$1"; }
posts() { query 'SELECT count(*) FROM posts'; }
grows() { local before; before=$(posts) && within 20 more_than "$before"; }
more_than() { [ "$(posts)" -gt "$1" ]; }
# As docs/install.md says it.
with_settings() {
    systemd-run --pipe --wait --quiet --collect --uid=standpipe --property=EnvironmentFile=$settings standpipe "$@"
}
get() { # get PORT PATH
    exec 3<>"/dev/tcp/127.0.0.1/$1" || return 1
    printf 'GET %s HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n' "$2" >&3
    cat <&3
    exec 3>&-
}

within 60 runuser -u postgres -- psql -c 'SELECT 1' || echo "PostgreSQL does not come up"
within 60 redis-cli ping || echo "Redis does not come up"

check "systemd: installs" dpkg -i /test/standpipe.deb
check "systemd: is not started before it is configured" property_is standpipe ActiveState inactive
check "systemd: is not enabled" property_is standpipe UnitFileState disabled

# The settings as installed name no database.
systemctl start standpipe
check "systemd: settings that cannot be used end it with 64" within 10 property_is standpipe ExecMainStatus 64
check "systemd: and it has failed" within 10 property_is standpipe ActiveState failed
sleep 7
check "systemd: and is not started again" property_is standpipe NRestarts 0
check "systemd: and the journal says what is wrong" bash -c \
    'journalctl --sync; journalctl --no-pager --unit standpipe | grep DATABASE_URL'

query "CREATE ROLE standpipe LOGIN PASSWORD 'secret'" postgres
query "CREATE DATABASE standpipe OWNER standpipe ENCODING 'UTF8' TEMPLATE template0" postgres
systemd-run --quiet --unit=relay /test/standpipe-lab simulate --listen 127.0.0.1:2470 --rate 200
cat >>$settings <<'SETTINGS'
RELAY_URL=ws://127.0.0.1:2470
PLC_URL=http://127.0.0.1:2470
ALLOW_PRIVATE_ADDRESSES=true
REDIS_URL=redis://127.0.0.1:6379
DATABASE_URL=postgres://standpipe:secret@127.0.0.1:5432/standpipe
LOG_LEVEL=DEBUG
SETTINGS
check "systemd: standpipe check is content" with_settings check

systemctl reset-failed standpipe
check "systemd: is enabled and started" systemctl enable --now standpipe
check "systemd: gets ready" within 60 healthy
check "systemd: writes rows" grows
pid=$(property standpipe MainPID)
check "systemd: runs as standpipe" test "$(stat --format=%U:%G "/proc/$pid")" = standpipe:standpipe
check "systemd: has no capabilities" grep -qE '^CapBnd:\s*0+$' "/proc/$pid/status"
check "systemd: can get no new rights" grep -qE '^NoNewPrivs:\s*1$' "/proc/$pid/status"
check "systemd: has a filter of system calls" grep -qE '^Seccomp:\s*2$' "/proc/$pid/status"
check "systemd: has a read-only file system" grep -qE '^\S+ \S+ \S+ \S+ / ro[, ]' "/proc/$pid/mountinfo"
check "systemd: the metrics of the process are there" bash -c "$(declare -f get); get 9464 /metrics | tr -d '\r' >/test/metrics
    for name in start_time_seconds resident_memory_bytes cpu_seconds_total open_fds; do
        grep -q \"^standpipe_process_\$name \" /test/metrics || { echo \$name is missing; exit 1; }
    done"
check "systemd: nothing was refused by the sandbox" bash -c \
    '! journalctl --no-pager --unit standpipe | grep -iE "permission|not permitted|read-only|panicked"'
check "systemd: its exposure is small" bash -c \
    'systemd-analyze security --no-pager --threshold=20 standpipe | tail -n 1; exit "${PIPESTATUS[0]}"'

kill -KILL "$pid"
check "systemd: is started again after kill -9" within 20 property_is standpipe NRestarts 1
check "systemd: and gets ready again" within 60 healthy
check "systemd: and keeps writing rows" grows

pid=$(property standpipe MainPID)
check "systemd: a new version is installed" dpkg -i /test/standpipe.deb
check "systemd: and runs instead of the old one" test "$(property standpipe MainPID)" != "$pid"
check "systemd: and gets ready" within 60 healthy

check "systemd: stops" systemctl stop standpipe
check "systemd: and ends with 0" property_is standpipe ExecMainStatus 0
check "systemd: and has not failed" property_is standpipe Result success
check "systemd: the counters are right" with_settings audit

# The worker by PostgreSQL's socket, as who it is, without a password.
install -m 640 -g standpipe /dev/null /etc/standpipe/worker.env
echo 'DATABASE_URL=postgres://standpipe@%2Frun%2Fpostgresql/standpipe' >/etc/standpipe/worker.env
check "systemd: reader and worker start" systemctl start standpipe-reader standpipe-worker
check "systemd: the reader gets ready" within 60 healthy 9464
check "systemd: the worker gets ready" within 60 healthy 9465
check "systemd: they write rows" grows
check "systemd: starting standpipe" systemctl start standpipe
check "systemd: stops the reader" property_is standpipe-reader ActiveState inactive
check "systemd: and the worker, which has not failed" property_is standpipe-worker Result success
check "systemd: and gets ready" within 60 healthy 9464

check "systemd: is removed while it runs" dpkg --remove standpipe
check "systemd: which stops it" bash -c '! pgrep -x -u standpipe standpipe'
check "systemd: is purged" dpkg --purge standpipe
gone() {
    local path left=0
    for path in /etc/standpipe /usr/bin/standpipe /usr/share/doc/standpipe /usr/lib/systemd/system/standpipe*.service \
        /etc/systemd/system/multi-user.target.wants/standpipe*.service; do
        [ ! -e "$path" ] && [ ! -L "$path" ] || { echo "$path is left"; left=1; }
    done
    return $left
}
check "systemd: no file is left" gone
check "systemd: no user is left" bash -c '! getent passwd standpipe'
check "systemd: no group is left" bash -c '! getent group standpipe'
check "systemd: it is no longer known" property_is standpipe LoadState not-found

systemctl stop relay
journalctl --no-pager --unit standpipe --unit standpipe-reader --unit standpipe-worker | grep -v DEBUG | tail -n 60
touch /test/complete
