#!/usr/bin/env bash
# Trains under mpirun of Open MPI or MPICH. For clusters whose scheduler starts MPI jobs; needs mpi4py.
# MPI only tells the ranks apart; they train over gloo or NCCL. A failed job ends and is not started again.
# Arguments go to launch/train.py.
#
#   One host:       NPROC_PER_NODE=2 launch/mpirun.sh --steps 200
#   Several hosts:  on one of them, with ssh to the others without a password and the same folders on all:
#                   HOSTS=node0,node1 NPROC_PER_NODE=8 launch/mpirun.sh --steps 200
#
# NPROC_PER_NODE   processes on each host (default: one for each GPU, or one)
# HOSTS            host names, with commas between them (default: this host, or what the scheduler gave mpirun)
# MASTER_ADDR      address of the first host, where its name does not resolve to one that the others reach
# MPIRUN           the mpirun (default: mpirun); MPIRUN_FLAGS: more options for it, such as --oversubscribe
# MPI4PY_LIBMPI    the MPI library, which must be that of mpirun (default: the one beside it, else what mpi4py finds)
# PYTHON           interpreter (default: python); TRAIN_SCRIPT: another script instead of launch/train.py
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/checks.sh"
mpirun=$(command -v -- "${MPIRUN:-mpirun}") || {
    echo "mpirun.sh: there is no MPIRUN=${MPIRUN:-mpirun}: set MPIRUN to its path, or pip install mpi4py mpich" >&2
    exit 2
}
check_common
check_form HOSTS '[A-Za-z0-9_][A-Za-z0-9_.-]*(,[A-Za-z0-9_][A-Za-z0-9_.-]*)*' \
    "must be host names with commas between them, such as node0,node1"
check_form MPIRUN_FLAGS '[^[:cntrl:]]*' "must be options on one line with spaces between them"
check_address MASTER_ADDR
check_port MASTER_PORT
hosts=()
[[ -z ${HOSTS:-} ]] || IFS=, read -ra hosts <<<"$HOSTS"
read -ra flags <<<"${MPIRUN_FLAGS:-}"
flags+=(-n $((nproc * (${#hosts[@]} > 0 ? ${#hosts[@]} : 1))))

if [[ $("$mpirun" --version) == *"Open MPI"* ]]; then
    # Open MPI ties each rank to one core, data loading included, unless it is told not to.
    flags+=(--bind-to none)
    # In a container root is often the only user, and Open MPI refuses root.
    ((EUID != 0)) || flags+=(--allow-run-as-root)
    library="$(dirname "$(dirname "$mpirun")")/lib/libmpi.so.40"
    if ((${#hosts[@]})); then
        flags+=(--host "$(printf "%s:$nproc," "${hosts[@]}")")
        # MPICH hands on the whole environment, Open MPI only what is named.
        for name in PATH LD_LIBRARY_PATH PYTHONPATH OMP_NUM_THREADS MPI4PY_LIBMPI MASTER_ADDR MASTER_PORT \
            GLOO_SOCKET_IFNAME NCCL_SOCKET_IFNAME; do
            [[ -z ${!name:-} ]] || flags+=(-x "$name")
        done
    fi
else
    library="$(dirname "$(dirname "$mpirun")")/lib/libmpi.so.12"
    ((${#hosts[@]} == 0)) || flags+=(-hosts "$HOSTS" -ppn "$nproc")
fi
if [[ -z ${MPI4PY_LIBMPI:-} && -e $library ]]; then
    export MPI4PY_LIBMPI=$library
fi

exec "$mpirun" "${flags[@]}" "$python" "$script" "$@"
