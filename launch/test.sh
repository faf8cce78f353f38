#!/usr/bin/env bash
# Runs the tests, two at a time. Arguments go to pytest: ./launch/test.sh -m "not launch" -x
# One at a time, for a debugger: ./launch/test.sh -n 0 --pdb
# --quick is for a minute after every edit. --thorough runs what the default leaves out: see docs/reliability.md.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
prepare dev,train,mpi deepspeed
prepare_open_mpi
prepare_browser

cd "$root"
# Tests start several processes: one thread each.
export OMP_NUM_THREADS=1
two_at_a_time=(-n 2 --dist loadgroup)
for argument in "$@"; do
    # Its campaigns count in one process.
    case "$argument" in --thorough) two_at_a_time=() ;; esac
done
exec "$venv_python" -m pytest ${two_at_a_time[@]+"${two_at_a_time[@]}"} "$@"
