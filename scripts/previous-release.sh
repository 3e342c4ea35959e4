#!/usr/bin/env bash
# Builds the previous release once, into target/previous-release/standpipe: tests/it/upgrade.rs has it work beside this one.
set -euo pipefail
cd "$(dirname "$0")/.."

# The release's commit, as a binary of it says in --version.
commit=aaae986619c8
folder="$PWD/target/previous-release"

say() { printf 'previous-release: %s\n' "$*"; }
fail() { printf 'previous-release: %s\n' "$*" >&2; exit 1; }

is_there() { [ -x "$folder/standpipe" ] && [[ "$("$folder/standpipe" --version)" == *"($commit)" ]]; }

if is_there; then
    say "$folder/standpipe"
    exit 0
fi
git rev-parse --quiet --verify "$commit^{commit}" >/dev/null 2>&1 ||
    fail "the commit $commit is not here: fetch the whole history (git fetch --unshallow), or set STANDPIPE_PREVIOUS to a binary of that release"

rm -rf "$folder/src"
mkdir -p "$folder/src"
git archive --format=tar "$commit" | tar -x -C "$folder/src"
say "building $commit"
# Outside of a checkout it cannot find out which commit it is. Most dependencies are the same: they are compiled once.
target="${CARGO_TARGET_DIR:-$PWD/target}"
(cd "$folder/src" && STANDPIPE_COMMIT="$commit" CARGO_TARGET_DIR="$target" CARGO_PROFILE_DEV_DEBUG=line-tables-only cargo build --locked --bin standpipe)
install -m 755 "$target/debug/standpipe" "$folder/standpipe"
is_there || fail "$folder/standpipe is not what was to be built: $("$folder/standpipe" --version)"
rm -rf "$folder/src"
say "$folder/standpipe"
