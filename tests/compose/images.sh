#!/usr/bin/env bash
# Stand-ins for the images that Dockerfile and docker-compose.yml name, so that the scenario needs no registry of images.
# They are made of Debian 12's packages and keep what the compose file relies on: user, volume, variables, signals.
# An image that the engine already has, by docker pull or from an earlier run, is left alone.
#
#   images.sh             debian, redis, postgres, prometheus
#   images.sh --builder   and rust, with this machine's toolchain
#
# They differ from the real ones: glibc instead of Alpine's musl, PostgreSQL 15 for 16, Prometheus 2.42 for 2.55.
# Needs the engine on this machine's network: engine.sh start host.
set -euo pipefail
cd "$(dirname "$0")/images"

image() { # image TAG COMMAND...
    if docker image inspect "$1" >/dev/null 2>&1; then return; fi
    local started=$SECONDS
    "${@:2}"
    echo "image $1: $((SECONDS - started)) s"
}

build() { # build TAG NAME ARGUMENTS...
    docker buildx build --quiet --network host --tag "$1" --file "$2.Dockerfile" "${@:3}" . >/dev/null
}

debian() {
    if ! command -v debootstrap >/dev/null; then
        apt-get update -qq
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends debootstrap >/dev/null
    fi
    local tree mirror
    tree=$(mktemp -d)
    mirror=$(apt-get indextargets --format '$(REPO_URI)' | grep /debian/ | head -n 1)
    debootstrap --variant=minbase bookworm "$tree" "$mirror" >/dev/null
    rm -rf "$tree"/var/cache/apt/archives/*.deb "$tree"/var/lib/apt/lists/* "$tree"/usr/share/{doc,man,locale}
    tar -C "$tree" --exclude=./dev --exclude=./proc --exclude=./sys -c . |
        docker import --change 'CMD ["bash"]' - debian:bookworm-slim >/dev/null
    rm -rf "$tree"
}

image debian:bookworm-slim debian
image redis:7-alpine build redis:7-alpine redis
image postgres:16-alpine build postgres:16-alpine postgres
image prom/prometheus:v2.55.1 build prom/prometheus:v2.55.1 prometheus
if [ "${1:-}" = --builder ]; then
    # This machine's certificate authorities, too: something on its way to the crate registry may need them.
    image rust:1.95-bookworm build rust:1.95-bookworm rust \
        --build-context toolchain="$(rustc --print sysroot)" --build-context certificates=/etc/ssl/certs
fi
