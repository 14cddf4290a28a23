"""Milliseconds per action chunk on this machine, with random parameters.

    python -m lerobot_policy_otql.bench [--compile]

Measures the paper's networks (offline: 4×512, ten critics, chunks of 5; online: 4×256, two critics, chunks of 10) over
Euler steps (NFE) and candidates (N). Settings alternate within a run and the minimum of each counts, so that other work
on the machine has little effect; compare ratios.
"""

import argparse
import itertools
import time
from typing import Any

import torch
from lerobot.configs import FeatureType, PolicyFeature

from lerobot_policy_otql.configuration_otql import OtqlConfig
from lerobot_policy_otql.modeling_otql import OtqlPolicy

NETWORKS: dict[str, dict[str, Any]] = {
    "4×512, K 10, H 5": {"width": 512, "num_qs": 10, "chunk_size": 5, "action_dim": 5},
    "4×256, K 2, H 10": {"width": 256, "num_qs": 2, "chunk_size": 10, "action_dim": 4},
}
OBSERVATION_DIM = 40


def make_policy(
    nfe: int, n: int, compiled: bool, device: str, *, width: int, action_dim: int, **sizes: Any
) -> OtqlPolicy:
    """Returns a policy with one of NETWORKS."""
    config = OtqlConfig(
        device=device,
        input_features={"observation.state": PolicyFeature(FeatureType.STATE, (OBSERVATION_DIM,))},
        output_features={"action": PolicyFeature(FeatureType.ACTION, (action_dim,))},
        action_dim=action_dim,
        actor_hidden_dims=[width] * 4,
        value_hidden_dims=[width] * 4,
        flow_steps=nfe,
        best_of_n=n,
        compile_model=compiled,
        **sizes,
    )
    policy = OtqlPolicy(config).to(device)
    for parameter in policy.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    policy.reset()
    return policy


def measure(policies: dict, device: str, rounds: int, calls: int) -> dict:
    """Returns key → minimal milliseconds per chunk, measured in alternating blocks of calls."""
    batch = {"observation.state": torch.randn(1, OBSERVATION_DIM, device=device)}
    times: dict[tuple, list[float]] = {key: [] for key in policies}
    for _ in range(rounds):
        for key, policy in policies.items():
            for _ in range(calls):
                start = time.perf_counter()
                with torch.inference_mode():
                    policy.predict_action_chunk(batch).cpu()
                times[key].append(1000 * (time.perf_counter() - start))
    return {key: min(values) for key, values in times.items()}


def main() -> None:
    """Prints a Markdown table for each pair of networks."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--compile", action="store_true", help="measure torch.compile beside eager")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--calls", type=int, default=10, help="calls of each setting in a round")
    flags = parser.parse_args()
    torch.set_num_threads(flags.threads)
    torch._dynamo.config.recompile_limit = 64  # All policies compile the same code.
    for name, sizes in NETWORKS.items():
        modes = (False, True) if flags.compile else (False,)
        keys = list(itertools.product((10, 3, 2, 1), (5, 1), modes))
        policies = {key: make_policy(*key, flags.device, **sizes) for key in keys}
        measure(policies, flags.device, 1, 3)  # Warm-up.
        found = measure(policies, flags.device, flags.rounds, flags.calls)
        print(f"\n{name}, {flags.threads} threads, {flags.device}\n\n| NFE | N | mode | ms | of NFE 10, N 5, eager |")
        print("|---|---|---|---|---|")
        for (nfe, n, compiled), milliseconds in found.items():
            ratio = milliseconds / found[10, 5, False]
            print(f"| {nfe} | {n} | {'compiled' if compiled else 'eager'} | {milliseconds:.2f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
