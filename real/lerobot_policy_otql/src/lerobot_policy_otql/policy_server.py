"""LeRobot's policy server for this package's policies, which its own list of policies lacks.

    otql-policy-server --host=0.0.0.0 --port=8080 --fps=30

The robot's client is LeRobot's: `python -m lerobot.async_inference.robot_client --policy_type=otql …`.
"""

from lerobot.async_inference import policy_server
from lerobot.utils.import_utils import register_third_party_plugins


def main() -> None:
    """Serves policies of LeRobot and of this package."""
    register_third_party_plugins()
    policy_server.SUPPORTED_POLICIES.extend(("otql", "smolvla_otql"))
    policy_server.serve()


if __name__ == "__main__":
    main()
