#!/usr/bin/env bash
# A private Docker engine for the scenario. It touches no engine, network or firewall of this machine.
#
#   engine.sh start private   in a network namespace of its own, with Docker's usual networks and no way out
#   engine.sh start host      on this machine's network, for builds with --network host: no bridge, no firewall rules
#   engine.sh stop
#   engine.sh env             prints what the shell needs: eval "$(engine.sh env)"
#   engine.sh at COMMAND...   runs a command in the engine's network, where the published ports are
#
# The engine is Debian 13's, unpacked under target/compose and not installed; it also runs on Debian 12. iptables is
# installed when it is missing.
set -euo pipefail

folder=${COMPOSE_TEST_DIR:-${CARGO_TARGET_DIR:-$(dirname "$0")/../../target}/compose}
mkdir -p "$folder"
folder=$(realpath "$folder")
root=$folder/engine
run=$folder/run
export PATH=$root/usr/bin:$root/usr/sbin:$PATH

fail() { printf 'engine: %s\n' "$*" >&2; exit 1; }

install_engine() {
    if ! command -v iptables >/dev/null; then
        apt-get update -qq
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends iptables >/dev/null
    fi
    [ ! -e "$root/complete" ] || return 0
    # An apt of its own, which knows Debian 13 only, from the mirror of this machine's apt.
    local apt=$folder/apt mirror deb
    rm -rf "$root" "$apt"
    mkdir -p "$root" "$apt"/etc/apt/{preferences,trusted.gpg,apt.conf}.d "$apt/debs" "$apt/var/lib/dpkg" \
        "$apt/var/lib/apt/lists/partial" "$apt/var/cache/apt/archives/partial"
    touch "$apt/var/lib/dpkg/status"
    mirror=$(apt-get indextargets --format '$(REPO_URI)' | grep /debian/ | head -n 1)
    echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror trixie main" \
        > "$apt/etc/apt/sources.list"
    local as_root=(-qq -o APT::Sandbox::User=root)
    local private=("${as_root[@]}" -o "Dir=$apt" -o "Dir::State::status=$apt/var/lib/dpkg/status")
    apt-get "${private[@]}" update
    (
        cd "$apt/debs"
        apt-get "${private[@]}" download docker.io docker-cli docker-compose docker-buildx containerd
        # Debian 13's runc needs Debian 13's C library; that of this machine's release does not.
        apt-get "${as_root[@]}" download runc
    )
    for deb in "$apt"/debs/*.deb; do dpkg -x "$deb" "$root"; done
    rm -rf "$apt"
    mkdir -p "$folder/config/cli-plugins"
    ln -sf "$root"/usr/libexec/docker/cli-plugins/* "$folder/config/cli-plugins/"
    touch "$root/complete"
}

# The process of our engine, if it runs. A pid file that outlived its process may name somebody else.
engine_pid() {
    local pid
    pid=$(cat "$run/dockerd.pid" 2>/dev/null) && [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = dockerd ] && echo "$pid"
}

stop() {
    local pid
    pid=$(engine_pid) || return 0
    kill "$pid"
    while [ -e "/proc/$pid" ]; do sleep 0.1; done
}

start() {
    install_engine
    stop
    mkdir -p "$run"
    local daemon=(dockerd --data-root "$folder/data" --exec-root "$run" --pidfile "$run/dockerd.pid"
        --host "unix://$run/docker.sock")
    case $1 in
        private) daemon=(unshare --net -- sh -c 'ip link set lo up && exec "$@"' sh "${daemon[@]}") ;;
        host) daemon+=(--bridge none --iptables=false --ip6tables=false --ip-forward=false) ;;
    esac
    setsid "${daemon[@]}" > "$folder/dockerd.log" 2>&1 < /dev/null &
    for _ in $(seq 150); do
        if docker --host "unix://$run/docker.sock" info >/dev/null 2>&1; then return 0; fi
        sleep 0.2
    done
    tail -n 5 "$folder/dockerd.log" >&2
    fail "the engine did not start; its log is $folder/dockerd.log"
}

case ${1:-} in
    start)
        [[ ${2:-} =~ ^(private|host)$ ]] || fail "start private, or start host"
        [ "$(id -u)" -eq 0 ] || fail "only root can run it"
        start "$2"
        ;;
    stop) stop ;;
    env)
        echo "export DOCKER_HOST='unix://$run/docker.sock' DOCKER_CONFIG='$folder/config'"
        echo "export PATH='$root/usr/bin:$root/usr/sbin':\"\$PATH\""
        ;;
    at)
        pid=$(engine_pid) || fail "it does not run"
        shift
        exec nsenter --net="/proc/$pid/ns/net" -- "$@"
        ;;
    *) sed -n '2,/^set/s/^# \{0,1\}//p' "$0"; exit 64 ;;
esac
