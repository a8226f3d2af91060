#!/bin/sh
# Installs what a board needs, and nothing for a server or a simulation:
#   deploy/install-board.sh [FOLDER]        (default: .venv in the checkout)
# TORCH chooses a build of PyTorch, as pip takes it; on a Jetson one that fits its GPU:
#   TORCH="torch --index-url https://download.pytorch.org/whl/cpu" deploy/install-board.sh
# An existing environment is used as it is, and so is a PyTorch that is in it. Nothing is compiled: Python compiles what it
# imports, at its first use.
set -eu
case "${1:-}" in -h | --help) sed -n '2,7s/^# \{0,1\}//p' "$0"; exit ;; -*) echo "$0: a folder is expected, not $1" >&2; exit 2 ;; esac
checkout=$(cd "$(dirname "$0")/.." && pwd)
folder=${1:-$checkout/.venv}
[ -x "$folder/bin/python" ] || "${PYTHON:-python3}" -m venv "$folder"
"$folder/bin/python" -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else 0'
install() { "$folder/bin/python" -m pip install --disable-pip-version-check --no-cache-dir --no-compile --quiet "$@"; }
# shellcheck disable=SC2086
"$folder/bin/python" -c 'import torch' 2>/dev/null || install ${TORCH:-torch}
install --requirement "$checkout/deploy/board-requirements.txt"
install --no-deps 'flwr>=1.41,<1.42' "$checkout"
rm -rf "$folder"/lib/python3*/site-packages/numpy/*/tests # 8 MB
echo "installed in $folder; next: $folder/bin/lightcl device init --join FILE"
