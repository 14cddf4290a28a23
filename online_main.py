"""Post-trains a pre-trained flow online.

    python online_main.py --agent=agents/otql.py --env_name=OpenMicrowave-v0

    base        a BC flow of the demonstrations, trained here first, or that of --base_checkpoint (the run of any agent
                with a flow); the agent's flow starts from its averaged parameters
    rollouts    --rollout_steps of the base itself: the same for every agent of a seed
    online      --online_steps with --utd_ratio updates each, half of every batch from the demonstrations

An agent that acts by a one-step policy distils it from the base first. Evaluations before the end of the rollouts are
of the base; one at their end is of its flow as the agent acts by it.
"""

from collections.abc import Sequence

from utils.run.config import PostTrainConfig
from utils.run.flags import parse_flags
from utils.run.post_train import post_train
from utils.system.entry_point import run_main


def main(argv: Sequence[str]) -> None:
    """Post-trains as the command line asks; resumes existing runs."""
    post_train(parse_flags(argv, PostTrainConfig))


if __name__ == "__main__":
    run_main(main)
