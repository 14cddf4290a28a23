"""Flags of the public code of FQL, QC, QAM and OGBench that have another name here, or none."""

_RESUME = "rerun the same command to resume a run, or give --start_from=<run directory> to start from its agent"
_NORMALISED = "all critics and values have layer normalisation, and no policy has it"
_TARGET_ENTROPY = "use --agent.target_entropy, a multiple of the action's dimension"

# Flag → what takes its place. Flags of the same name and meaning are not listed.
REPLACED = {
    "restore_path": _RESUME,
    "restore_epoch": _RESUME,
    "buffer_size": "leave it out: the replay buffer has room for all transitions",
    "frame_stack": "observations are single frames; stack them in an environment and a dataset of your own",
    "p_aug": "use --agent.augment=true, which shifts the images of every batch, or --agent.augment=false",
    "train_steps": "use --offline_steps",
    "dataset_proportion": "write the episodes to use to a file, and give it as --dataset",
    "save_all_online_states": "leave it out; experience is in the checkpoints of a run",
    "auto_cleanup": "leave it out; old checkpoints are removed anyway",
    "eval_tasks": "name one task in --env_name, such as scene-play-singletask-task1-v0",
    "eval_temperature": "leave it out; evaluations act by the agent's own sampler",
    "eval_gaussian": "leave it out; evaluations act by the agent's own sampler",
    "eval_on_cpu": "set JAX_PLATFORMS=cpu to keep JAX off the GPU",
    "tags": "use --wandb_tags",
    "proj_wandb": "use --wandb_project",
    "agent.agent_name": "use --agent=agents/<name>.py",
    "agent.num_samples": "use --agent.best_of_n",
    "agent.actor_num_samples": "use --agent.best_of_n",
    "agent.actor_type": "use --agent=agents/qc.py for best-of-n, or --agent=agents/fql.py for distill-ddpg",
    "agent.expectile": "use --agent.kappa",
    "agent.diffusion_steps": "use --agent.flow_steps",
    "agent.action_chunking": "use --horizon_length; 1: no chunks",
    "agent.q_agg": "TD targets are the mean of the critics less --agent.rho deviations",
    "agent.normalize_q_loss": "leave it out: losses are not divided by the scale of Q",
    "agent.layer_norm": _NORMALISED,
    "agent.value_layer_norm": _NORMALISED,
    "agent.actor_layer_norm": _NORMALISED,
    "agent.target_entropy_multiplier": _TARGET_ENTROPY,
    "agent.edit_target_entropy": _TARGET_ENTROPY,
    "agent.edit_target_entropy_multiplier": _TARGET_ENTROPY,
}
