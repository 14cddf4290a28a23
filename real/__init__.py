"""The robot bridge: policies to LeRobot, its recordings back to datasets. What a robot's PC runs needs no JAX."""
