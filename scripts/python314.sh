#!/usr/bin/env bash
# Tries fairseq and the startup module on CPython 3.14 in WebAssembly (npm's pyodide), for machines without a Python 3.14.
# Imports, parsers, configurations and hydra are real; libraries with compiled parts are stand-ins. A minute.
#
#   bash scripts/python314.sh
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
command -v npm >/dev/null || { echo "python314: skipped, as there is no npm: install Node.js" >&2; exit 0; }
source "$here/environment.sh"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
site=$(python -c 'import pathlib, fairseq; print(pathlib.Path(fairseq.__file__).parents[1])')
mkdir "$work/site"
for package in fairseq fairseq_cli hydra omegaconf antlr4 packaging yaml; do
  cp -r "$site/$package" "$work/site/"
done
cp "$root"/fairseq_alibi/startup/fairseq_alibi_startup.py "$work/site/"
find "$work/site" -name '*.so' -delete
cp "$here"/python314.js "$here"/python314.py "$work/"
cd "$work"
npm install --silent --no-audit --no-fund pyodide@314.0.7
node python314.js python314.py "$work/site" "$work/site"
