"""Sweeps of runs, on this machine or on Slurm."""
