#!/usr/bin/env bash
# Installs the clients that make test-clients connects with, into target/tools/clients. Needs npm and Python.
set -euo pipefail
cd "$(dirname "$0")/.."
command -v npm >/dev/null || { echo "install-clients: npm is missing; as root: apt-get install npm" >&2; exit 1; }
mkdir -p target/tools/clients
npm install --prefix target/tools/clients --no-audit --no-fund --loglevel=error @skyware/jetstream@0.2.5 ws@8
python3 -m venv target/tools/clients/python
target/tools/clients/python/bin/pip install --quiet --disable-pip-version-check atproto==0.0.73
