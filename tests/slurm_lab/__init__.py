"""A real Slurm cluster on one machine, and drills that submit trainings to it and disturb them."""
