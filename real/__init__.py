"""The robot bridge: policies to LeRobot, its recordings back to datasets. Nothing here that a robot's PC runs needs JAX."""
