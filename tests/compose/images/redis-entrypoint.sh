#!/bin/sh
# root becomes the user redis; the server listens on all addresses, without protected mode.
set -eu
[ "$1" = redis-server ] || exec "$@"
if [ "$(id -u)" = 0 ]; then
    find . ! -user redis -exec chown redis '{}' +
    exec setpriv --reuid=redis --regid=redis --clear-groups -- "$0" "$@"
fi
shift
exec redis-server --protected-mode no --bind '* -::*' "$@"
