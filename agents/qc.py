"""Q-chunking (QC, arXiv 2507.07969): the BC flow, sharpened by best-of-N under a critic of action chunks.

One update, on a batch {(s, a, R, s')} of m windows, with v̄ the Polyak copy of v_θ (v_θ itself where flow_tau is 1):

    critic      a' ← the best of N Euler samples of v̄ at s' by Q_φ;  TD step on Q_φ
    flow        z ~ N(0, I);  step on ‖v_θ(s, t a + (1−t) z, t) − (a − z)‖²

It acts as it bootstraps, so the policy improves with the critic alone. The paper's TD target has no pessimism and its
ensemble two members; here both are those of all agents. Of windows that run past the end of an episode its flow learns
the part before it; here they are left out, as QAM's code does. QC-FQL, its other variant, is `agents/fql.py` on chunks.
"""

import ml_collections

from agents import base, presets


class Agent(base.Agent):
    """QC: the base agent, with best-of-N."""


def get_config() -> ml_collections.ConfigDict:
    """Defaults of this agent."""
    config = base.get_config()
    config.best_of_n = 32
    return config


# The paper's N = 32 is one value for all domains, the online tasks (Table 6) included.
PRESETS = presets.presets({})
CPU = presets.CPU | {"best_of_n": 8}
