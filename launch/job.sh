
# From here on, the script is the same for every job.

restarts=${SLURM_RESTART_COUNT:-0}
# How often to ask Slurm before giving up, and the seconds in between: its controller may be busy or restarting.
attempts=16 pause=15
say() { echo "cl-dist: $*"; }

say "job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, restart $restarts of at most $max_restarts"
if ((restarts > max_restarts)); then
    say "error: Slurm has restarted this job $restarts times, --max-restarts allows $max_restarts;" \
        "the saved state is intact: submit the run again with --resume" >&2
    exit 1
fi

# Ranks that are asked to stop save their state and exit with code 75. Slurm sends USR1 to this script only, before the
# time limit or on preemption; srun forwards it. TERM goes to this script, to srun and to the ranks.
ranks='' asked=0 interrupted=0
pass_on() {
    asked=1 interrupted=1
    if [[ -n $ranks ]]; then kill -USR1 "$ranks" 2>/dev/null; fi
}
trap pass_on USR1
trap 'asked=1 interrupted=1' TERM

# CPUs that every node of the job has: for two nodes with 72 CPUs and one with 36, Slurm writes 72(x2),36.
cpus_on_every_node() {
    local entry least='' IFS=,
    for entry in ${SLURM_JOB_CPUS_PER_NODE:-$SLURM_CPUS_ON_NODE}; do
        entry=${entry%%(*}
        if [[ -z $least ]] || ((entry < least)); then least=$entry; fi
    done
    echo "$least"
}

cd -- "$working_folder" || exit 1
unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT
# TERM may end this search for a port, too.
MASTER_PORT=$("$python" -c "$bootstrap" cl_dist.launch.rendezvous:program) || ((asked)) || exit 1
cores=${SLURM_CPUS_PER_TASK:-$(($(cpus_on_every_node) / ranks_per_node))}
OMP_NUM_THREADS=$((cores > 1 ? cores : 1))
export MASTER_PORT OMP_NUM_THREADS

# A restarted job resumes its run. A --fresh job moves the old run aside at its first start, with everything in the run
# folder. A mark in that folder says that this has not happened yet, so that the next start tries again.
mark=$run_folder/.fresh-for-job-$SLURM_JOB_ID
if ((fresh && restarts == 0)) && [[ -e $run_folder/manifest.json ]]; then touch -- "$mark"; fi
if ((fresh && restarts == 0)) || [[ -e $mark ]]; then
    arguments+=(--fresh)
elif [[ -e $run_folder/manifest.json ]]; then
    arguments+=(--resume)
fi

# Changed files show what this start has achieved. The manifest is replaced as a whole, so its inode and time change.
manifest_version() { stat --format='%i %y' -- "$run_folder/manifest.json" 2>/dev/null; }
was_interrupted() {
    [[ $(manifest_version) != "$manifest_before" ]] &&
        grep --quiet --no-messages '"status": "interrupted"' -- "$run_folder/manifest.json"
}
manifest_before=$(manifest_version)
# Number of states the run has saved over all its starts, without those of an old run that is yet to be moved aside.
saves() {
    if [[ -e $mark ]]; then echo 0; else cat -- "$run_folder/log.jsonl" 2>/dev/null | grep --count '"event": "saved"'; fi
}
saves_before=$(saves)

code=138 # as if USR1 had ended ranks that had no handler yet
if ! ((asked)); then
    srun --mpi=none --export=ALL --kill-on-bad-exit=1 --distribution=block \
        --cpus-per-task="$OMP_NUM_THREADS" --cpu-bind=cores \
        "$python" -c "$bootstrap" cl_dist.cli:program "${arguments[@]}" &
    ranks=$!
    # A signal may have arrived before the ranks' process id was known.
    if ((asked)); then pass_on; fi
    while :; do
        interrupted=0
        wait "$ranks"
        code=$?
        # A trapped signal interrupts `wait`. If the ranks ended meanwhile, bash remembers their exit code.
        if ! ((interrupted)); then break; fi
    done
    # It does not always, if the signal arrived just as they ended: then it reports -1.
    if ((code < 0)); then code=255; fi
fi
if ((code == 0)); then exit 0; fi

# Restart a run that stopped with its state saved, and one that was asked to stop and did not manage to. (Slurm kills
# ranks that take too long to exit; by then rank 0 has recorded in the manifest that everything is saved.)
# Also restart a run that lost a rank, with or without its node: the others exit with code 76, by SIGABRT (NCCL) or by
# srun's signals. But the run itself may be the cause and fail again, so restart it only if it has made progress.
if ((code == 75)) || was_interrupted; then
    code=75 what='stopped with its state saved'
elif ((asked && (code == 76 || code > 128))); then
    what="asked to stop, and ended before it could save (exit code $code)"
elif ! ((code == 76 || code == 134 || code == 137 || code == 143)); then
    exit "$code"
elif (($(saves) > saves_before)); then
    what="lost a rank (exit code $code), and had saved its state since it started"
else
    say "error: lost a rank (exit code $code), and not restarted: nothing was saved since it started;" \
        "submit the run again with --resume" >&2
    exit "$code"
fi

# Runs a command until it succeeds and leaves its output in $answer; false if it keeps failing.
persist() {
    local attempt
    for ((attempt = 1; attempt <= attempts; attempt++)); do
        if ((attempt > 1)); then sleep "$pause"; fi
        if answer=$("$@"); then return 0; fi
        # Slurm was reached, and this is its answer.
        if [[ $answer == *disabled* || $answer == *denied* ]]; then return 1; fi
    done
    return 1
}
job_state() { squeue --noheader --jobs="$SLURM_JOB_ID" --format='%T %r'; }
requeue() { scontrol requeue "$SLURM_JOB_ID" 2>&1; }

# A job that was cancelled, or that Slurm is requeueing already, is left alone. If Slurm does not report the state, try
# to requeue: Slurm refuses if it must.
if persist job_state && [[ $answer != RUNNING* && $answer != *TimeLimit* ]]; then exit "$code"; fi
if ((restarts >= max_restarts)); then
    say "error: $what, and not restarted: --max-restarts is $max_restarts;" \
        "submit the run again with --resume" >&2
    exit "$code"
fi
say "$what; restart $((restarts + 1)) of at most $max_restarts follows"
if ! persist requeue; then
    say "error: Slurm does not requeue this job: ${answer:-it gave no reason};" \
        "submit the run again with --resume" >&2
    exit "$code"
fi
