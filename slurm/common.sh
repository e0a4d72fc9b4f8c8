job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID} # in an array, SLURM_JOB_ID can mean all of it
job=${job:-$SLURM_JOB_ID}
restart=${SLURM_RESTART_COUNT:-0}
attempt=$job.$restart
say() { echo "slurm: $(date +%FT%T) job $attempt on $SLURM_JOB_NODELIST: $*"; }

export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # srun no longer inherits it since Slurm 22.05
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export PYTHONUNBUFFERED=1 # the log in the order of time
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=$WARN_S # torchrun would kill after 30 s, in the midst of a save

# Both end in exec, and are started with &: so that $! is srun itself.
python_once() { exec srun --nodes=1 --ntasks=1 "${SRUN[@]}" $CONTAINER "$PYTHON" "$@"; }
torchrun_on_each_node() { # a port of this job and restart: below the ephemeral ones, and never 29500
  local first port=$((10000 + (SLURM_JOB_ID * 16 + restart) % 19000))
  first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  # exec, so that Slurm's signals reach torchrun; --, or torchrun takes --run for its own --run-path
  exec srun --kill-on-bad-exit=1 "${SRUN[@]}" $CONTAINER bash -c 'exec "$0" -m torch.distributed.run --node-rank="$SLURM_NODEID" "$@"' \
    "$PYTHON" --nnodes="$SLURM_NNODES" --nproc-per-node="$RANKS" --max-restarts=0 --rdzv-backend=static \
    --master-addr="$first" --master-port="$port" -m -- "$@"
}
