#!/usr/bin/env bash
# Counts the instructions that one pass over the recorded frames takes (valgrind, so that the machine's load does not
# matter), and compares them with those noted in examples/hot_paths.instructions: fails when one grew by more than 5 %.
# Other versions of the compiler give other counts: `UPDATE=1 make bench-check` notes those of today.
set -euo pipefail
cd "$(dirname "$0")/.."

noted=examples/hot_paths.instructions
tolerance=5
if ! command -v valgrind >/dev/null; then
    echo "bench-check: valgrind is missing: apt-get install valgrind" >&2
    exit 69
fi
cargo build --release --locked --quiet --example hot_paths
program=target/release/examples/hot_paths
[ -x "$program" ] || program="${CARGO_TARGET_DIR:?}/release/examples/hot_paths"

# What twenty-one passes take more than one: what comes before them does not count.
count() {
    valgrind --tool=callgrind --callgrind-out-file=/dev/null "$program" "$1" "$2" 2>&1 |
        sed -n 's/^==[0-9]*== Collected : //p'
}
status=0
fresh=""
for path in decode interpret; do
    one=$(count "$path" 1)
    many=$(count "$path" 21)
    now=$(((many - one) / 20))
    [ "$now" -gt 0 ] || { echo "bench-check: nothing was counted for $path" >&2; exit 1; }
    fresh+="$path $now"$'\n'
    before=$(sed -n "s/^$path //p" "$noted" 2>/dev/null || true)
    if [ -z "$before" ]; then
        echo "$path: $now instructions a pass; nothing is noted"
        [ -n "${UPDATE:-}" ] || status=1
        continue
    fi
    change=$(awk -v a="$before" -v b="$now" 'BEGIN { printf "%+.1f", (b - a) * 100 / a }')
    echo "$path: $now instructions a pass, $change % from the $before noted"
    if [ -z "${UPDATE:-}" ] && [ $((now * 100)) -gt $((before * (100 + tolerance))) ]; then
        echo "bench-check: $path takes more than $tolerance % more than it did" >&2
        status=1
    fi
done
if [ -n "${UPDATE:-}" ]; then
    printf '%s' "$fresh" >"$noted"
    echo "noted in $noted, by $(rustc --version)"
fi
exit "$status"
