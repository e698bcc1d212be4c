#!/bin/sh
# The image's commands by name: mom_train, torchrun_launch, any of tools/, or a program of the image's own.
set -eu
name=${1:---help}
case "$name" in
  -h | --help)
    echo "usage: IMAGE COMMAND [ARGUMENT ...]     (IMAGE COMMAND --help says more)"
    echo "  mom_train         one rank of a training run"
    echo "  torchrun_launch   local, submit, status, logs, cancel"
    for tool in /opt/mom/tools/*.py; do echo "  $(basename "$tool" .py)"; done
    echo "  or any program of the image, such as python, torchrun, bash"
    exit 0
    ;;
  mom_train | torchrun_launch)
    shift
    exec python -m "$name" "$@"
    ;;
esac
if [ -f "/opt/mom/tools/${name%.py}.py" ]; then
  shift
  exec python "/opt/mom/tools/${name%.py}.py" "$@"
fi
exec "$@"
