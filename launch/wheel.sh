#!/usr/bin/env bash
# Builds sdist and wheel into dist/, installs the wheel into an empty environment, trains there without a compiler, and
# checks a user's program against its types with mypy and pyright.
# EXTRAS names those that the environment has been prepared with, DeepSpeed beside them.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
prepare "${EXTRAS:-dev}" ${EXTRAS:+deepspeed}

cd "$root"
# A checkout in there would stand for the wheel.
unset PYTHONPATH
mkdir -p build
rm -rf build/lib build/bdist.* build/wheel-venv dist
# The wheel comes from the sdist, so what the sdist lacks is missed here.
"$venv_python" -m build --outdir dist . >build/wheel.log 2>&1 || { cat build/wheel.log; exit 1; }
wheel=(dist/*.whl)
echo "built: $(ls dist | tr '\n' ' ')"

"$venv_python" -m venv build/wheel-venv
build/wheel-venv/bin/pip install --quiet "$tested_torch"
build/wheel-venv/bin/pip install --quiet --no-deps "${wheel[@]}"
cache="$(mktemp -d)"
trap 'rm -rf "$cache" build/wheel-venv' EXIT
cd "$cache"
# No PATH, so no compiler; no cache from before; and not the checkout.
env -i HOME="$cache" PPSF_CACHE="$cache" PPSF_KERNELS=native "$root/build/wheel-venv/bin/python" - <<'PYTHON'
import torch

import ppsf_dist
from ppsf_dist import kernels
from ppsf_dist.kernels.cpu import library

torch.manual_seed(0)
model = torch.nn.Linear(64, 64)
optimizer = ppsf_dist.ProdigyPlusScheduleFree(model.parameters(), d0=1e-3)
losses = []
for _ in range(50):
    loss = (model(torch.randn(32, 64)) - 1).square().mean()
    losses.append(loss.item())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
assert losses[-1] < losses[0] / 2, losses
print(f"loss {losses[0]:.3f} to {losses[-1]:.3f} in {len(losses)} steps")
print(*kernels.report(optimizer), sep="\n")
path = library.load().path
assert "site-packages" in path.parts and path.parent.name == "built", path
print(f"{path.name} came with the wheel")
PYTHON

# One error is meant: a checker that finds none has seen no types.
cat >program.py <<'PYTHON'
import torch

from ppsf_dist import RECOMMENDED, Monitor, Prodigy, ProdigyPlusScheduleFree, averaged

model = torch.nn.Linear(3, 3)
optimizer = ProdigyPlusScheduleFree(model.parameters(), **RECOMMENDED)
sizes: list[float] = optimizer.get_d()
with averaged(optimizer, model), Monitor(Prodigy(model.parameters()), every=5) as monitor:
    monitor.log(loss=1.0)
wrong: str = optimizer.get_d_estimate()
PYTHON
scripts="$(dirname "$venv_python")"
wheel_python="$root/build/wheel-venv/bin/python"
"$venv_python" -m mypy --strict --python-executable "$wheel_python" program.py >mypy.txt || true
"$scripts/pyright" --pythonpath "$wheel_python" program.py >pyright.txt || true
for found in mypy.txt pyright.txt; do
    if [[ "$(grep -c 'error:' "$found")" != 1 ]] || ! grep -q 'program.py:10.*error' "$found"; then
        cat "$found"
        echo "wheel: ${found%.txt} does not see the types of the wheel as it should" >&2
        exit 1
    fi
done
echo "types: mypy and pyright see them"
