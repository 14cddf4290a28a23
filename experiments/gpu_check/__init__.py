"""A check of the project on one GPU: tests, kernels, updates a second, and runs of paper-sized networks."""
