"""Benchmarks of updates, seeds, evaluation, actions and start-up."""
