#!/bin/sh
# Write requirements.lock: the newest version of every dependency that fits pyproject.toml, with hashes. `make lock`.
#
# torch stands there without a hash, and what only torch needs not at all: its CPU build and its CUDA build are
# different files of one version, and each brings its own libraries.
set -eu
trap 'rm -f uv.lock requirements.lock.partial' EXIT
uv=.venv/bin/uv
$uv lock -q --upgrade
{
  echo "# Every version that make, CI and the image install. \`make lock\` writes this file; do not edit it by hand."
  $uv export -q --frozen --all-extras --no-extra cuda --no-emit-project --no-annotate --no-header --no-hashes |
    sed -n 's/^\(torch==[^ ;]*\).*/\1/p'
  $uv export -q --frozen --all-extras --no-extra cuda --no-emit-project --no-annotate --no-header --prune torch
} >requirements.lock.partial
mv requirements.lock.partial requirements.lock
