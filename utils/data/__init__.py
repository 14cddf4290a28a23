"""Data: batches, shards and the replay buffer."""
