# Sourced by the other scripts: finds a Python that has everything, or makes .venv. Quick when it is there.
# The folder stays the caller's, so that relative paths mean what they say; `repository` is where the project lies.
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) || exit 1
export PYTHONPATH="$repository/src${PYTHONPATH:+:$PYTHONPATH}" TOKENIZERS_PARALLELISM=false

python=$repository/.venv/bin/python
stamp=$repository/.venv/requirements.installed
if [ ! -x "$python" ] || ! cmp -s "$repository/requirements.txt" "$stamp"; then
    base=${PYTHON:-python3}
    "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "error: Python 3.11 or newer is needed; set PYTHON=/path/to/python3.11." >&2
        exit 1
    }
    echo "making the environment in $repository/.venv (a few minutes, once) ..." >&2
    "$base" -m venv "$repository/.venv" &&
        # torch first and alone: with it in place nothing else can pull another build of it.
        "$python" -m pip install --quiet --disable-pip-version-check "$(grep '^torch==' "$repository/requirements.txt")" &&
        "$python" -m pip install --quiet --disable-pip-version-check -r "$repository/requirements.txt" &&
        cp "$repository/requirements.txt" "$stamp" || {
        echo "error: the environment could not be made; see pip's message above." >&2
        exit 1
    }
fi
