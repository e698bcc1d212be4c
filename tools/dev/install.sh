#!/bin/sh
# Make .venv and install everything the two commands of the README need. Called by make; safe to call again.
#
# torch comes first: as a CPU build where there is no NVIDIA GPU (a tenth of the download), from PyPI's CUDA build
# where there is one. Everything else has the version of requirements.lock, and uv compares its hashes. Where pip
# cannot get uv, pip installs the same versions, more slowly and without comparing hashes.
set -eu

python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
  echo "install: Python 3.10 or newer is needed; name one with PYTHON=..." >&2
  exit 2
}
[ -x .venv/bin/python ] || "$python" -m venv .venv
venv=.venv/bin/python
export PIP_DISABLE_PIP_VERSION_CHECK=1
[ -x .venv/bin/uv ] || "$venv" -m pip install -q "$(sed -n 's/^\(uv==[^ ;]*\).*/\1/p' requirements.lock)" 2>/dev/null || true

# uv does not read pip's settings
setting() { "$venv" -m pip config get "global.$1" 2>/dev/null || true; }
links=${PIP_FIND_LINKS:-$(setting find-links)}
index=${PIP_INDEX_URL:-$(setting index-url)}
cert=${PIP_CERT:-$(setting cert)}
[ -z "$links" ] || export UV_FIND_LINKS="${UV_FIND_LINKS:-$links}"
[ -z "$index" ] || export UV_DEFAULT_INDEX="${UV_DEFAULT_INDEX:-$index}"
[ -z "$cert" ] || export SSL_CERT_FILE="${SSL_CERT_FILE:-$cert}"

add() {
  if [ -x .venv/bin/uv ]; then
    if .venv/bin/uv pip install -q --python "$venv" -c requirements.lock "$@" 2>.venv/uv.log; then return; fi
    cat .venv/uv.log >&2
    return 1
  fi
  # pip takes no hashes beside an editable install
  sed -e 's/ *\\$//' -e '/^ *--hash/d' requirements.lock >.venv/constraints.txt
  "$venv" -m pip install -q -c .venv/constraints.txt "$@"
}

torch=$(sed -n 's/^torch==//p' requirements.lock)
if ! "$venv" -c 'import torch' 2>/dev/null && [ "$(uname -s)" = Linux ] && ! nvidia-smi >/dev/null 2>&1; then
  echo "install: no NVIDIA GPU here, so the CPU build of torch $torch"
  add "torch==$torch+cpu" 2>/dev/null ||
    add --index-url https://download.pytorch.org/whl/cpu "torch==$torch" 2>/dev/null ||
    echo "install: found no CPU build; PyPI's build brings several GB of CUDA libraries along" >&2
fi
add -e '.[tokenizers,remote,demo,dev]'
"$venv" -c 'import torch; print(f"install: torch {torch.__version__}, CUDA {torch.version.cuda or chr(45)}")'
