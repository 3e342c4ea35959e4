#!/usr/bin/env bash
# make test-compose: Dockerfile, docker-compose.yml, monitoring/ and the commands of docs/migrating.md with a real Docker
# engine, offline. Needs root.
#
#   scenario.sh          builds the last stage of the Dockerfile around a binary that is there (BINARY)
#   scenario.sh --full   builds the whole Dockerfile, which compiles everything and needs the crate registry
#
# BINARY (target/release/standpipe), and the standpipe-lab beside it, must run with Debian 12's C library. COMPOSE_TEST_DIR (target/compose) keeps engine,
# images and build cache; its file system must be able to carry overlayfs, as ext4 and xfs are.
# No pipefail: grep --quiet ends before whoever writes to it.
set -u

here=$(cd "$(dirname "$0")" && pwd)
repository=$(realpath "${REPOSITORY:-$here/../..}")
target=${CARGO_TARGET_DIR:-$repository/target}
binary=$(realpath -m "${BINARY:-$target/release/standpipe}")
export COMPOSE_TEST_DIR=${COMPOSE_TEST_DIR:-$target/compose}
engine() { "$here/engine.sh" "$@"; }

passed=0
failed=0
check() { # check WHAT COMMAND...
    local output
    if output=$("${@:2}" 2>&1); then
        passed=$((passed + 1))
        echo "ok      $1"
    else
        failed=$((failed + 1))
        echo "FAILED  $1"
        printf '%s\n' "$output" | tail -n 15 | sed 's/^/        /'
    fi
}
within() { # within SECONDS COMMAND...: until it succeeds
    local end=$((SECONDS + $1))
    until "${@:2}"; do
        [ $SECONDS -lt $end ] || return 1
        sleep 0.5
    done
}
part() { printf '%4d s  %s\n' $SECONDS "$*"; }

work=$(mktemp -d)
# shellcheck disable=SC2317
finish() {
    containers=$(docker ps --quiet 2>/dev/null) && [ -n "$containers" ] && docker kill $containers >/dev/null 2>&1
    engine stop
    rm -rf "$work"
}
trap finish EXIT
trap 'exit 130' INT TERM

# --- the engine and the images

cp -r "$repository"/{Dockerfile,.dockerignore,docker-compose.yml,config.example.env,monitoring,docs,Cargo.toml,Cargo.lock} \
    "$repository"/{build.rs,src,sql,lab,LICENSE-MIT,LICENSE-APACHE} "$work" || exit 1
# The relay's containers mount it.
export STANDPIPE_LAB=$work/standpipe-lab
install "${binary%/*}/standpipe-lab" "$STANDPIPE_LAB" || exit 1
cd "$work" || exit 1
engine start host || exit 1
eval "$(engine env)"
part "the engine: $(docker version --format '{{.Server.Version}}'), Compose $(docker compose version --short)"
if [ "${1:-}" = --full ]; then
    "$here/images.sh" --builder || exit 1
    part 'stand-ins'
    check 'the Dockerfile builds' docker buildx build --network host --tag standpipe .
else
    "$here/images.sh" || exit 1
    part 'stand-ins'
    install -D "$binary" built/out/standpipe || exit 1
    install -D /etc/ssl/certs/ca-certificates.crt built/etc/ssl/certs/ca-certificates.crt || exit 1
    check 'the last stage of the Dockerfile builds' \
        docker buildx build --build-context builder=built --tag standpipe .
fi
docker image inspect standpipe >/dev/null || exit 1
part 'the image'
engine start private || exit 1

# --- everything on one machine

export COMPOSE_PROJECT_NAME=standpipe-test COMPOSE_FILE=docker-compose.yml:$here/scenario.yml
# The caller's variables would win over .env.
unset $(sed -n 's/^#\([A-Z_]*\)=.*/\1/p' config.example.env) POSTGRES_PASSWORD WORKER_PORT COMPOSE_PROFILES
compose() { docker compose --progress quiet "$@"; }
container() { echo "$COMPOSE_PROJECT_NAME-$1"; }
inspect() { docker inspect --format "$1" "$(container "$2")"; }
pid() { inspect '{{.State.Pid}}' "$1"; }
healthy() { # healthy SERVICE-N...
    local name
    for name; do [ "$(inspect '{{.State.Health.Status}}' "$name")" = healthy ] || return 1; done
}
all=(redis-1 postgres-1 reader-1 worker-1)
url() { engine at curl --silent --show-error --fail --max-time 5 "$@"; }
address() { compose port --index "${2:-1}" "$1" 9464; }
page() { url "http://$(address "$1")/" | grep -q '<title>standpipe'; }
redis() { compose exec -T redis redis-cli "$@"; }
sql() { compose exec -T postgres psql --username=standpipe -AtXc "$1"; }
nothing_pending() { [ "$(redis xpending firehose:events firehose-processors | head -n 1)" = 0 ]; }

cp config.example.env .env
check 'config.example.env is a good .env' docker compose --profile monitoring config --quiet
example_with_quotes() {
    local line value seen
    line=$(sed -n "s/^#  *\(POSTGRES_PASSWORD='.*'\)$/\1/p" config.example.env)
    value=${line#*\'}
    value=${value%\'}
    echo "example: $line"
    [[ $value == *\$* && $value == *' #'* ]] || return 1
    echo "$line" > quoted.env
    # Compose doubles each $ of what it prints, and quotes it as YAML does.
    seen=$(docker compose --env-file quoted.env config | sed -n "s/^ *POSTGRES_PASSWORD: '\(.*\)'$/\1/p")
    echo "Compose reads: $seen"
    [ "$seen" = "${value//\$/\$\$}" ]
}
check 'what config.example.env says about quoting holds' example_with_quotes

cat >> .env <<'EOF'
RELAY_URL=ws://relay:2470
PLC_URL=http://relay:2470
ALLOW_PRIVATE_ADDRESSES=true
POSTGRES_PASSWORD='ab$cd'
ADMIN_TOKEN=scenario-scenario-scenario
CLAIM_IDLE=10s
EOF
compose down --volumes --remove-orphans >/dev/null 2>&1
check 'up' compose up --detach --no-build
check 'reader and worker become healthy' within 60 healthy "${all[@]}"
check 'the reader is on port 9464' url http://127.0.0.1:9464/readyz
worker_ready() { url "http://$(address worker)/readyz"; }
check 'the worker is on the port that docker compose port names' worker_ready
check 'the page of the reader' page reader
check 'the page of the worker' page worker
confined() {
    local status
    status=/proc/$(pid "$1-1")/status
    grep -q $'^Uid:\t10001' "$status" && grep -q '^CapBnd:.*0000000000000000' "$status" \
        && grep -q '^NoNewPrivs:.*1' "$status" \
        && [ "$(tr '\0' ' ' < "${status%status}cmdline")" = "standpipe $1 " ] \
        && ! compose exec -T "$1" sh -c 'touch /tmp/x' 2>/dev/null
}
check 'the reader is process 1, not root, has no capabilities and writes nowhere' confined reader
check 'so is the worker' confined worker
password() { compose exec -T -e PGPASSWORD='ab$cd' postgres psql --host=postgres --username=standpipe -c 'select 1'; }
check 'the password is the one in quotes' password
arrived() { [ "$(sql 'select count(*) from posts')" -gt 100 ]; }
check 'events arrive' within 20 arrived
relay_known() {
    local findings
    findings=$(compose exec -T worker standpipe check) || { echo "$findings"; return 1; }
    ! grep -E -i '^ +(warning|error).*(relay|cursor|gap)' <<< "$findings"
}
check 'standpipe check in the worker knows the relay' relay_known
no_warning() {
    local findings
    findings=$(compose exec -T worker standpipe check) || { echo "$findings"; return 1; }
    ! grep -E '^ +(warning|error)' <<< "$findings"
}
check 'standpipe check in the worker finds nothing else' no_warning
part 'up'

# --- stop, kill, hang

exit_codes() { compose ps --all --format '{{.Service}} {{.ExitCode}}' | sort | tr '\n' ' '; }
stop_drains() {
    local started=$SECONDS
    compose stop reader worker
    [ $((SECONDS - started)) -lt 20 ] || return 1
    exit_codes
    [ "$(exit_codes)" = 'postgres 0 reader 0 redis 0 relay 0 worker 0 ' ] && nothing_pending
}
check 'a stop drains: exit code 0, nothing pending' stop_drains
compose start reader worker
for service in reader worker redis postgres; do
    kill -KILL "$(pid $service-1)"
    check "killed and back: $service" within 60 healthy "${all[@]}"
done
consumer_name() { inspect '{{.Config.Hostname}}' "$1"; }
before=$(consumer_name worker-1)
same_name() { compose restart worker && [ "$(consumer_name worker-1)" = "$before" ]; }
check 'a restart keeps the name of the consumers' same_name
check 'and the worker is healthy again' within 60 healthy worker-1
stop_hangs() {
    docker pause "$(container postgres-1)" >/dev/null
    sleep 1
    local started=$SECONDS
    compose stop worker
    docker unpause "$(container postgres-1)" >/dev/null
    [ "$(inspect '{{.State.ExitCode}}' worker-1)" = 1 ] && [ $((SECONDS - started)) -lt 38 ]
}
check 'a stop while PostgreSQL hangs ends before stop_grace_period' stop_hangs
within 30 healthy postgres-1
compose start worker
check 'and the worker resumes' within 60 healthy worker-1
part 'stop, kill, hang'

# --- an upgrade; down and up

recreated() { compose up --detach --no-build --force-recreate reader worker && within 60 healthy "${all[@]}"; }
check 'containers are recreated' recreated
cursor=$(redis get firehose:cursor)
posts=$(sql 'select count(*) from posts')
check 'down' compose down
check 'up again' compose up --detach --no-build
kept() {
    [ "$(redis get firehose:cursor)" -ge "$cursor" ] && [ "$(sql 'select count(*) from posts')" -ge $((posts - 100)) ]
}
check 'cursor and rows are kept' kept
part 'down and up'

# --- monitoring

prometheus() { url --get "http://127.0.0.1:9090/api/v1/$1" "${@:2}"; }
targets() { # targets N: so many are scraped, and all are up
    local answer
    answer=$(prometheus targets --data state=active) || return 1
    [ "$(grep -o '"health":"up"' <<< "$answer" | wc -l)" = "$1" ] && ! grep -q '"health":"\(down\|unknown\)"' <<< "$answer"
}
found() { prometheus query --data-urlencode "query=$1" | grep -q '"value"'; }
echo COMPOSE_PROFILES=monitoring >> .env
check 'COMPOSE_PROFILES=monitoring brings Prometheus' compose up --detach --no-build
check 'it becomes healthy' within 60 healthy prometheus-1
check 'it scrapes reader and worker' within 60 targets 2
rules() {
    local answer
    answer=$(prometheus rules) || return 1
    [ "$(grep -o '"health":"ok"' <<< "$answer" | wc -l)" -ge 10 ] \
        && ! grep -oE '"health":"err"|"state":"firing"' <<< "$answer"
}
check 'its rules work and none fires' within 40 rules
compose exec -T worker standpipe control pause pipelines >/dev/null
check 'it knows by the labels of the rules that the pipelines are paused' \
    within 40 found 'standpipe_paused{part="pipelines"} == 1'
compose exec -T worker standpipe control resume pipelines >/dev/null
part 'monitoring'

# --- several workers

workers=(worker-1 worker-2 worker-3)
scale() { compose up --detach --no-build --no-recreate --scale "worker=$1"; }
check 'up --scale worker=3' scale 3
check 'all three become healthy' within 60 healthy "${workers[@]}"
names_differ() {
    local consumers name
    consumers=$(redis xinfo consumers firehose:events firehose-processors)
    for name in "${workers[@]}"; do grep -q "$(consumer_name "$name")-0" <<< "$consumers" || return 1; done
    [ "$(for name in "${workers[@]}"; do consumer_name "$name"; done | sort -u | wc -l)" = 3 ]
}
check 'each has its own consumers' within 20 names_differ
shared() {
    local index
    for index in 1 2 3; do
        url "http://$(address worker $index)/metrics" | grep '^standpipe_entries_total' \
            | awk '{ sum += $2 } END { exit !(sum > 0) }' || return 1
    done
}
check 'they share the entries' within 30 shared
check 'Prometheus scrapes all of them and the reader' within 60 targets 4
labelled() { found 'count(up{job="standpipe", service="worker"} == 1) == 3' && found 'up{service="reader"} == 1'; }
check 'and tells them apart' within 30 labelled
claimed() {
    local name held
    healthy worker-3 || return 1
    name=$(consumer_name worker-3)
    docker pause "$(container postgres-1)" >/dev/null
    sleep 3
    docker rm --force "$(container worker-3)" >/dev/null
    held=$(redis xpending firehose:events firehose-processors | grep -A 1 "^$name-" | grep -cE '^[1-9][0-9]*$')
    docker unpause "$(container postgres-1)" >/dev/null
    echo "consumers of the removed worker with pending entries: $held"
    [ "$held" -gt 0 ] && within 60 released "$name"
}
released() { ! redis xpending firehose:events firehose-processors | grep -q "^$1-"; }
check 'the others take over what a removed worker held' claimed
within 60 healthy postgres-1
check 'back to one worker' scale 1
check 'it is healthy' within 60 healthy worker-1
check 'Prometheus follows' within 60 targets 2
part 'several workers'

# --- what is in the tables

compose stop reader
check 'everything is acknowledged' within 30 nothing_pending
check 'audit finds no difference' compose run --rm -T --no-deps worker audit
gone() { compose down --volumes && [ -z "$(docker ps --all --quiet)" ]; }
check 'down with COMPOSE_PROFILES leaves nothing behind' gone
docker rm --force $(docker ps --all --quiet) >/dev/null 2>&1
compose --profile monitoring down --volumes >/dev/null 2>&1
part 'audit, down'

# --- docs/migrating.md, with Compose

unset COMPOSE_FILE
export COMPOSE_PROJECT_NAME=takeover
application() { docker compose --progress quiet --project-name application --file "$here/application.yml" "$@"; }
takeover() { compose --file docker-compose.yml --file docker-compose.takeover.yml "$@"; }
application up --detach --wait >/dev/null 2>&1
application exec -T redis redis-cli set firehose:python_cursor 500 >/dev/null
# The file as the page shows it: the first indented block after its name.
awk '/docker-compose.takeover.yml/ { on = 1 }
     on && /^    / { print substr($0, 5); shown = 1 }
     on && shown && /^[^ ]/ { exit }' docs/migrating.md > docker-compose.takeover.yml
cat > .env <<'EOF'
RELAY_URL=ws://relay:2470
PLC_URL=http://relay:2470
ALLOW_PRIVATE_ADDRESSES=true
REDIS_URL=redis://redis:6379
DATABASE_URL=postgres://app:p%23w%24d@db:5432/social
REDIS_CURSOR_KEY=firehose:python_cursor
EOF
check 'takeover: dry run' takeover run --rm -T --no-deps worker migrate --dry-run
check 'takeover: migrate' takeover run --rm -T --no-deps worker migrate
check 'takeover: up' takeover up --detach --no-deps --no-build reader worker
check 'takeover: healthy' within 60 healthy reader-1 worker-1
from_cursor() { docker logs takeover-reader-1 2>&1 | grep 'cursor=500'; }
check "takeover: from the Python reader's cursor" from_cursor
check 'takeover: audit --repair' takeover run --rm -T --no-deps worker audit --repair
takeover --profile monitoring up --detach --no-deps --no-build prometheus
check 'takeover: Prometheus scrapes reader and worker' within 60 targets 2
takeover --profile monitoring down --volumes
application down --volumes
part 'takeover'

echo "$passed passed, $failed failed"
[ "$failed" = 0 ]
