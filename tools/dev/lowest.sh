#!/bin/sh
# Test the lowest versions that pyproject.toml names: they go into .venv-lowest, and the quick tests of data, tokenizers
# and config run there. `make lowest`; TORCH=2.11.0 for another torch than the one of .venv, whose download is large.
set -eu
uv=.venv/bin/uv
low=.venv-lowest
torch=${TORCH:-$(.venv/bin/python -c 'import torch; print(torch.__version__)')}
# uv does not read pip's settings
setting() { .venv/bin/python -m pip config get "global.$1" 2>/dev/null || true; }
links=${PIP_FIND_LINKS:-$(setting find-links)}
index=${PIP_INDEX_URL:-$(setting index-url)}
cert=${PIP_CERT:-$(setting cert)}
[ -z "$links" ] || export UV_FIND_LINKS="${UV_FIND_LINKS:-$links}"
[ -z "$index" ] || export UV_DEFAULT_INDEX="${UV_DEFAULT_INDEX:-$index}"
[ -z "$cert" ] || export SSL_CERT_FILE="${SSL_CERT_FILE:-$cert}"

[ -x $low/bin/python ] || $uv venv -q --python .venv/bin/python $low
echo "torch==$torch" >$low/torch.txt
# the tests' own tools are those of .venv: only what the product needs is to be low
tools=$($uv pip freeze -q --python .venv/bin/python | grep -E '^(pytest|hypothesis)==')
add() {
  # shellcheck disable=SC2086 # one word a tool
  $uv pip install -q --upgrade --python $low/bin/python --resolution lowest-direct -c $low/torch.txt "$@" \
    -e '.[tokenizers,remote]' $tools
}
add || add --extra-index-url https://download.pytorch.org/whl/cpu
$uv pip list --python $low/bin/python | grep -E '^(torch|numpy|pydantic|pillow|tokenizers|transformers|diffusers) '
tests=${*:-"tests/data/shards/test_manifest.py tests/data/shards/test_content.py tests/data/shards/test_shards.py tests/data/batches/test_batch.py
  tests/data/order/test_packing.py tests/data/documents/test_document.py tests/tokenizers tests/config/test_config.py"}
# shellcheck disable=SC2086 # one word a file
OMP_NUM_THREADS=1 exec $low/bin/python -m pytest -p no:cacheprovider --durations=5 $tests
