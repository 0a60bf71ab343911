#!/usr/bin/env bash
# Makes .venv beside this folder: exact, tested versions of everything, fairseq 0.12.2 and this package (editable).
#
#   bash scripts/setup.sh                      # with python3
#   PYTHON=python3.12 bash scripts/setup.sh    # with another one, 3.9 to 3.13
#   VENV=/tmp/env bash scripts/setup.sh        # somewhere else
#
# Safe to run again: with nothing to do it ends at once and needs no network.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
python=${PYTHON:-python3}
venv=${VENV:-$root/.venv}

fail() {
  echo "setup: $*" >&2
  exit 1
}

command -v "$python" >/dev/null || fail "$python not found: install Python 3.9 to 3.13, or name it: PYTHON=/path/to/python3"
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])') || fail "$python does not run: name another with PYTHON=/path/to/python3"
case $version in
  3.9 | 3.10 | 3.11 | 3.12 | 3.13) ;;
  *) fail "$python is Python $version, but 3.9 to 3.13 is needed: name another with PYTHON=/path/to/python3.11" ;;
esac

# What this environment is made from: while it stays the same there is nothing to do.
state=$("$python" - "$root" constraints.txt setup.py scripts/setup.sh fairseq_alibi/startup/* <<'EOF'
import hashlib, sys
digest = hashlib.sha256(f"{sys.version} {sys.prefix} {sys.argv[1]}".encode())
for name in sys.argv[2:]:
    digest.update(open(name, "rb").read())
print(digest.hexdigest())
EOF
)
stamp=$venv/fairseq-alibi-setup
if [ "$(cat "$stamp" 2>/dev/null)" = "$state" ] && [ -x "$venv/bin/fairseq-alibi" ]; then
  echo "setup: $venv is up to date (Python $version)"
  exit 0
fi
[ ! -e "$venv" ] || [ -e "$stamp" ] || fail "$venv exists and was not made by this script: move it away, or choose another folder with VENV=..."

"$python" -c 'import venv, ensurepip' 2>/dev/null ||
  fail "$python has no venv module: install it (Debian, Ubuntu: apt-get install python$version-venv)"
cxx=${CXX:-c++} cc=${CC:-cc}
command -v "${cxx%% *}" >/dev/null && command -v "${cc%% *}" >/dev/null ||
  fail "no C and C++ compiler, which fairseq needs once: install one (Debian, Ubuntu: apt-get install build-essential; macOS: xcode-select --install)"
"$python" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")))' ||
  fail "the headers of Python $version are missing, which fairseq needs once: install them (Debian, Ubuntu: apt-get install python$version-dev)"

echo "setup: making $venv with Python $version"
# An environment of the same Python is brought up to date in place, so that a failure, no network say, costs nothing.
clear=--clear
[ "$("$venv/bin/python" -c 'import sys; print(sys.version, sys.base_prefix)' 2>/dev/null)" = "$("$python" -c 'import sys; print(sys.version, sys.base_prefix)')" ] && clear=
"$python" -m venv $clear "$venv"
echo "unfinished" >"$stamp"
log=$venv/setup.log

install() {
  local look=(--quiet --progress-bar off)
  [ -t 1 ] && look=()
  if ! "$venv/bin/python" -m pip install "${look[@]}" --disable-pip-version-check --no-warn-conflicts --no-build-isolation \
    --constraint constraints.txt --log "$log" "$@" 2>"$venv/setup.err"; then
    if grep -qiE "NewConnectionError|ConnectionError|Temporary failure in name resolution|Network is unreachable|ConnectTimeout|ReadTimeout|ProxyError|Connection refused" "$log" "$venv/setup.err"; then
      fail "no package index can be reached: check the network, or name a mirror with PIP_INDEX_URL=..., then run this again"
    fi
    grep -v '^WARNING' "$venv/setup.err" | tail -n 15 >&2 || true
    fail "pip could not install $* (full log: $log)"
  fi
}

echo "setup: [1/3] build tools"
install setuptools wheel cython numpy
# Before torch, because with torch in sight fairseq's build wants C++ sources that its release lacks; without its
# dependencies, because it pins releases that no current pip accepts and that do not run on current Pythons.
echo "setup: [2/3] fairseq 0.12.2 (compiles for half a minute)"
install --no-deps fairseq==0.12.2
echo "setup: [3/3] torch and the other libraries (the one long download)"
install --editable "${root}[test]"

"$venv/bin/python" -c 'import fairseq_alibi' || fail "the package was installed but does not import (see above); see what to fix first: $venv/bin/fairseq-alibi doctor"
echo "$state" >"$stamp"
echo "setup: done. To use it: source $venv/bin/activate"
