"""Benchmarks of updates, evaluation, actions, seeds and start-up."""
