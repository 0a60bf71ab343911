#!/usr/bin/env bash
# Makes .venv beside this folder: exact, tested versions of everything, fairseq 0.12.2 and this package (editable).
#
#   bash scripts/setup.sh                      # with python3, or the Python of an environment that is there already
#   PYTHON=python3.12 bash scripts/setup.sh    # with another one, 3.9 to 3.14
#   VENV=/tmp/env bash scripts/setup.sh        # somewhere else
#   NEWEST=1 VENV=/tmp/env bash scripts/setup.sh        # the newest release of everything but torch
#   NEWEST=torch VENV=/tmp/env bash scripts/setup.sh    # of torch too
#
# Safe to run again, after an interruption too: with nothing to do it ends at once and needs no network.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
venv=${VENV:-$root/.venv}
stamp=$venv/fairseq-alibi-setup # what the environment was made from, then the folder where it was made

fail() {
  echo "setup: $*" >&2
  exit 1
}

python=${PYTHON:-}
if [ -z "$python" ] && [ -e "$stamp" ]; then # an environment keeps its Python unless another one is named
  python=$("$venv/bin/python" -c 'import os, sys; print(os.path.realpath(sys._base_executable))' 2>/dev/null) || python=
fi
python=${python:-python3}
command -v "$python" >/dev/null || fail "$python not found: install Python 3.9 to 3.14, or name it: PYTHON=/path/to/python3"
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])') || fail "$python does not run: name another with PYTHON=/path/to/python3"
case $version in
  3.9 | 3.10 | 3.11 | 3.12 | 3.13 | 3.14) ;;
  *) fail "$python is Python $version, but 3.9 to 3.14 is needed: name another with PYTHON=/path/to/python3.11" ;;
esac

# What this environment is made from: while it stays the same there is nothing to do.
state=$("$python" - "$root ${NEWEST:+$NEWEST $(date +%F)}" constraints.txt setup.py scripts/setup.sh fairseq_alibi/startup/*.p* <<'EOF'
import hashlib, sys
digest = hashlib.sha256(f"{sys.version} {sys.base_prefix} {sys.argv[1]}".encode())
for name in sys.argv[2:]:
    digest.update(open(name, "rb").read())
print(digest.hexdigest())
EOF
)
if [ "$(cat "$stamp" 2>/dev/null)" = "$state"$'\n'"$venv" ] && [ -x "$venv/bin/fairseq-alibi" ]; then
  echo "setup: $venv is up to date (Python $version)"
  exit 0
fi
[ ! -e "$venv" ] || [ -e "$stamp" ] || [ -z "$(ls -A "$venv" 2>/dev/null || echo unreadable)" ] ||
  fail "$venv exists and was not made by this script: move it away, or choose another folder with VENV=..."

"$python" -c 'import venv, ensurepip' 2>/dev/null ||
  fail "$python has no venv module: install it (Debian, Ubuntu: apt-get install python$version-venv)"
cxx=${CXX:-c++} cc=${CC:-cc}
command -v "${cxx%% *}" >/dev/null && command -v "${cc%% *}" >/dev/null ||
  fail "no C and C++ compiler, which fairseq needs once: install one (Debian, Ubuntu: apt-get install build-essential; macOS: xcode-select --install)"
"$python" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")))' ||
  fail "the headers of Python $version are missing, which fairseq needs once: install them (Debian, Ubuntu: apt-get install python$version-dev)"
[ -w "$root" ] || fail "$root cannot be written, which an editable installation needs: clone it to a folder of your own"
mkdir -p "$venv" 2>/dev/null && [ -w "$venv" ] || fail "$venv cannot be written: choose another folder with VENV=..."
touch "$stamp" 2>/dev/null || fail "$stamp cannot be written: make room there, or choose another folder with VENV=..."

if [ "${SETUP_LOCKED:-}" != "$venv" ]; then # a second setup of this environment waits; a killed one releases the lock
  export SETUP_LOCKED=$venv
  exec "$python" -c '
import fcntl, os, sys
lock = os.open(sys.argv[1], os.O_RDWR)
try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    print("setup: waiting for another setup of this environment", flush=True)
    fcntl.flock(lock, fcntl.LOCK_EX)
os.set_inheritable(lock, True)
os.execvp("bash", ["bash", sys.argv[2]])' "$stamp" "$root/scripts/setup.sh"
fi

# An environment of the same Python is brought up to date in place, so that a failure, no network say, costs nothing.
made_in=$(sed -n 2p "$stamp")
identity='import sys; print(sys.version, sys.base_prefix)'
if [ "$("$venv/bin/python" -c "$identity" 2>/dev/null)" != "$("$python" -c "$identity")" ]; then
  echo "setup: making $venv with Python $version"
  find "$venv" -mindepth 1 -maxdepth 1 ! -path "$stamp" -exec rm -rf {} +
else
  echo "setup: updating $venv with Python $version"
fi
# An interrupted pip leaves packages that look installed: each writes its list of files last.
find "$venv"/lib*/python*/site-packages -maxdepth 1 -name '*.dist-info' ! -exec test -e {}/RECORD \; -exec rm -rf {} + 2>/dev/null || true
"$python" -m venv "$venv" || fail "no environment can be made in $venv (see above): choose another folder with VENV=..."
if [ "${made_in:-unfinished}" != unfinished ] && [ "$made_in" != "$venv" ]; then # the folder was moved or copied
  echo "setup: the environment was made in $made_in; its commands are adapted"
  "$venv/bin/python" - "$made_in" "$venv" <<'EOF'
import pathlib, sys
before, now = (name.encode() for name in sys.argv[1:])
for path in pathlib.Path(sys.argv[2], "bin").iterdir():
    if path.is_file() and not path.is_symlink() and before in (content := path.read_bytes()) and b"\0" not in content:
        path.write_bytes(content.replace(before, now))
EOF
fi
printf '%s\n' unfinished "$venv" >"$stamp"
log=$venv/setup.log
constraints=(--constraint constraints.txt)
if [ -n "${NEWEST:-}" ]; then
  if [ "$NEWEST" = torch ]; then : >"$venv/constraints.txt"; else grep '^torch==' constraints.txt >"$venv/constraints.txt"; fi
  constraints=(--constraint "$venv/constraints.txt" --upgrade --upgrade-strategy eager)
fi

install() {
  local look=(--quiet --progress-bar off)
  [ -t 1 ] && look=()
  if ! "$venv/bin/python" -m pip install ${look[@]+"${look[@]}"} --disable-pip-version-check --no-warn-conflicts --no-build-isolation \
    "${constraints[@]}" --log "$log" "$@" 2>"$venv/setup.err"; then
    if grep -qi "No space left on device" "$log" "$venv/setup.err"; then
      fail "the disk is full: the environment needs 3 GB in $venv; make room, or choose another folder with VENV=..., then run this again"
    fi
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
printf '%s\n' "$state" "$venv" >"$stamp"
echo "setup: done. To use it: source $venv/bin/activate"
