"""Submit the project's commands to a Slurm cluster, with batch scripts that requeue and resume."""
