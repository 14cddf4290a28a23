"""Published settings of each domain, shared by all agents, and small networks for a CPU.

Sources of the numbers in DOMAINS ("paper" is the OTQL paper):

    horizon_length, sparse   paper §4.1, which follows QAM (arXiv 2601.14234): action chunks of 5 for cube, scene and
                             puzzle, none for mazes; sparse rewards (−1 until solved, then 0) for scene and puzzle
    discount, rho            paper Table 3
    online tasks             paper Table 5: chunks of 10, two critics, smaller networks
    robot                    paper Table 7, which states neither chunks nor networks: those of the online tasks
    all other domains        not in the paper: the settings of the nearest domain that is

Tasks of a user (gym:, minari:) have no entry, so that the defaults of agents/base.py apply to them: single actions, as
in results on D4RL, whose control is fast; γ = 0.99 and ρ = 0.5, as most domains of Table 3 have; rewards as they are.
Nothing was tuned on such data.

An agent adds its own settings in its file, with their source, by `presets`. A domain that an agent has no settings for
takes those of its nearest relative, NEAREST. CPU suits runs of 10⁴ updates on a laptop; its rates, and what agents add
to it, were chosen on scene task 1 (docs/results/appendix.md, *Laptop settings*).
"""

from typing import Any

CHUNKED = {"horizon_length": 5, "discount": 0.99, "rho": 0.5}
DOMAINS: dict[str, dict[str, Any]] = {
    "antmaze-large": {"horizon_length": 1, "sparse": False, "discount": 0.99, "rho": 0.5},
    "antmaze-giant": {"horizon_length": 1, "sparse": False, "discount": 0.995, "rho": 0.5},
    "humanoidmaze-medium": {"horizon_length": 1, "sparse": False, "discount": 0.995, "rho": 0.0},
    "humanoidmaze-large": {"horizon_length": 1, "sparse": False, "discount": 0.995, "rho": 0.0},
    "cube-double": CHUNKED | {"sparse": False},
    "cube-triple": CHUNKED | {"sparse": False},
    "scene": CHUNKED | {"sparse": True},
    "puzzle-3x3": CHUNKED | {"sparse": True},
    # Not in the paper.
    "cube-single": CHUNKED | {"sparse": False},
    "cube-quadruple": CHUNKED | {"sparse": False},
    "puzzle-4x4": CHUNKED | {"sparse": True},
    "puzzle-4x5": CHUNKED | {"sparse": True},
    "puzzle-4x6": CHUNKED | {"sparse": True},
    **{
        f"{maze}-{size}": {"horizon_length": 1, "sparse": False, "discount": discount, "rho": rho}
        for maze, size, discount, rho in [
            ("pointmaze", "medium", 0.99, 0.5),
            ("pointmaze", "large", 0.99, 0.5),
            ("pointmaze", "giant", 0.995, 0.5),
            ("pointmaze", "teleport", 0.99, 0.5),
            ("antmaze", "medium", 0.99, 0.5),
            ("antmaze", "teleport", 0.99, 0.5),
            ("humanoidmaze", "giant", 0.995, 0.0),
            ("antsoccer", "arena", 0.99, 0.5),
            ("antsoccer", "medium", 0.99, 0.5),
        ]
    },
    # The online tasks and the robot.
    **{
        task: {
            "horizon_length": 10,
            "sparse": False,
            "discount": 0.99,
            "rho": 0.0,
            "num_qs": 2,
            "actor_hidden_dims": (256, 256, 256, 256),
            "value_hidden_dims": (256, 256, 256, 256),
        }
        for task in ("ArrangeBoxes", "OpenMicrowave", "robot")
    },
}
# Domain → the one whose settings it takes from an agent that has none for it.
NEAREST = {
    "robot": "ArrangeBoxes",
    "cube-single": "cube-double",
    "cube-quadruple": "cube-triple",
    "puzzle-4x4": "puzzle-3x3",
    "puzzle-4x5": "puzzle-4x4",
    "puzzle-4x6": "puzzle-4x4",
    "pointmaze-giant": "antmaze-giant",
    "humanoidmaze-giant": "humanoidmaze-large",
    **{f"pointmaze-{size}": "antmaze-large" for size in ("medium", "large", "teleport")},
    **{f"antmaze-{size}": "antmaze-large" for size in ("medium", "teleport")},
    **{f"antsoccer-{size}": "antmaze-large" for size in ("arena", "medium")},
}
CPU = {
    "actor_hidden_dims": (128, 128, 128),
    "value_hidden_dims": (128, 128, 128),
    "num_qs": 2,
    "lr": 1e-3,
    "tau": 0.02,
    "rho": 0.0,
    "flow_tau": 0.002,
    "encoder": "impala_tiny",
}


def presets(own: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Returns an agent's PRESETS: domain → the shared settings joined with its own, or those of the nearest domain."""

    def find(domain: str) -> dict[str, Any]:
        return own.get(domain, {}) if domain in own or domain not in NEAREST else find(NEAREST[domain])

    return {domain: shared | find(domain) for domain, shared in DOMAINS.items()}
