# shellcheck shell=bash
# Sourced by the other scripts: finds the project's root and, where scripts/setup.sh made an environment, uses it.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${VENV:-$root/.venv}
[ -x "$venv/bin/fairseq-alibi" ] && PATH=$venv/bin:$PATH
command -v fairseq-train >/dev/null && command -v fairseq-alibi >/dev/null || {
  echo "fairseq-train or fairseq-alibi not found: run 'bash $root/scripts/setup.sh' first, or activate an environment that has both" >&2
  exit 1
}
