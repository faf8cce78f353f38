#!/usr/bin/env bash
# Builds the wheel into dist/, installs it into an empty environment and makes a step there without a compiler.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
make_venv

cd "$root"
rm -rf build/lib build/bdist.* build/wheel-venv dist
"$venv_python" -m pip wheel --quiet --no-deps --wheel-dir dist .
wheel=(dist/*.whl)
echo "wheel: ${wheel[*]}"

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

model = torch.nn.Linear(64, 64)
optimizer = ppsf_dist.ProdigyPlusScheduleFree(model.parameters())
model(torch.ones(2, 64)).square().mean().backward()
optimizer.step()
print(*kernels.report(optimizer), sep="\n")
path = library.load().path
assert "site-packages" in path.parts and path.parent.name == "built", path
print(f"{path.name} came with the wheel")
PYTHON
