#!/usr/bin/env bash
# Makes what tests/it/upgrade.rs starts from: a database and a Redis as a release of standpipe leaves them when it is killed.
#
#     ./scripts/make-release-fixture.sh target/previous-release/standpipe tests/fixtures/release-0.1
#
# It runs that release against servers of its own. The commit that the release was built from must be in this repository:
# entries are appended by its own script.
set -euo pipefail

say() { printf 'make-release-fixture: %s\n' "$*"; }
fail() { printf 'make-release-fixture: %s\n' "$*" >&2; exit 1; }

[ $# -eq 2 ] || fail "usage: $0 BINARY FOLDER"
binary=$(realpath "$1")
folder=$(realpath -m "$2")
cd "$(dirname "$0")/.."
entries="$PWD/scripts/release_fixture.py"

version=$("$binary" --version)
commit=$(sed -n 's/.*(\([0-9a-f]*\)).*/\1/p' <<<"$version")
[ -n "$commit" ] || fail "$version does not say which commit it was built from"

bin=$(dirname "$(realpath "$(command -v initdb || ls -d /usr/lib/postgresql/*/bin/initdb | sort -V | tail -n 1)")")
redis_server=$(command -v redis-server || command -v valkey-server) || fail "there is no Redis"
as=()
if [ "$(id -u)" -eq 0 ]; then
    user=postgres
    id "$user" >/dev/null 2>&1 || user=nobody
    as=(setpriv "--reuid=$user" "--regid=$(id -g "$user")" --clear-groups --)
fi

work=$(mktemp -d "${TMPDIR:-/tmp}/standpipe-fixture-XXXXXXXX")
chmod 711 "$work"
started=()
clean_up() {
    local pid
    for pid in "${started[@]}"; do kill -KILL "$pid" 2>/dev/null || true; done
    # Its own way to end: it takes its children with it.
    if [ -e "$work/postgres/postmaster.pid" ]; then "${as[@]}" "$bin/pg_ctl" -D "$work/postgres" -m immediate stop >/dev/null || true; fi
    { wait; } 2>/dev/null || true
    rm -rf "$work"
}
trap clean_up EXIT

free_port() {
    python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}
# Waits until a command succeeds.
until_it() {
    local what=$1 turn
    shift
    for turn in $(seq 300); do
        if "$@"; then return 0; fi
        sleep 0.1
    done
    fail "waited in vain for $what"
}

mkdir "$work/redis" "$work/postgres"
if [ ${#as[@]} -gt 0 ]; then chown "$user" "$work/redis" "$work/postgres"; fi
redis_port=$(free_port)
postgres_port=$(free_port)
relay_port=$(free_port)
(cd "$work/redis" && exec "${as[@]}" "$redis_server" --bind 127.0.0.1 --port "$redis_port" --dir "$work/redis" --save '' \
    --appendonly yes --aof-use-rdb-preamble no >"$work/redis.log") &
started+=($!)
(cd "$work/postgres" && LC_ALL=C "${as[@]}" "$bin/initdb" -D "$work/postgres" -U standpipe --auth=trust --no-sync -E UTF8 --locale=C >"$work/initdb.log")
(cd "$work/postgres" && LC_ALL=C "${as[@]}" "$bin/pg_ctl" -D "$work/postgres" -w -l "$work/postgres/log" -o \
    "-p $postgres_port -c listen_addresses=127.0.0.1 -c unix_socket_directories= -c fsync=off -c timezone=UTC" start >/dev/null)

database="postgresql://standpipe@127.0.0.1:$postgres_port/postgres"
redis() { redis-cli -p "$redis_port" "$@"; }
sql() { "$bin/psql" -X -q -A -t -v ON_ERROR_STOP=1 "$database" -c "$1"; }
until_it "Redis to answer" redis ping >/dev/null
settings=("REDIS_URL=redis://127.0.0.1:$redis_port" "DATABASE_URL=$database" "RELAY_URL=ws://127.0.0.1:$relay_port" HTTP_ADDR=off
    "COLLECTIONS=*" BATCH_SIZE=5)
# In a shell of its own, which becomes the program: a signal to it is one to the program.
standpipe() { exec env -i "PATH=$PATH" "${settings[@]}" "$@"; }
worker() {
    standpipe "CONSUMER_ID=$1" "PARALLEL_CONSUMERS=$2" "$binary" worker >"$work/$1.log" 2>&1 &
    started+=($!)
}
pending() { [ "$(redis XPENDING firehose:events firehose-processors | head -n 1)" = "$1" ]; }
waiting() {
    local last
    last=$(redis --json XINFO GROUPS firehose:events | python3 -c 'import json, sys; print(json.load(sys.stdin)[0]["last-delivered-id"])')
    [ "$(redis --raw XRANGE firehose:events "($last" + COUNT 1000 | grep -c '^[0-9]*-[0-9]*$')" -eq "$1" ]
}
drained() { waiting 0 && pending 0; }
is() { [ "$(sql "$1")" = "$2" ]; }

say "$version"
(standpipe CONSUMER_ID=release "$binary" migrate >/dev/null)
# What the application has set, and what somebody has forbidden.
sql "INSERT INTO user_settings (user_did, data_collection_forbidden) VALUES ('did:plc:private', true);
     ALTER TABLE posts ADD CONSTRAINT no_refused_posts CHECK (text NOT LIKE 'REFUSED%');
     ALTER TABLE lists ADD CONSTRAINT no_forbidden_lists CHECK (name <> 'FORBIDDEN')"
worker release 2
worker another 1

# The reader's keys are the reader's own.
"$binary" simulate --listen "127.0.0.1:$relay_port" --events 150 --accounts 12 --seed 7 >"$work/simulate.log" 2>&1 &
simulate=$!
started+=("$simulate")
standpipe CONSUMER_ID=reader "$binary" reader >"$work/reader.log" 2>&1 &
reader=$!
started+=("$reader")
steady() {
    local before
    before=$(redis GET firehose:cursor)
    sleep 1
    [ -n "$before" ] && [ "$before" = "$(redis GET firehose:cursor)" ]
}
until_it "the simulated relay's events" steady
kill -TERM "$reader"
wait "$reader" || fail "the reader failed: $(cat "$work/reader.log")"
kill -TERM "$simulate"
first_seq=$(redis GET firehose:cursor)
git show "$commit:src/stream/append.lua" >"$work/append.lua"
append() { python3 "$entries" append "$redis_port" "$1" "$first_seq" "$work/append.lua"; }

for phase in applied later; do
    append "$phase" >/dev/null
    until_it "what is $phase" drained
done
until_it "the deleted account to be purged" is "SELECT count(*) FROM standpipe.accounts WHERE purge_pending" 0
sql "UPDATE notifications SET is_read = true WHERE author_did = 'did:plc:bob'"

# One session holds what the purge has to lock, and then what the worker has to.
exec {holder}> >(exec "$bin/psql" -X -q "$database" >/dev/null)
hold() {
    echo "SELECT pg_advisory_lock(hashtextextended('$1', 0));" >&"$holder"
    until_it "the lock on $1" is "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND granted AND objsubid = 1
        AND classid::bigint << 32 | objid::bigint = hashtextextended('$1', 0)" 1
}
hold "at://did:plc:frank/app.bsky.feed.post/mine"
append deletion >/dev/null
until_it "the deletion to be applied" drained
is "SELECT purge_pending FROM standpipe.accounts WHERE did = 'did:plc:frank'" t || fail "the deleted account was purged"
hold did:plc:busy
count=$(append pending)
until_it "$count entries to be delivered" pending "$count"
sleep 2
pending "$count" || fail "some of them have been acknowledged"
for pid in "${started[@]:1:2}"; do kill -KILL "$pid"; done
{ wait "${started[@]:1:2}"; } 2>/dev/null || true
append waiting >/dev/null
# Their sessions would go on as soon as they get the lock.
sql "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'standpipe'" >/dev/null
until_it "the sessions to end" is "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'standpipe'" 0
exec {holder}>&-
# It refused nothing any more, somebody found.
sql "ALTER TABLE posts DROP CONSTRAINT no_refused_posts"

mkdir -p "$folder"
# psql's own commands are no SQL.
"$bin/pg_dump" --inserts --rows-per-insert=100 --no-owner --no-privileges "$database" |
    grep -v -E '^\\(un)?restrict ' >"$folder/database.sql"
redis BGREWRITEAOF >/dev/null
until_it "the append-only file" grep -q 'Background AOF rewrite finished successfully' "$work/redis.log"
python3 "$entries" commands "$(find "$work/redis" -name '*.base.aof' | sort -V | tail -n 1)" \
    >"$folder/redis.jsonl"
cat >"$folder/README.md" <<END
# What a release leaves behind

Made by \`$version\`, with PostgreSQL $("$bin/pg_dump" --version | sed 's/.*) \([0-9.]*\).*/\1/') and $("$redis_server" --version | sed 's/^\([A-Za-z]*\) server v=\([0-9.]*\).*/\1 \2/'). \`tests/it/upgrade.rs\` has the present program go on from here.

- \`database.sql\`: the database, SQL that a driver can send as one batch
- \`redis.jsonl\`: the commands that make the keys in Redis, one a line, each a JSON list of words

The workers \`release\` and \`another\` were killed with entries in hand: some of them were applied and none acknowledged. Other
entries were delivered to nobody. \`scripts/release_fixture.py\` says what all of them are.

To make it anew, for this release or another one:

    ./scripts/make-release-fixture.sh BINARY tests/fixtures/release-VERSION
END
say "$(sql "SELECT count(*) FROM posts") posts, $(redis XLEN firehose:events) entries, $(redis XLEN firehose:events:dead) dead letters"
du -b "$folder"/*
