# Sourced by the other scripts: finds a Python that has everything, or makes .venv. Quick when it is there.
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" TOKENIZERS_PARALLELISM=false

stamp=.venv/requirements.installed
if [ ! -x .venv/bin/python ] || ! cmp -s requirements.txt "$stamp"; then
    base=${PYTHON:-python3}
    "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "error: Python 3.11 or newer is needed; set PYTHON=/path/to/python3.11." >&2
        exit 1
    }
    echo "making the environment in .venv (a few minutes, once) ..." >&2
    "$base" -m venv .venv &&
        # torch first and alone: with it in place nothing else can pull another build of it.
        .venv/bin/python -m pip install --quiet --disable-pip-version-check "$(grep '^torch==' requirements.txt)" &&
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt &&
        cp requirements.txt "$stamp" || {
        echo "error: the environment could not be made; see pip's message above." >&2
        exit 1
    }
fi
python=.venv/bin/python
