"""What the project does on one GPU: tests, kernels, updates a second, and a run of paper-sized networks."""
