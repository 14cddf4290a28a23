"""Environments and datasets: names to environments, OGBench files, and collection with OGBench's oracles."""
