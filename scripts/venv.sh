# Sourced by the other scripts: finds a Python, makes .venv, installs fmjax into it with the extras asked for.
# PYTHON names the interpreter to make it from, VENV another folder for it.
VENV="${VENV:-$PWD/.venv}"

# The newest Python that is tested comes first: JAX 0.12 has no wheels for 3.11. Beside the same peer, no measured row is
# slower on it than on 0.10.2 (fmjax/bench/README.md). A Python without venv and pip, as Debian divides it, is passed over.
find_python() {
  local candidate
  for candidate in ${PYTHON:-python3.13 python3.12 python3 python3.11}; do
    if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  if [ -n "${PYTHON:-}" ]; then
    echo "error: PYTHON=$PYTHON is not a Python 3.11 or newer with venv; name another" >&2
  else
    echo "error: no Python 3.11 or newer with venv was found; install one, or name it: PYTHON=/path/to/python3.11" >&2
  fi
  return 2
}

# install_fmjax [EXTRA]: installs the checkout, editable; does nothing where it is installed and nothing has changed.
install_fmjax() {
  local python stamp spec=".${1:+[$1]}"
  if [ ! -x "$VENV/bin/python" ]; then
    python="$(find_python)" || exit 2
    "$python" -m venv "$VENV"
  fi
  stamp="$VENV/.installed-${1:-fmjax}-$(cat pyproject.toml requirements.txt <(pwd) | cksum | tr ' ' -)"
  if [ ! -e "$stamp" ]; then
    echo "installing fmjax${1:+[$1]} into $VENV (a minute or two)" >&2
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --editable "$spec"
    touch "$stamp"
  fi
}
