#!/usr/bin/env bash
# Makes a virtual environment and installs this project into it; does nothing if that
# was done before with the same arguments and the same pyproject.toml.
#
#   scripts/venv.sh FOLDER REQUIREMENT...     e.g.  scripts/venv.sh .venv -e '.[dev]'
#
# $PYTHON, if set, is the only interpreter tried. $NO_DEPS, if set, are requirements,
# separated by spaces, installed afterwards without their dependencies.
set -euo pipefail

say() { printf '==> %s\n' "$*"; }

usable() { # Does it run, is it new enough, and can it make an environment?
  "$1" -c 'import sys; assert sys.version_info >= (3, 12); import venv, ensurepip' \
    >/dev/null 2>&1
}

find_python() { # `python3` first: pyenv and its like read .python-version for it.
  local python
  for python in ${PYTHON:-python3 python3.14 python3.13 python3.12 \
    "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[2-9]*/bin/python3}; do
    if usable "$python"; then
      echo "$python"
      return
    fi
  done
  echo "error: found no Python >= 3.12 with the venv module (tried" \
    "${PYTHON:-python3, python3.14, python3.13, python3.12, pyenv});" \
    "install one (Debian: python3.12 and python3.12-venv) or name one:" \
    "make setup PYTHON=/path/to/python3.12" >&2
  exit 2
}

install() { # Of pip's own words, only what is downloaded, built and installed.
  local shown='^ *((Downloading|Using cached) [^ ]*(whl|gz) |Installing )'
  "$folder/bin/python" -m pip install --no-input --disable-pip-version-check \
    --progress-bar off "$@" | { grep --line-buffered -E "$shown" || true; }
}

folder=$1
shift
stamp=$folder/.installed
key=$(printf '%s\n' "$PWD" "$*" "${NO_DEPS:-}" | cat - pyproject.toml | cksum)
if [ -x "$folder/bin/python" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$key" ]; then
  exit 0
fi

if usable "$folder/bin/python" && "$folder/bin/python" -m pip -V >/dev/null 2>&1; then
  say "$folder: has $("$folder/bin/python" -V); bringing its packages up to date"
else
  python=$(find_python)
  say "$folder: making an environment with $("$python" -V) ($python)"
  "$python" -m venv --clear "$folder"
fi
rm -f "$stamp"
say "$folder: installing $* (minutes the first time, mostly downloads)"
install "$@"
if [ -n "${NO_DEPS:-}" ]; then
  say "$folder: installing $NO_DEPS"
  read -ra requirements <<<"$NO_DEPS"
  install --no-deps "${requirements[@]}"
fi
printf '%s\n' "$key" >"$stamp"
say "$folder: ready"
