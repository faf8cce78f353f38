#!/usr/bin/env bash
# Trains a small language model on two ranks, with no learning rate to set, and draws the run.
# Needs Python 3.11 or later and nothing else. Arguments go to launch/train.py: ./launch/demo.sh --steps 200
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
prepare train

# The demo's own folder starts anew each time; a folder that a person named is theirs.
fresh=(--overwrite)
for argument in "$@"; do
    case "$argument" in
    --resume* | --output*) fresh=() ;;
    esac
done

# Two ranks share the cores of one machine: one thread each.
export OMP_NUM_THREADS=1
exec "$venv_python" -m torch.distributed.run --standalone --nproc-per-node 2 "$root/launch/train.py" \
    --output "$root/runs/demo" --steps 800 ${fresh[@]+"${fresh[@]}"} "$@"
