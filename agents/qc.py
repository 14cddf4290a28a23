"""Q-chunking (QC, arXiv 2507.07969): a BC flow with best-of-N under a critic of action chunks.

One update, on a batch {(s, a, R, s')} of m windows, with v̄ the Polyak copy of v_θ (v_θ itself where flow_tau is 1):

    critic      a' ← the best of N Euler samples of v̄ at s' by Q_φ;  TD step on Q_φ
    flow        z ~ N(0, I);  step on ‖v_θ(s, t a + (1−t) z, t) − (a − z)‖²

It acts as it bootstraps, so the policy improves through the critic alone. Departures from the paper: the TD target and
the size of the ensemble are those of all agents (the paper has two critics and no pessimism), and windows that run past
the end of an episode are left out, as in QAM's code (the paper's flow learns their part before the end). The paper's
other variant, QC-FQL, is `agents/fql.py` on chunks.
"""

import ml_collections

from agents import base, presets


class Agent(base.Agent):
    """QC: the base agent, whose losses and sampler are those above."""


# Setting → default, meaning.
SETTINGS = {
    **base.FLOW_SETTINGS,
    "best_of_n": (32, "N, candidates at acting and in the TD target"),
}


def get_config() -> ml_collections.ConfigDict:
    """Returns the defaults of this agent."""
    return base.get_config(SETTINGS)


# N = 32 in all domains of the paper, and in the online tasks (Table 6 of the OTQL paper).
PRESETS = presets.presets({})
CPU = presets.CPU | {"best_of_n": 8}
