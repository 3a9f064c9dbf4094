#!/usr/bin/env bash
# One GPU, at most eight minutes: see the head of benchmarks/device.py, whose options it takes.
#
#     benchmarks/device.sh                           everything, on the first GPU
#     benchmarks/device.sh --device cpu --small      tiny models: does the script work?
#     WHEELS=folder benchmarks/device.sh             a machine without a package index: wheels of what is missing there
#
# The working tree is enough: nothing has to be installed of it.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [[ -z ${PYTHON:-} ]]; then
    PYTHON=$root/.venv/bin/python
    [[ -x $PYTHON ]] || PYTHON=python3
fi
if [[ -n ${WHEELS:-} ]]; then
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" "$WHEELS"/*.whl
    PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
fi
export PYTHONPATH=$root:$root/probe:$root/checks:$root/benchmarks${PYTHONPATH:+:$PYTHONPATH}
export CUBLAS_WORKSPACE_CONFIG=:4096:8 # without it cuBLAS is not deterministic
"$PYTHON" "$root/benchmarks/device.py" "$@"
