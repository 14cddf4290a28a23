"""Batches, shards and the replay buffer."""
