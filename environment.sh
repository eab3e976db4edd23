# Sourced by the scripts that run programs; it holds functions only.

# find_python: sets PYTHON, the interpreter to use; `python` means it, in the commands of recipes too, and programs installed
# beside it (accelerate) come first on PATH.
find_python() {
    local found
    if [[ -z "${PYTHON:-}" ]]; then
        if [[ -x .venv/bin/python ]]; then PYTHON=.venv/bin/python; else PYTHON=python3; fi
    fi
    found=$(command -v "$PYTHON") || { echo "error: PYTHON=$PYTHON is no program; run make demo, or set PYTHON" >&2; exit 2; }
    if [[ "$found" == /* ]]; then PYTHON=$found; else PYTHON=$PWD/$found; fi
    "$PYTHON" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("transformers") is None)' ||
        { echo "error: $PYTHON has no transformers; run make demo first, or pip install -e '.[train]' there" >&2; exit 2; }
    python() { "$PYTHON" "$@"; }
    export -f python
    export PYTHON PATH="$(dirname "$PYTHON"):$PATH" TOKENIZERS_PARALLELISM=true
}

# usage ARGUMENT...: where the first asks for help or is an unknown flag, prints the comment that the script begins with.
usage() {
    [[ "${1:-}" == -* && "$1" != -- && "$1" != --list ]] || return 0
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
    if [[ "$1" == -h || "$1" == --help ]]; then exit 0; fi
    echo "error: flag $1 is not allowed; see above" >&2
    exit 2
}

# refuse_flag WORD ALLOWED: ends where a name is a flag; ALLOWED says where flags are allowed.
refuse_flag() {
    [[ "$1" == -* ]] || return 0
    echo "error: flag $1 is not allowed here; $2" >&2
    exit 2
}

# refuse_empty WHAT NAME...: ends where a name is empty or has blanks alone.
refuse_empty() {
    local what=$1 name
    for name in "${@:2}"; do
        [[ ! "$name" =~ [^[:space:]] ]] || continue
        echo "error: $what ${name@Q} is not allowed; the name is empty" >&2
        exit 2
    done
}

# refuse_blank VARIABLE...: ends where a variable of the environment holds blanks alone, which would count as none, or where
# the list MODELS or TASKS is set and empty: after MODELS=$(command) that failed, all models were measured.
refuse_blank() {
    local name
    for name in "$@"; do
        [[ -v $name && ! "${!name}" =~ [^[:space:]] ]] || continue
        [[ -n "${!name}" || $name == MODELS || $name == TASKS ]] || continue
        echo "error: $name=${!name@Q} is not allowed; at least one word, or unset it" >&2
        exit 2
    done
}

# refuse_unread WHAT VARIABLE...: ends where a variable of these scripts is set that WHAT does not read; VARIABLE: those that
# it reads. Without this a run was measured with other settings than those that were given.
refuse_unread() {
    local what=$1 name
    for name in MODELS TASKS DATASET OUTPUT PUBLISHED CONTROL LENGTHS LIMIT ITERATIONS WINDOWS SCALING; do
        [[ -n "${!name:-}" && " ${*:2} " != *" $name "* ]] || continue
        echo "error: $name=${!name} is not allowed with $what, which does not read it" >&2
        exit 2
    done
}

# attended COMMAND...: runs a program so that no signal to this script leaves it behind. By itself bash would die of a
# SIGTERM and the program go on. It gets a process group of its own; SIGTERM, SIGINT and SIGHUP are passed on to all of
# the group, and once that is gone the script ends with 128 + the signal's number, whatever the program made of it.
# Otherwise the exit code is the program's. torch's launchers kill their workers 30 seconds after a signal, which is not
# enough to save the state of a large model.
attended() {
    local group="" signal="" code=0 name
    export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-1800}
    [[ $1 != python ]] || set -- "$PYTHON" "${@:2}"
    pass_on() { signal=$1 && [[ -z $group ]] || kill -s "$1" -- "-$group" 2>/dev/null || true; }
    for name in TERM INT HUP; do trap "pass_on $name" "$name"; done
    set -m
    "$@" </dev/null & group=$!
    set +m
    [[ -z $signal ]] || pass_on "$signal" # it came before there was a group
    wait "$group" || code=$?
    if [[ -n $signal ]]; then
        while is_alive "$group"; do wait "$group" || sleep 0.1; done 2>/dev/null
        exit $((128 + $(kill -l "$signal")))
    fi
    trap - TERM INT HUP
    return "$code"
}

# is_alive GROUP: whether it has a process that hasn't ended. One that has stays as a zombie where nobody waits for it, in
# a container without an init say.
is_alive() {
    kill -0 -- "-$1" 2>/dev/null || return 1
    [[ -e /proc/self/stat ]] || return 0
    local file stat
    for file in /proc/[0-9]*/stat; do
        read -r stat <"$file" || continue # PID (NAME) STATE PARENT GROUP ...
        [[ ! ${stat##*) } =~ ^[^ZX]\ [0-9]+\ $1\  ]] || return 0
    done 2>/dev/null
    return 1
}

# begin_step NAME: says which step of the recipe begins, how many there are, and how long the rest may take; the programs
# of the step say it too (scaled_rope/progress.py). read_recipe has read the steps and their work.
begin_step() {
    local index number=0 now=-1 later=0 left=""
    for index in "${!steps[@]}"; do
        if [[ $now -ge 0 ]]; then later=$((later + work[index])); fi
        if [[ "${steps[index]}" == "$1" ]]; then now=${work[index]} number=$((index + 1)); fi
    done
    [[ $number -gt 0 ]] || return 0
    work_done=$((${work_done:-0} + ${work_now:-0})) work_now=$now
    script_began=${script_began:-$SECONDS}
    if [[ $work_done -gt 0 ]]; then
        left=", about $(((SECONDS - script_began) * (now + later) / work_done / 60 + 1)) min left"
    fi
    export SCALED_ROPE_STEP="$number ${#steps[@]} $work_done $now $later $(($(date +%s) - SECONDS + script_began)) $1"
    echo "step $number of ${#steps[@]}: $1$left"
}

# read_recipe NAME [OTHER ...]: sets model, output_dir, prepare, perplexity, passkey, report, steps and work, and
# builds the recipe's data (each command does nothing when its output is there). OTHER names are no recipes, but may be
# meant.
read_recipe() {
    local assignments command
    assignments=$(python -m scaled_rope.recipes --shell --also "${@:2}" -- "$1")
    eval "$assignments"
    unset work_done work_now script_began
    # Where the model is trained, its texts are there.
    if [[ ${#prepare[@]} -gt 0 && ! -d "$output_dir/model" ]]; then begin_step texts; fi
    for command in "${prepare[@]}"; do
        attended bash -euo pipefail -c "$command"
    done
}
