"""Clusters: what their GPUs and links do in a second. A few are named here; YAML describes others.

Speeds are what was reached, not what is advertised: matrix products and copies on H200s and H100s
(docs/performance.md), cuDNN's attention on H200s; links between H200s of one node. Those of A100s
are three quarters of NVIDIA's figures. Figures of links between nodes are those of one InfiniBand
port a GPU.
"""

from dataclasses import dataclass
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException


@dataclass(frozen=True)
class Cluster:
    """Of each GPU: memory and its host's (GiB), operations and bytes a second; its links.

    gpus_per_node: GPUs that reach each other by `bandwidth`; others do by `across_bandwidth`
    (bytes/s each way, with `latency` and `across_latency` seconds a message). matmul, attention:
    bf16 operations a second in matrix products and in softmax attention. host_bandwidth: bytes/s
    each way to the host.
    """

    gpu: str = "H200"
    memory: float = 139.8
    host_memory: float = 200
    gpus_per_node: int = 8
    matmul: float = 600e12
    attention: float = 560e12
    memory_bandwidth: float = 4.27e12
    host_bandwidth: float = 50e9
    latency: float = 2e-5
    bandwidth: float = 3e11
    across_latency: float = 4e-5
    across_bandwidth: float = 4.5e10


CLUSTERS = {
    "h200": Cluster(),
    "h100": Cluster(gpu="H100", memory=79.1, memory_bandwidth=3.02e12),
    "a100": Cluster(
        gpu="A100",
        memory=79.1,
        host_memory=120,
        matmul=230e12,
        attention=180e12,
        memory_bandwidth=1.7e12,
        host_bandwidth=24e9,
        bandwidth=2e11,
        across_bandwidth=2.2e10,
    ),
}


def load_cluster(name: str) -> Cluster:
    """One of CLUSTERS, or what a YAML file says, with an H200's figures where it says nothing.

    Raises:
        ValueError: an unknown name, or a file that is not right.
    """
    if name in CLUSTERS:
        return CLUSTERS[name]
    if not Path(name).exists():
        raise ValueError(
            f"--cluster={name} must be one of {', '.join(CLUSTERS)}, or a YAML file with settings "
            f"such as {', '.join(list(vars(Cluster()))[:4])}"
        )
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Cluster), OmegaConf.load(name))
        found = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ValueError(f"{name}: {error.full_key}: {str(error).splitlines()[0]}") from None
    except Exception as error:  # what the YAML parser raises passes through OmegaConf as it is
        raise ValueError(f"{name}: not valid YAML ({' '.join(str(error).split())})") from None
    assert isinstance(found, Cluster)
    for key, value in vars(found).items():
        if not isinstance(value, str) and not value > 0:
            raise ValueError(f"{name}: {key}={value} must be above 0")
    return found
