
# From here on the script is the same for every job.

restarts=${SLURM_RESTART_COUNT:-0}
say() { echo "cl-dist: $*"; }

say "job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, restart $restarts of at most $max_restarts"
if ((restarts > max_restarts)); then
    say "error: Slurm has restarted this job $restarts times, --max-restarts allows $max_restarts;" \
        "what was saved is intact: submit the run again with --resume" >&2
    exit 1
fi

cd -- "$working_folder" || exit 1
unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT
MASTER_PORT=$("$python" -m cl_dist.launch.rendezvous) || exit 1
cores=${SLURM_CPUS_PER_TASK:-$((SLURM_CPUS_ON_NODE / ranks_per_node))}
OMP_NUM_THREADS=$((cores > 1 ? cores : 1))
export MASTER_PORT OMP_NUM_THREADS

# Started again, it goes on where it stopped.
if [[ -e $run_folder/manifest.json ]]; then
    arguments+=(--resume)
fi

# Asked to stop, the ranks save their state and end with exit code 75. Slurm sends USR1 to this script alone, before the
# time limit or when it preempts the job; srun passes it on. It sends TERM to srun and to the ranks as well.
ranks='' asked=0 interrupted=0
pass_on() {
    asked=1 interrupted=1
    if [[ -n $ranks ]]; then kill -USR1 "$ranks" 2>/dev/null; fi
}
trap pass_on USR1
trap 'asked=1 interrupted=1' TERM

srun --mpi=none --export=ALL --kill-on-bad-exit=1 --distribution=block \
    --cpus-per-task="$OMP_NUM_THREADS" --cpu-bind=cores \
    "$python" -m cl_dist "${arguments[@]}" &
ranks=$!
while :; do
    interrupted=0
    wait "$ranks"
    code=$?
    # A trapped signal ends `wait` early; of a process that has ended bash still knows the exit code.
    if ! ((interrupted)); then break; fi
done

# Restarted is what stopped in good order, and what was asked to stop before it listened for signals.
if ! ((code == 75 || (asked && code > 128))); then exit "$code"; fi
# Not so a job that somebody has cancelled, and one that Slurm is requeueing already.
state=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format='%T %r')
if [[ $state != RUNNING* && $state != *TimeLimit* ]]; then exit "$code"; fi
if ((restarts >= max_restarts)); then
    say "error: stopped with its state saved, and not restarted: --max-restarts is $max_restarts;" \
        "submit the run again with --resume" >&2
    exit "$code"
fi
say "stopped with its state saved; restart $((restarts + 1)) of at most $max_restarts follows"
if ! scontrol requeue "$SLURM_JOB_ID"; then
    say "error: Slurm does not requeue this job; submit the run again with --resume" >&2
    exit "$code"
fi
