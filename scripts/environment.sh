# The other scripts source this file from the repository's root. It sets $python to a Python that has the extras in $1.
# ESFT_PYTHON=/path/to/python uses that environment as it is and installs nothing.
if [ -n "${ESFT_PYTHON:-}" ]; then
    python=$ESFT_PYTHON
else
    python=.venv/bin/python
    wanted="$1 $(cat pyproject.toml constraints.txt | cksum)"
    if [ ! -x "$python" ]; then
        ${PYTHON:-python3} -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
            { echo "error: Python 3.10 or newer is needed; point PYTHON to one" >&2; exit 2; }
        ${PYTHON:-python3} -m venv .venv
    fi
    if ! grep -qsxF "$wanted" .venv/installed; then
        echo "Installing into .venv (once; minutes on a slow line)"
        # --no-compile: Python compiles what it imports, a small part of what is installed
        install=("$python" -m pip install -q --disable-pip-version-check --no-compile -c constraints.txt)
        # torch by its exact version first: a looser requirement may fetch another build
        "${install[@]}" "$(grep '^torch==' constraints.txt)"
        "${install[@]}" -e ".[$1]"
        echo "$wanted" >>.venv/installed
    fi
fi
