"""Grids of sweeps: agents × tasks × settings × seeds, one for each table and figure."""

from dataclasses import dataclass, field

from envs.tasks import PANDA_TASKS, TABLE1_TASKS
from utils.run.config import CommonConfig, PostTrainConfig, RunConfig

# Program → its settings.
PROGRAMS: dict[str, type[CommonConfig]] = {"main.py": RunConfig, "online_main.py": PostTrainConfig}


@dataclass(frozen=True)
class Grid:
    """A grid of runs.

    Attributes:
        agents: names of files in agents/, or paths.
        env_names: tasks.
        seeds: number of seeds; they are 0 … seeds − 1.
        program: main.py or online_main.py.
        flags: of every command.
        settings: name → its own flags. The runs of '' are in the group <grid>, others in <grid>-<name>.

    Raises:
        ValueError: a field has a wrong type or is empty.
    """

    agents: tuple[str, ...]
    env_names: tuple[str, ...]
    seeds: int
    program: str = "main.py"
    flags: tuple[str, ...] = ()
    settings: dict[str, tuple[str, ...]] = field(default_factory=lambda: {"": ()})

    def __post_init__(self) -> None:
        if self.program not in PROGRAMS:
            raise ValueError(f"program is {self.program}; choose one of {', '.join(PROGRAMS)}")
        if type(self.seeds) is not int or self.seeds < 1:
            raise ValueError(f"seeds is {self.seeds}; give a whole number above 0")
        if not isinstance(self.settings, dict) or not all((self.settings, self.agents, self.env_names)):
            raise ValueError("agents, env_names and settings (a dictionary) must not be empty")
        for texts in (self.agents, self.env_names, self.flags, *self.settings.values()):
            if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
                raise ValueError(f"{texts!r} is not a tuple of strings; with one element it ends in a comma: ('text',)")


def tasks(*domains: str) -> tuple[str, ...]:
    """Returns Table 1's tasks of some domains."""
    return tuple(name for name in TABLE1_TASKS if name.startswith(domains))


# Values of λ train in one program; N and NFE change the program.
ABLATION: dict[str, tuple[str, ...]] = {
    "": ("--vary=agent.lam=0.1,0.4,0.75,1,1.5,4",),
    **{f"N{n}": (f"--agent.best_of_n={n}",) for n in (1, 5, 32)},
    **{f"NFE{n}": (f"--agent.flow_steps={n}",) for n in (1, 2, 3, 10)},
}
COLLECTED = ("--dataset_source=collect", "--dataset_episodes=200")
CPU = ("--preset=cpu", "--eval_interval=6000", "--eval_episodes=25", "--log_interval=1000", "--save_interval=6000")
# On a CPU: a fifth of the updates.
ONLINE = ("--utd_ratio=2", "--eval_interval=2000")
# Noisy demonstrations, so that the base policy fails at times from every initial state.
NOISY = ("--base_group=laptop_microwave", "--demonstrations=10", "--expert_noise=8", *ONLINE)
# The paper's pairs and start, and others; --preset=cpu has others than the paper.
PLAN, INDEPENDENT = "--agent.coupling=ot", "--agent.coupling=independent"
STANDARD, ACTION, SHORTCUT = "--agent.source=standard", "--agent.source=action", "--agent.targets=shortcut"
SOURCE_TASKS = (
    "scene-play-singletask-task1-v0",
    "cube-single-play-singletask-task2-v0",
    "scene-play-singletask-task2-v0",
    "pointmaze-medium-navigate-singletask-task1-v0",
)
SOURCE_FLAGS = ("--offline_steps=9000", *COLLECTED, *CPU, "--eval_interval=3000", "--save_interval=3000")

GRIDS: dict[str, Grid] = {
    # Ten methods, 40 tasks; 12 seeds as in QAM's released data.
    "table1": Grid(
        ("fawac", "dsrl", "qsm", "cgql", "fedit", "qam", "ifql", "fql", "qam_f", "otql"), TABLE1_TASKS, seeds=12
    ),
    "fig2": Grid(
        ("dsrl", "fql", "qam_f", "otql"),
        tasks("cube-double", "humanoidmaze-medium"),
        seeds=12,
        flags=("--offline_steps=500000", "--online_steps=500000"),
    ),
    "fig3": Grid(("otql", "qc", "fql", "ewfm", "dsrl"), PANDA_TASKS, seeds=5, program="online_main.py"),
    # Figs. 2 and 3 at the scale of two cores.
    "laptop_fig2": Grid(
        ("otql", "fql"),
        ("cube-single-play-singletask-task1-v0",),
        seeds=2,
        flags=("--offline_steps=30000", "--online_steps=20000", *COLLECTED, *CPU, "--eval_interval=5000"),
    ),
    "laptop_microwave": Grid(
        ("otql", "fql", "ewfm", "dsrl"),
        ("OpenMicrowave-v0",),
        seeds=3,
        program="online_main.py",
        flags=NOISY,
    ),
    "laptop_boxes": Grid(
        ("otql", "fql", "ewfm", "dsrl"),
        ("ArrangeBoxes-v0",),
        seeds=3,
        program="online_main.py",
        flags=("--base_group=laptop_boxes", "--demonstrations=50", "--base_steps=40000", *ONLINE),
    ),
    "fig6": Grid(
        ("otql",),
        ("OpenMicrowave-v0",),
        seeds=5,
        program="online_main.py",
        flags=("--base_group=fig6",),
        settings=ABLATION,
    ),
    # Laptop scale: three tasks, and all methods on one task.
    "laptop": Grid(
        ("otql", "bc"),
        ("scene-play-singletask-task1-v0", "cube-single-play-singletask-task1-v0", "scene-play-singletask-task4-v0"),
        seeds=3,
        flags=("--offline_steps=30000", *COLLECTED, *CPU),
    ),
    "laptop_methods": Grid(
        ("otql", "bc", "fql", "qam", "dsrl", "ifql"),
        ("scene-play-singletask-task1-v0",),
        seeds=3,
        flags=("--offline_steps=30000", *COLLECTED, *CPU),
    ),
    # docs/results/coupling_protocol.md.
    "source": Grid(
        ("otql",),
        SOURCE_TASKS,
        seeds=5,
        flags=SOURCE_FLAGS,
        settings={
            "independent": (INDEPENDENT, STANDARD),
            "plan": (PLAN, STANDARD),
            "action": (INDEPENDENT, ACTION),
            "action_plan": (PLAN, "--agent.epsilon=0.1", ACTION),
            "plan_noise": (PLAN, "--agent.epsilon=0.1", "--agent.source=noise"),
            "plan2": (PLAN, "--agent.epsilon=2", STANDARD),
            "shortcut": (INDEPENDENT, STANDARD, SHORTCUT),
            "action_shortcut": (INDEPENDENT, ACTION, SHORTCUT),
        },
    ),
    "source_baselines": Grid(
        ("qc", "bc", "ewfm"),
        SOURCE_TASKS,
        seeds=5,
        flags=(*SOURCE_FLAGS, "--agent.flow_steps=2"),
        settings={"standard": (STANDARD,), "action": (ACTION,)},
    ),
    "laptop_others": Grid(
        ("ewfm", "qc", "qam_f", "qam_e", "fawac", "fedit", "cgql", "qsm"),
        ("scene-play-singletask-task1-v0",),
        seeds=1,
        flags=("--offline_steps=30000", *COLLECTED, *CPU),
    ),
}
