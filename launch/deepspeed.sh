#!/usr/bin/env bash
# Trains under the deepspeed launcher. For those whose jobs are set up for it (hostfile, .deepspeed_env): ZeRO itself
# runs under any of these launchers. A failed job ends and is not started again. Arguments go to launch/train.py.
#
#   One host:       launch/deepspeed.sh --steps 200
#   Several hosts:  on one of them, with ssh to the others without a password, pdsh, and the same folders on all:
#                   HOSTFILE=hosts launch/deepspeed.sh --steps 200
#                   or, without ssh, the same line on each of them, NODE_RANK counting from 0:
#                   HOSTFILE=hosts NODE_RANK=0 MASTER_ADDR=10.0.0.1 launch/deepspeed.sh --steps 200
#
# NPROC_PER_NODE   processes on this host (default: one for each GPU, or one); on several hosts HOSTFILE says it
# HOSTFILE         one line for each host: "node0 slots=8"
# NODE_RANK        line of this host in HOSTFILE, from 0; leave it unset to let deepspeed start the others by ssh
# MASTER_ADDR      address of the first host that all hosts reach
# MASTER_PORT      port that is free there (default: on one host any, on several deepspeed's 29500)
# PYTHON           interpreter (default: python); TRAIN_SCRIPT: another script instead of launch/train.py
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/checks.sh"
check_common
check_file HOSTFILE
check_address MASTER_ADDR
check_port MASTER_PORT

if [[ -z ${HOSTFILE:-} ]]; then
    check_number NODE_RANK 0 0 "without HOSTFILE this host is the only one"
    # Two jobs on a host would both take deepspeed's fixed 29500.
    free='import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
    port=${MASTER_PORT:-$("$python" -c "$free")}
    where=(--num_gpus "$nproc" --master_port "$port")
else
    hosts=$(grep -cEv '^[[:space:]]*(#|$)' "$HOSTFILE") ||
        refuse HOSTFILE 'must have a line for each host: "node0 slots=8"'
    check_number NODE_RANK 0 $((hosts - 1)) "HOSTFILE=$HOSTFILE names $hosts hosts"
    where=(
        --hostfile "$HOSTFILE"
        ${MASTER_ADDR:+--master_addr "$MASTER_ADDR"}
        ${MASTER_PORT:+--master_port "$MASTER_PORT"}
    )
    if [[ -n ${NODE_RANK:-} ]]; then
        : "${MASTER_ADDR:?set it to an address of the first host that all hosts reach}"
        where+=(--no_ssh --node_rank "$NODE_RANK")
    fi
fi

# The script asks for its rank itself: no --local_rank among its arguments.
exec "$python" -m deepspeed.launcher.runner "${where[@]}" --no_local_rank "$script" "$@"
