#!/usr/bin/env bash
# Builds the source archive and the wheel in dist/ and checks each in a fresh environment; ten minutes on two cores.
#
#   bash scripts/release.sh             # the archive runs the quickstart; the wheel trains and evaluates
#   bash scripts/release.sh --upload    # and uploads both with twine, which asks for a token
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
python=${PYTHON:-python3}

fail() {
  echo "release: $*" >&2
  exit 1
}

[ $# -eq 0 ] || [ "$*" = --upload ] || fail "'$*' is no option: pass --upload or nothing"
[ -z "$(git status --porcelain)" ] || fail "there are changes that no commit has: commit them, or put them away"
version=$(sed -n 's/^__version__ = "\(.*\)"/\1/p' fairseq_alibi/__init__.py)
grep -q "^version: $version\$" CITATION.cff || fail "CITATION.cff has another version than fairseq_alibi/__init__.py, $version"
grep -q "^## $version" CHANGELOG.md || fail "CHANGELOG.md has no section '## $version'"
[ ! -e dist ] || fail "dist exists: move it away"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
echo "release: building $version"
"$python" -m venv "$work/build"
"$work/build/bin/python" -m pip install --quiet build twine
"$work/build/bin/python" -m build --outdir dist . >"$work/build.log" || { tail -n 20 "$work/build.log" >&2; fail "the build failed"; }
"$work/build/bin/python" -m twine check --strict dist/*

echo "release: the archive, with its own setup and quickstart"
tar xzf dist/*.tar.gz -C "$work"
(cd "$work/fairseq_alibi-$version" && PYTHON=$python bash scripts/quickstart.sh)

echo "release: the wheel, in an environment of its own"
"$python" -m venv "$work/wheel"
pip() { "$work/wheel/bin/python" -m pip install --quiet --constraint "$root/constraints.txt" "$@"; }
pip setuptools wheel cython numpy
pip --no-build-isolation --no-deps fairseq==0.12.2
pip dist/*.whl
cd "$work"
PATH=$work/wheel/bin:$PATH
fairseq-alibi doctor
fairseq-alibi prepare-text data --builtin --word-level
fairseq-train data --user-dir fairseq_alibi --task language_modeling --arch alibi_lm_tiny --tokens-per-sample 128 \
  --max-tokens 1024 --optimizer adam --lr 0.004 --max-update 5 --cpu --save-dir trained
fairseq-alibi evaluate data trained/checkpoint_last.pt --lengths 128,1024
cd "$root"
echo "release: dist/ holds $(cd dist && echo *)"
if [ "${1:-}" = --upload ]; then
  "$work/build/bin/python" -m twine upload dist/*
else
  echo "release: to upload them: bash scripts/release.sh --upload, after moving dist away, or twine upload dist/*"
fi
