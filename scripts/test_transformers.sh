#!/usr/bin/env bash
# Runs the tests of exported models with another transformers than that of .venv: a small environment on top of it.
#
#   bash scripts/test_transformers.sh           # the oldest one that setup.py allows
#   bash scripts/test_transformers.sh 5.24.0    # another one
set -euo pipefail
cd "$(dirname "$0")/.."
version=${1:-4.57.0}
bash scripts/setup.sh
base=$(cd "${VENV:-.venv}" && pwd)
extra=$base-transformers-$version
if [ ! -e "$extra/complete" ]; then
  "$base/bin/python" -m venv --clear "$extra"
  # What this environment lacks comes from the other one, fairseq and torch among it.
  packages=$("$base/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
  own=$("$extra/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
  echo "import site; site.addsitedir('$packages')" >"$own/other_environment.pth"
  "$extra/bin/python" -m pip install --quiet --disable-pip-version-check "transformers==$version"
  touch "$extra/complete"
fi
exec "$extra/bin/python" -m pytest -q -n 0 tests/test_hf_model.py tests/test_hf_tokenizer.py
