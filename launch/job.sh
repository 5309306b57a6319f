
# From here on the script is the same for every job.

restarts=${SLURM_RESTART_COUNT:-0}
# How often Slurm is asked before it is given up, and seconds between: its controller may be busy or restarting.
attempts=16 pause=15
say() { echo "cl-dist: $*"; }

say "job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, restart $restarts of at most $max_restarts"
if ((restarts > max_restarts)); then
    say "error: Slurm has restarted this job $restarts times, --max-restarts allows $max_restarts;" \
        "what was saved is intact: submit the run again with --resume" >&2
    exit 1
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

# CPUs that every node of the job has: Slurm writes 72(x2),36 where two nodes give 72 and one gives 36.
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
# TERM reaches the search for a port, too.
MASTER_PORT=$("$python" -c "$bootstrap" cl_dist.launch.rendezvous:program) || ((asked)) || exit 1
cores=${SLURM_CPUS_PER_TASK:-$(($(cpus_on_every_node) / ranks_per_node))}
OMP_NUM_THREADS=$((cores > 1 ? cores : 1))
export MASTER_PORT OMP_NUM_THREADS

# Started again, it goes on where it stopped. To begin anew, its first start puts the old run aside, with all that lies in
# its folder: as long as the mark lies there, that has not happened, and a start after it tries again.
mark=$run_folder/.fresh-for-job-$SLURM_JOB_ID
if ((fresh && restarts == 0)) && [[ -e $run_folder/manifest.json ]]; then touch -- "$mark"; fi
if ((fresh && restarts == 0)) || [[ -e $mark ]]; then
    arguments+=(--fresh)
elif [[ -e $run_folder/manifest.json ]]; then
    arguments+=(--resume)
fi

# What this start has done is told from what it has changed. The manifest is replaced as a whole, never written to.
manifest_version() { stat --format='%i %y' -- "$run_folder/manifest.json" 2>/dev/null; }
was_interrupted() {
    [[ $(manifest_version) != "$manifest_before" ]] &&
        grep --quiet --no-messages '"status": "interrupted"' -- "$run_folder/manifest.json"
}
manifest_before=$(manifest_version)
# States that the run has saved so far, over all its starts; not those of an old run that is still to be put aside.
saves() {
    if [[ -e $mark ]]; then echo 0; else cat -- "$run_folder/log.jsonl" 2>/dev/null | grep --count '"event": "saved"'; fi
}
saves_before=$(saves)

code=138 # as if USR1 had ended ranks that did not listen yet
if ! ((asked)); then
    srun --mpi=none --export=ALL --kill-on-bad-exit=1 --distribution=block \
        --cpus-per-task="$OMP_NUM_THREADS" --cpu-bind=cores \
        "$python" -c "$bootstrap" cl_dist.cli:program "${arguments[@]}" &
    ranks=$!
    # A signal may have come before it was known whom to pass it on to.
    if ((asked)); then pass_on; fi
    while :; do
        interrupted=0
        wait "$ranks"
        code=$?
        # A trapped signal ends `wait` early; of a process that has ended bash still knows the exit code.
        if ! ((interrupted)); then break; fi
    done
    # Not always where the signal came as it ended: then bash says -1.
    if ((code < 0)); then code=255; fi
fi
if ((code == 0)); then exit 0; fi

# Restarted is what stopped in good order, and what was asked to stop and did not manage to. Slurm kills ranks that take
# too long to end; the first one has noted by then that all is saved.
# So is a job that has lost a rank, with its node or without: the others end with exit code 76, by SIGABRT (NCCL) or by
# srun's signals. The cause may be in the run itself and come again. So only what has got further is tried again.
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

# Leaves what a command says in $answer; false where it does not succeed however often it is tried.
persist() {
    local attempt
    for ((attempt = 1; attempt <= attempts; attempt++)); do
        if ((attempt > 1)); then sleep "$pause"; fi
        if answer=$("$@"); then return 0; fi
        # Not a failure to reach Slurm, but its answer.
        if [[ $answer == *disabled* || $answer == *denied* ]]; then return 1; fi
    done
    return 1
}
job_state() { squeue --noheader --jobs="$SLURM_JOB_ID" --format='%T %r'; }
requeue() { scontrol requeue "$SLURM_JOB_ID" 2>&1; }

# Not so a job that somebody has cancelled, and one that Slurm is requeueing already; where Slurm does not tell, it is
# for it to refuse.
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
