"""A real Slurm on one machine, and the drills on it."""
