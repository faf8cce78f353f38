#!/usr/bin/env bash
# Trains a small language model on two ranks, twice, with no learning rate to set: with the defaults and with the
# recommended setting. Draws both in one picture. Needs Python 3.11 or later and nothing else.
# Arguments go to launch/train.py, for both: ./launch/demo.sh --steps 200
set -euo pipefail

for argument in "$@"; do
    case "$argument" in
    --resume* | --output* | --recommended | --help | -h)
        echo "demo: $argument is for one run: torchrun --standalone --nproc-per-node 2 launch/train.py $argument" >&2
        exit 2
        ;;
    esac
done

source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
prepare train

# Two ranks share the cores of one machine: one thread each.
export OMP_NUM_THREADS=1
demo="$root/runs/demo"
train() {
    local name="$1"
    shift
    echo "demo: training with the $name setting"
    "$venv_python" -m torch.distributed.run --standalone --nproc-per-node 2 "$root/launch/train.py" \
        --output "$demo/$name" --steps 400 --overwrite "$@"
}
train default "$@"
train recommended --recommended "$@"
exec "$venv_python" "$root/launch/plot.py" "$demo/default" "$demo/recommended" --picture "$demo/training.png"
