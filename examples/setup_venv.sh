# Sourced by quickstart.sh and tests/run.sh from the repository's root: makes .venv with the pinned requirements, or
# brings an older one up to date.
if ! cmp -s requirements.txt .venv/requirements.installed 2>/dev/null; then
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python 3.10 or newer is needed" >&2; exit 1; }
    [ -x .venv/bin/pip ] || python3 -m venv .venv || { echo "on Debian: apt install python3-venv" >&2; exit 1; }
    echo "installing requirements.txt into .venv (once; one to ten minutes)"
    .venv/bin/pip install --disable-pip-version-check -r requirements.txt
    cp requirements.txt .venv/requirements.installed
fi
