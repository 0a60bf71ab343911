#!/usr/bin/env bash
# Runs the tests of exported models in a small environment on top of .venv: with another transformers, or with the
# libraries that people use with it (trl, peft, quantization, ONNX, lm-evaluation-harness).
#
#   bash scripts/test_transformers.sh            # the oldest transformers that setup.py allows
#   bash scripts/test_transformers.sh 5.24.0     # another one
#   bash scripts/test_transformers.sh clients    # the libraries, 2 GB
set -euo pipefail
cd "$(dirname "$0")/.."
version=${1:-4.57.1} # 4.57.0 was withdrawn
packages=("transformers==$version") tests=(tests/test_hf_model.py tests/test_hf_tokenizer.py
  tests/test_export_hf.py::test_every_form_has_fairseqs_logits_at_once_and_with_a_cache)
if [ "$version" = clients ]; then
  # Of the versions on record (examples/language_model/transformers.md); none brings another torch.
  packages=(trl==1.16.0 peft==0.21.2 optimum-quanto==0.2.7 torchao==0.18.0 bitsandbytes==0.50.2 onnx onnxruntime onnxscript
    "lm_eval[hf]==0.4.13" --constraint constraints.txt)
  tests=(tests/test_hf_clients.py)
fi
bash scripts/setup.sh
base=$(cd "${VENV:-.venv}" && pwd)
extra=$base-transformers-$version
if [ ! -e "$extra/complete" ]; then
  "$base/bin/python" -m venv --clear "$extra"
  # What this environment lacks comes from the other one, fairseq and torch among it.
  from=$("$base/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
  own=$("$extra/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
  echo "import site; site.addsitedir('$from')" >"$own/other_environment.pth"
  "$extra/bin/python" -m pip install --quiet --disable-pip-version-check "${packages[@]}"
  touch "$extra/complete"
fi
exec "$extra/bin/python" -m pytest -q -n 0 "${tests[@]}" "${@:2}"
