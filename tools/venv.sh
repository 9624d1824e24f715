#!/bin/sh
# Makes the virtual environment $1 from the lock $2 and installs this tree into it, telling what is missing.
set -eu
venv=$1
lock=$2
python=${PYTHON:-python3}

missing() {
    echo "leasehold: $1" >&2
    echo "leasehold: on Debian or Ubuntu:  sudo apt-get install -y make python3 python3-venv" >&2
    exit 1
}

command -v "$python" >/dev/null 2>&1 || missing "$python is missing"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    missing "$python is $("$python" -V 2>&1); 3.11 or newer is needed (make PYTHON=python3.11 ...)"
"$python" -c 'import ensurepip, venv' 2>/dev/null || missing "$python lacks the venv module"

began=$(date +%s)
packages=$(grep -cE '^[a-z0-9].*==' "$lock")
echo "leasehold: installing $packages locked packages into $venv ($lock); the first time takes a minute or two"
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-input --no-deps --require-hashes -r "$lock"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-input --no-deps --no-build-isolation -e .
touch "$venv/.ready"
echo "leasehold: $venv is ready, $(($(date +%s) - began)) s"
