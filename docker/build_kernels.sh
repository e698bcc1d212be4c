#!/bin/bash
# Build causal-conv1d and mamba-ssm from their sdists for the CUDA architectures named ("80 90"), and install them into
# the active environment, which has torch. With a folder as second argument, only fetch and patch them there.
set -euo pipefail
archs=$1 only=${2:-}
if [ -z "$only" ] && ! command -v nvcc >/dev/null; then
  echo "build_kernels: CUDA_ARCHS=\"$archs\" needs a BASE_IMAGE with nvcc, such as nvidia/cuda:...-devel-..." >&2
  exit 2
fi
work=${only:-$(mktemp -d)}

fetch() { # NAME VERSION SHA256 URL
  python - "$work/$1.tar.gz" "$3" "$4" <<'END'
import hashlib, sys, urllib.request
path, sha256, url = sys.argv[1:]
data = urllib.request.urlopen(url, timeout=120).read()
if hashlib.sha256(data).hexdigest() != sha256:
    sys.exit(f"build_kernels: {url} is not the file that was pinned")
open(path, "wb").write(data)
END
  tar -xzf "$work/$1.tar.gz" -C "$work"
  # setup.py names nine architectures and ignores TORCH_CUDA_ARCH_LIST: put ours in their place
  python - "$work/$1-$2/setup.py" "$archs" <<'END'
import re, sys
path, archs = sys.argv[1], sys.argv[2].split()
if not archs or not all(re.fullmatch(r"\d{2,3}a?", arch) for arch in archs):
    sys.exit(f"build_kernels: CUDA_ARCHS is {sys.argv[2]!r}: architectures such as '80 90' are meant")
text, anchor = open(path).read(), "    # HACK: The compiler flag -D_GLIBCXX_USE_CXX11_ABI"
if text.count(anchor) != 1 or "cc_flag.append" not in text:
    sys.exit(f"build_kernels: {path} is not written as it was: look at it again")
flags = [f for arch in archs for f in ("-gencode", f"arch=compute_{arch},code=sm_{arch}")]
open(path, "w").write(text.replace(anchor, f"    cc_flag = {flags!r}\n{anchor}"))
END
}

pypi=${KERNELS_URL:-https://files.pythonhosted.org/packages}
fetch causal_conv1d 1.7.0 3202758494eaa7b597ce1c282dfa188889506bfcb92cad3c407d26736bfcd32b \
  "$pypi/f4/d1/eba27735f31bd5527d39a3c7f693e6ded7b844cab275db719a15ad37b6cd/causal_conv1d-1.7.0.tar.gz"
fetch mamba_ssm 2.3.2.post1 104cc47e9101e5401a675fa2b784f2952b9b037f3b1dd83b5ac544394e95d028 \
  "$pypi/af/48/aa7bec0efc7453fa0512276c0069c854bf684219050294266534bfef34bb/mamba_ssm-2.3.2.post1.tar.gz"
[ -z "$only" ] || exit 0

# FORCE_BUILD: no look for wheels on GitHub. KEEP_CUDA_BUILD: later versions leave the selective scan out without it.
export CAUSAL_CONV1D_FORCE_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE MAMBA_KEEP_CUDA_BUILD=TRUE MAX_JOBS=${MAX_JOBS:-4}
uv pip install -c requirements.lock setuptools wheel packaging ninja einops
for package in causal_conv1d-1.7.0 mamba_ssm-2.3.2.post1; do
  # no deps: mamba-ssm asks for forty packages that the selective scan does not use
  uv pip install --no-deps --no-build-isolation "$work/$package"
done
python -c "import torch, selective_scan_cuda, causal_conv1d_cuda"
rm -rf "$work"
