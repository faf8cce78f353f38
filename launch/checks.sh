# Sourced by the scripts that start a training: what the environment says is checked before anything uses it.
# Bash arithmetic runs a command that stands in a subscript, reads 08 as octal, and a number that it cannot read ends
# only the branch around it: it must see no value that was not checked. Unset and empty values stand for their default.

# refuse NAME RULE: ends the script and says what is wrong with a variable.
refuse() {
    printf '%s: %s=%q %s\n' "$(basename "$0")" "$1" "${!1}" "$2" >&2
    exit 2
}

# check_form NAME PATTERN RULE: the value as a whole matches an extended regular expression.
check_form() {
    # In other locales a range such as 0-9 may hold more than it names.
    local LC_ALL=C
    [[ -z ${!1:-} || ${!1} =~ ^($2)$ ]] || refuse "$1" "$3"
}

# check_number NAME LEAST MOST [REASON]: a whole number, written as every reader of it understands it.
check_number() {
    local rule="must be a whole number from $2 to $3, in decimal digits without leading zeros${4:+: $4}"
    check_form "$1" '0|[1-9][0-9]{0,8}' "$rule"
    local value=${!1:-$2}
    ((value >= $2 && value <= $3)) || refuse "$1" "$rule"
}

# check_address NAME: one host.
check_address() {
    check_form "$1" '[A-Za-z0-9_:][A-Za-z0-9_.:%-]*' "must be one host name or address, such as node0 or 10.0.0.1"
}

check_port() {
    check_number "$1" 1 65535
}

# check_file NAME: a file that can be read.
check_file() {
    [[ -z ${!1:-} || (-f ${!1} && -r ${!1}) ]] || refuse "$1" "must be the path of a file on this host"
}

# What all launchers share: sets script, python, nproc and OMP_NUM_THREADS.
check_common() {
    check_file TRAIN_SCRIPT
    script=${TRAIN_SCRIPT:-"$(dirname "${BASH_SOURCE[0]}")/train.py"}
    [[ -z ${PYTHON:-} ]] || command -v -- "$PYTHON" >/dev/null || refuse PYTHON "must be an interpreter of this host"
    python=${PYTHON:-python}
    check_form OMP_NUM_THREADS '[1-9][0-9]{0,8}(,[1-9][0-9]{0,8})*' "must be a whole number of threads from 1"
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    NPROC_PER_NODE=${NPROC_PER_NODE:-$("$python" -c 'import torch; print(max(1, torch.cuda.device_count()))')}
    check_number NPROC_PER_NODE 1 99999
    nproc=$NPROC_PER_NODE
}
