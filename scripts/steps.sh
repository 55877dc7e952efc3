# shellcheck shell=bash disable=SC2034
# What tpu_vm.sh and gke.sh share: options, refusals that name the next step, dry runs. Sourced, not run; what looks
# unused here is used there.

DRY_RUN=${DRY_RUN:-}

say() { printf '\n# %s\n' "$*"; }

fail() { # MESSAGE
  printf 'error: %s\n' "$*" >&2
  exit 2
}

# read_options "OPTION ..." "$@": --name value, --name=value or the environment variable NAME; --spot and --dry-run
# stand alone. The first other word is VERB, those after it are ARGS.
read_options() {
  local known=" $1 " name value
  shift
  VERB='' ARGS=()
  while [ $# -gt 0 ]; do
    case $1 in
      -h | --help) sed -n '2,/^set /s/^# \{0,1\}//p' "$0" && exit 0 ;;
      --dry-run) DRY_RUN=1 ;;
      --spot) SPOT=1 ;;
      --*)
        name=${1%%=*}
        if [ "$name" = "$1" ]; then
          [ $# -gt 1 ] || fail "$1 needs a value"
          value=$2
          shift
        else
          value=${1#*=}
        fi
        name=$(printf '%s' "${name#--}" | tr 'a-z-' 'A-Z_')
        case $known in
          *" $name "*) printf -v "$name" '%s' "$value" ;;
          *) fail "no option --$(printf '%s' "$name" | tr 'A-Z_' 'a-z-'); there are:$(printf '%s' "${known% }" |
            tr 'A-Z_' 'a-z-' | sed 's/ / --/g') --spot --dry-run" ;;
        esac
        ;;
      *) if [ -n "$VERB" ]; then ARGS+=("$1"); else VERB=$1; fi ;;
    esac
    shift
  done
}

# need NAME "what it is, and how to find it"
need() {
  [ -n "${!1:-}" ] || fail "give --$(printf '%s' "$1" | tr 'A-Z_' 'a-z-') (or the variable $1): $2"
}

# read_topology: TOPOLOGY=v5p:4x4x4, as `jaxllm plan` writes it, gives CHIP, SHAPE and CHIPS.
read_topology() {
  need TOPOLOGY "chip and shape of a slice, such as v5p:4x4x4 or v6e:4x4"
  [[ $TOPOLOGY =~ ^(v4|v5e|v5p|v6e|tpu7x):([0-9]+)x([0-9]+)(x([0-9]+))?$ ]] ||
    fail "TOPOLOGY=$TOPOLOGY: write it as chip:AxB or chip:AxBxC, with v4, v5e, v5p, v6e or tpu7x; such as v5p:4x4x4"
  CHIP=${BASH_REMATCH[1]} SHAPE=${TOPOLOGY#*:}
  CHIPS=$((BASH_REMATCH[2] * BASH_REMATCH[3] * ${BASH_REMATCH[5]:-1}))
  case $CHIP:${BASH_REMATCH[5]:+3} in
    v5e: | v6e: | v4:3 | v5p:3 | tpu7x:3) ;;
    v5e:3 | v6e:3) fail "TOPOLOGY=$TOPOLOGY: $CHIP slices have two dimensions, such as $CHIP:4x4" ;;
    *) fail "TOPOLOGY=$TOPOLOGY: $CHIP slices have three dimensions, such as $CHIP:2x2x4" ;;
  esac
}

# The command that every host runs: the same each time, so that it goes on from the newest checkpoint. Processes are
# found by what the cluster says; exit code 75 says "stopped by a signal and saved" (0: finished, 2: a mistake in the
# settings or the data, 1 and others: a crash, or what may pass, such as a read from the bucket that failed). Needs TASK, CHECKPOINTS and ARGS; prints one word a line.
training_command() { # RUN-FILE-ON-THE-HOST
  printf '%s\n' "$TASK" "$1" ${ARGS[@]+"${ARGS[@]:1}"} \
    parallel.processes=null checkpoint.folder="$CHECKPOINTS" checkpoint.preempted_exit_code=75
}

need_training() {
  [ ${#ARGS[@]} -gt 0 ] || fail "name the settings file: $0 $VERB RUN.yaml [section.key=value ...]"
  case ${ARGS[0]} in
    *.yaml) [ -f "${ARGS[0]}" ] || fail "${ARGS[0]}: no such file" ;;
  esac
  need CHECKPOINTS "folder for the checkpoints, gs://BUCKET/RUN; the disk of a host goes away with it"
  case $CHECKPOINTS in
    gs://?*) ;;
    *) fail "CHECKPOINTS=$CHECKPOINTS: every host must see the folder, also after a new start; use gs://BUCKET/RUN" ;;
  esac
}

# A word as a shell reads it, with its line ends left as they are.
quoted() {
  case $1 in
    --*[!A-Za-z-]*=*) ;;
    --*=*) printf '%s=' "${1%%=*}" && set -- "${1#*=}" ;;
  esac
  case $1 in
    '' | *[!A-Za-z0-9_./:=,@%+-]*) printf "'%s'" "${1//\'/\'\\\'\'}" ;;
    *) printf '%s' "$1" ;;
  esac
}

# Shows a command as it can be typed, and runs it unless this is a dry run.
run() {
  local word line=
  for word in "$@"; do line+=" $(quoted "$word")"; done
  printf '%s\n' "${line# }"
  [ -n "$DRY_RUN" ] || "$@"
}
