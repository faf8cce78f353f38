#!/usr/bin/env bash
# Trains under torchrun. The first choice: it comes with torch, needs no ssh, and starts a failed job again by itself.
# Arguments go to launch/train.py; with --resume among them a restarted job goes on from its last checkpoint.
#
#   One host:       launch/torchrun.sh --steps 200
#   Several hosts:  the same line on each of them, NODE_RANK counting from 0:
#                   NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 launch/torchrun.sh --steps 200
#
# NPROC_PER_NODE   processes on this host (default: one for each GPU, or one)
# NNODES           hosts (default: 1); 1:2 goes on with one host when the other is lost
# NODE_RANK        0 on the host that MASTER_ADDR names, 1, 2, ... on the others
# MASTER_ADDR      address of host 0 that all hosts reach; MASTER_PORT (default: 29400) must be free there
# LOCAL_ADDR       address of this host that the others reach (default: the one from which it reaches MASTER_ADDR)
# JOIN_TIMEOUT     seconds in which all hosts have to come, also after one was lost (default: 600); then the others end
#                  with a RendezvousTimeoutError
# MAX_RESTARTS     how often a failed job is started again (default: 3)
# JOB_ID           tells jobs on the same MASTER_PORT apart (default: ppsf)
# PYTHON           interpreter (default: python); TRAIN_SCRIPT: another script instead of launch/train.py
# Where gloo or NCCL picks the wrong network, set GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME to the interface, such as eth0.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/checks.sh"
# torchrun prints a warning, and sets the same, without OMP_NUM_THREADS.
check_common
check_form NNODES '[1-9][0-9]{0,4}(:[1-9][0-9]{0,4})?' \
    "must be a number of hosts, such as 2, or the fewest and the most, such as 1:2"
hosts=${NNODES:-1}
((${hosts%:*} <= ${hosts#*:})) || refuse NNODES "must have the fewest hosts before the most, such as 1:2"
case $hosts in
*:*) check_number NODE_RANK 0 99999 ;;
*) check_number NODE_RANK 0 $((hosts - 1)) "NNODES=$hosts says how many hosts there are" ;;
esac
check_address MASTER_ADDR
check_port MASTER_PORT
check_address LOCAL_ADDR
check_number JOIN_TIMEOUT 1 999999999
check_number MAX_RESTARTS 0 999999999
check_form JOB_ID '[A-Za-z0-9_][A-Za-z0-9_.:-]*' "must be a word of letters, digits, and . _ : - inside"

# Workers that share the store of the agents meet the addresses of the attempt that failed, and the restart hangs.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

if [[ $hosts == 1 ]]; then
    where=(--standalone)
else
    : "${NODE_RANK:?set it to the number of this host, 0 on the one that MASTER_ADDR names}"
    : "${MASTER_ADDR:?set it to an address of host 0 that all hosts reach}"
    # Told, not guessed: torchrun compares host names, and where they do not match no host serves the store.
    is_host=$((NODE_RANK == 0))
    # Without --local-addr rank 0 gives the name of its host to the others; where they cannot resolve it, all wait in
    # silence. A UDP socket knows the address from which it would send, and sends nothing.
    reached_from='
import socket, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
    probe.connect((sys.argv[1], 9))
    address = probe.getsockname()[0]
print(sys.argv[1] if address.startswith("127.") else address)'
    local_addr=${LOCAL_ADDR:-$("$python" -c "$reached_from" "$MASTER_ADDR")}
    where=(
        --nnodes "$hosts"
        --rdzv-backend c10d
        --rdzv-endpoint "$MASTER_ADDR:${MASTER_PORT:-29400}"
        --rdzv-id "${JOB_ID:-ppsf}"
        --rdzv-conf "is_host=$is_host,join_timeout=${JOIN_TIMEOUT:-600}"
        --local-addr "$local_addr"
    )
fi

exec "$python" -m torch.distributed.run "${where[@]}" \
    --nproc-per-node "$nproc" --max-restarts "${MAX_RESTARTS:-3}" "$script" "$@"
