"""The jobs for Kubernetes, as far as they run without a cluster: what their pods would start, on this host."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.launch.hosts import ROOT, SAME_LOSS, STEPS, TINY, metrics

FOLDER = ROOT / "launch" / "kubernetes"
PODS = 2


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def documents(name: str) -> dict[str, dict[str, Any]]:
    return {one["kind"]: one for one in yaml.safe_load_all((FOLDER / name).read_text())}


def start_pods(container: dict[str, Any], changed: list[dict[str, str]], output: Path) -> None:
    """Start what the pods of a job would, with other numbers of pods and processes and a smaller run."""
    arguments = list(container["args"])
    for option in ("--steps", "--save-every", "--output"):
        del arguments[arguments.index(option) : arguments.index(option) + 2]
    small = [*TINY, "--steps", str(STEPS), "--eval-every", "1", "--output", str(output)]
    command = [*container["command"], *arguments, *small]
    # In the image python and torchrun are those of the environment.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    pods = [
        subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **own, "PATH": path}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        for own in changed
    ]
    said = [pod.communicate(timeout=180)[0].decode() for pod in pods]
    assert [pod.returncode for pod in pods] == [0] * PODS, "\n".join(said)


def check(output: Path, one_process: list[dict[str, float]]) -> None:
    assert [row["loss"] for row in metrics(output)] == pytest.approx(
        [row["loss"] for row in one_process], abs=SAME_LOSS, rel=0
    )


@pytest.mark.launch
def test_the_pods_of_the_indexed_job_meet(tmp_path: Path, one_process: list[dict[str, float]]) -> None:
    found = documents("job.yaml")
    service, job = found["Service"], found["Job"]
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    env = {entry["name"]: entry.get("value") for entry in container["env"]}
    name, hosts = job["metadata"]["name"], job["spec"]["completions"]
    assert job["spec"]["completionMode"] == "Indexed" and job["spec"]["parallelism"] == hosts == int(env["NNODES"])
    # The name of the first pod: that of the job, its index, and the service that gives names.
    assert env["MASTER_ADDR"] == f"{name}-0.{pod['subdomain']}"
    assert service["metadata"]["name"] == pod["subdomain"] and service["spec"]["selector"] == {"job-name": name}
    assert int(env["NPROC_PER_NODE"]) == container["resources"]["limits"]["nvidia.com/gpu"]
    claimed = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == claimed
    assert env["NODE_RANK"] is None, "it is the pod's index"
    here = {"NNODES": str(PODS), "NPROC_PER_NODE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    given = {key: value for key, value in env.items() if value is not None} | here
    start_pods(container, [{**given, "NODE_RANK": str(index)} for index in range(PODS)], tmp_path)
    check(tmp_path, one_process)


@pytest.mark.launch
def test_the_workers_of_the_pytorchjob_meet(tmp_path: Path, one_process: list[dict[str, float]]) -> None:
    """The training operator sets these variables, which torchrun reads as its options."""
    spec = documents("pytorchjob.yaml")["PyTorchJob"]["spec"]
    policy, worker = spec["elasticPolicy"], spec["pytorchReplicaSpecs"]["Worker"]
    assert policy["minReplicas"] <= worker["replicas"] <= policy["maxReplicas"]
    (container,) = worker["template"]["spec"]["containers"]
    assert container["name"] == "pytorch", "the operator looks for a container of this name"
    assert int(spec["nprocPerNode"]) == container["resources"]["limits"]["nvidia.com/gpu"]
    of_the_operator = {
        "PET_NNODES": f"{PODS}:{PODS}", "PET_NPROC_PER_NODE": "1", "PET_RDZV_BACKEND": policy["rdzvBackend"],
        "PET_RDZV_ENDPOINT": f"127.0.0.1:{free_port()}", "PET_RDZV_ID": "ppsf", "PET_MAX_RESTARTS": "1",
        # On one host both would take themselves for the one that serves the store.
        "PET_LOCAL_ADDR": "127.0.0.1",
    }  # fmt: skip
    given = {entry["name"]: entry["value"] for entry in container["env"]} | of_the_operator
    pods = [given | {"PET_RDZV_CONF": f"is_host={int(index == 0)},join_timeout=60"} for index in range(PODS)]
    start_pods(container, pods, tmp_path)
    check(tmp_path, one_process)
