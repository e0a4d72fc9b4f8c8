# In an array, SLURM_JOB_ID can name the whole array; scontrol needs the number of this task.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}
restart=${SLURM_RESTART_COUNT:-0}
attempt=$job.$restart # differs for every start, also of the same job
say() { echo "slurm: $(date +%FT%T) job $attempt on $SLURM_JOB_NODELIST: $*"; }

export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # srun no longer inherits it since Slurm 22.05
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export PYTHONUNBUFFERED=1 # keeps the lines of all ranks in the order of time
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=$WARN_S # torchrun's default of 30 s would kill the ranks during a save

# Both functions end in exec and are started with &, so that $! is srun's own process number.
python_once() { exec srun --nodes=1 --ntasks=1 "${SRUN[@]}" $CONTAINER "$PYTHON" "$@"; }
torchrun_on_each_node() {
  # The port differs for every job and restart: the previous attempt's may still be in use, and another job may
  # share the node. The range is below the ephemeral ports and never includes torchrun's default, 29500.
  local first port=$((10000 + (SLURM_JOB_ID * 16 + restart) % 19000))
  first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  # exec in the inner bash, so that Slurm's signals reach torchrun. The -- keeps torchrun from taking --run for its own --run-path.
  exec srun --kill-on-bad-exit=1 "${SRUN[@]}" $CONTAINER bash -c 'exec "$0" -m torch.distributed.run --node-rank="$SLURM_NODEID" "$@"' \
    "$PYTHON" --nnodes="$SLURM_NNODES" --nproc-per-node="$RANKS" --max-restarts=0 --rdzv-backend=static \
    --master-addr="$first" --master-port="$port" -m -- "$@"
}
