#!/bin/sh
# Runs a command of mom, mom_train, torchrun_launch, a file of /opt/mom/tools by its name, or any program of the image.
set -eu
case "${1:---help}" in
  -h | --help)
    mom --help
    echo
    echo "In place of a command of mom: mom_train, torchrun_launch, a file of /opt/mom/tools by its name, or any"
    echo "program of the image, such as python, torchrun or bash."
    exit 0
    ;;
  mom_train | torchrun_launch) exec python -m "$@" ;;
esac
tool=/opt/mom/tools/${1%.py}.py
if [ -f "$tool" ]; then
  shift
  exec python "$tool" "$@"
fi
case "$(command -v "$1" || true)" in
  /*) exec "$@" ;; # a file; `local` and `export` are words of the shell, and commands of mom
  *) exec mom "$@" ;;
esac
