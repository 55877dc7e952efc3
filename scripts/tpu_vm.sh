#!/usr/bin/env bash
# Trains on Cloud TPU VMs: one host, a pod slice, or several slices. From your own machine, with gcloud logged in:
#
#   export PROJECT=my-project ZONE=us-east5-a NAME=llama TOPOLOGY=v5p:4x4x4 CHECKPOINTS=gs://my-bucket/llama
#   scripts/tpu_vm.sh create              # asks for the TPU and waits until it is there
#   scripts/tpu_vm.sh install             # this checkout and its extras, on every host
#   scripts/tpu_vm.sh train run.yaml      # starts the same command on every host, and returns
#   scripts/tpu_vm.sh watch run.yaml      # all of that where it is needed, again after each preemption, to the end
#   scripts/tpu_vm.sh logs                # what the first host says
#   scripts/tpu_vm.sh fetch               # its run folders, with metrics and profiles, into ./runs
#   scripts/tpu_vm.sh stop                # saves and stops; `train` goes on from there
#   scripts/tpu_vm.sh delete              # gives the TPU back: it costs money until then
#
# Options, each also as an environment variable (--name or NAME): PROJECT, ZONE, NAME, TOPOLOGY (chip and shape of one
# slice), CHECKPOINTS, SLICES (1), RUNTIME (by chip), TASK (train; sft, dpo or distill), EXTRAS (tpu,gcs,data), POLL
# (60 s), RETRIES (10 crashes), --spot for preemptible capacity; CREATE_FLAGS and SSH_FLAGS are more words for gcloud,
# such as CREATE_FLAGS="--reserved --service-account=..." and SSH_FLAGS=--tunnel-through-iap. --dry-run prints every
# command and runs none. Nothing secret is needed here: gcloud holds your login, and the hosts act as their service
# account, which needs access to the bucket (roles/storage.objectUser). For more than one host gcloud wants its ssh key
# in an agent: `ssh-add ~/.ssh/google_compute_engine`.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=scripts/steps.sh
. "$root/scripts/steps.sh"

PROJECT=${PROJECT:-} ZONE=${ZONE:-} NAME=${NAME:-}
SLICES=${SLICES:-1} TASK=${TASK:-train} EXTRAS=${EXTRAS:-tpu,gcs,data} POLL=${POLL:-60} RETRIES=${RETRIES:-10}
read_options \
  "PROJECT ZONE NAME TOPOLOGY CHECKPOINTS SLICES RUNTIME TASK EXTRAS POLL RETRIES CREATE_FLAGS SSH_FLAGS" "$@"
read -ra create_flags <<<"${CREATE_FLAGS:-}"
read -ra ssh_flags <<<"${SSH_FLAGS:-}"

tpus() { # GROUP COMMAND NAME...
  local group=$1 command=$2
  shift 2
  run gcloud compute tpus "$group" "$command" "$@" --project="$PROJECT" --zone="$ZONE"
}

on_hosts() { # SCRIPT [--worker=0 --node=0]: runs a script on all hosts, or on those named
  local script=$1
  shift
  [ $# -gt 0 ] || set -- --worker=all --node=all
  tpus queued-resources ssh "$NAME" "$@" ${ssh_flags[@]+"${ssh_flags[@]}"} --command="$script"
}

to_hosts() { # FILE: into the home folder of every host
  tpus queued-resources scp "$1" "$NAME:" --worker=all --node=all ${ssh_flags[@]+"${ssh_flags[@]}"}
}

# gcloud refuses to talk to several hosts unless its key is in the agent of ssh, since it cannot ask each for the
# passphrase. Where TOPOLOGY is not given the hosts cannot be counted, and gcloud says so itself.
need_agent() {
  local key=$HOME/.ssh/google_compute_engine tilde=\~ i print
  several_hosts && [ -z "$DRY_RUN" ] || return 0
  for i in ${ssh_flags[@]+"${!ssh_flags[@]}"}; do
    case ${ssh_flags[i]} in
      --ssh-key-file) key=${ssh_flags[i + 1]-} ;;
      --ssh-key-file=*) key=${ssh_flags[i]#*=} ;;
    esac
  done
  print=$(ssh-keygen -lf "$key" 2>/dev/null | cut -d' ' -f2) && [ -n "$print" ] ||
    fail "$key: no key to reach several hosts by; make one by \`ssh-keygen -t rsa -f $key\`, then \`ssh-add $key\`"
  ssh-add -l 2>/dev/null | grep -qF -- "$print" ||
    fail "several hosts, and the agent of ssh does not hold the key: run \`ssh-add ${key/#"$HOME"/$tilde}\`" \
      "(before it \`eval \"\$(ssh-agent)\"\` where no agent runs)"
}

several_hosts() {
  [ "$SLICES" = 1 ] || return 0
  [ -n "${TOPOLOGY:-}" ] || return 1
  read_topology
  case $CHIP in
    v5e | v6e) [ "$CHIPS" -gt 8 ] ;; # 2x4 is one host of eight chips
    *) [ "$CHIPS" -gt 4 ] ;;
  esac
}

nodes() {
  if [ "$SLICES" = 1 ]; then
    echo "$NAME"
  else
    for ((i = 0; i < SLICES; i++)); do echo "$NAME-$i"; done
  fi
}

create() {
  local runtime=${RUNTIME:-} shape
  read_topology
  case $CHIP in
    v4) runtime=${runtime:-tpu-ubuntu2204-base} shape="--type=v4 --topology=$SHAPE" ;;
    v5p) runtime=${runtime:-v2-alpha-tpuv5} shape="--type=v5p --topology=$SHAPE" ;;
    # In two dimensions the number of chips says the shape; the name of the type counts chips.
    v5e) runtime=${runtime:-v2-alpha-tpuv5-lite} shape="--accelerator-type=v5litepod-$CHIPS" ;;
    v6e) runtime=${runtime:-v2-alpha-tpuv6e} shape="--accelerator-type=v6e-$CHIPS" ;;
    *) fail "TOPOLOGY=$TOPOLOGY: $CHIP is offered on GKE only; see scripts/gke.sh" ;;
  esac
  say "A queued resource is a request that waits until there are $SLICES x $TOPOLOGY ($CHIPS chips each)."
  local slices=(--node-id="$NAME")
  [ "$SLICES" = 1 ] || slices=(--node-count="$SLICES" --node-prefix="$NAME")
  # shellcheck disable=SC2086  # shape is two words
  tpus queued-resources create "$NAME" "${slices[@]}" $shape --runtime-version="$runtime" ${SPOT:+--spot} \
    ${create_flags[@]+"${create_flags[@]}"}
}

# ACTIVE, WAITING_FOR_RESOURCES, SUSPENDED, ...; ABSENT when there is no such request, PREEMPTED when a slice is gone,
# UNKNOWN when gcloud could not tell (it says why).
state() {
  local found node
  if ! found=$(gcloud compute tpus queued-resources describe "$NAME" --project="$PROJECT" --zone="$ZONE" \
    --format='value(state.state)' 2>&1); then
    case $found in
      *NOT_FOUND* | *"not found"*) echo ABSENT ;;
      *) printf '%s\n' "$found" >&2 && echo UNKNOWN ;;
    esac
    return
  fi
  found=$(tail -n 1 <<<"$found")
  if [ "$found" = ACTIVE ]; then
    for node in $(nodes); do
      case $(gcloud compute tpus tpu-vm describe "$node" --project="$PROJECT" --zone="$ZONE" \
        --format='value(state)' 2>/dev/null | tail -n 1) in
        PREEMPTED | TERMINATED | STOPPED) found=PREEMPTED ;;
      esac
    done
  fi
  echo "$found"
}

wait_until_active() {
  say "Waits until it is ACTIVE; Ctrl-C loses nothing, the request stays."
  [ -z "$DRY_RUN" ] || { tpus queued-resources describe "$NAME" --format='value(state.state)' && return; }
  local now before=
  while now=$(state) && [ "$now" != ACTIVE ]; do
    [ "$now" = "$before" ] || echo "$NAME is $now"
    case $now in
      FAILED | SUSPENDED | ABSENT)
        fail "$NAME is $now: \`gcloud compute tpus queued-resources describe $NAME\` says why"
        ;;
    esac
    before=$now
    sleep "$POLL"
  done
}

install() {
  local archive=$root/.cache/jaxllm.tar.gz install_script
  say "Packs the committed files of this checkout, and copies them to every host."
  mkdir -p "$root/.cache" &&
    run git -C "$root" archive --format=tar.gz --output="$archive" HEAD &&
    to_hosts "$archive" || return 1
  say "Installs jaxllm[$EXTRAS] on every host, with a Python of its own: those of the images are older than 3.11."
  install_script=$(
    cat <<END
set -eu
mkdir -p jaxllm-run
rm -rf jaxllm-src jaxllm-env/ready
mkdir jaxllm-src
tar -xzf jaxllm.tar.gz -C jaxllm-src
export PATH="\$HOME/.local/bin:\$PATH"
command -v uv >/dev/null || PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv
test -x jaxllm-env/bin/python || uv venv --quiet --python 3.12 jaxllm-env
uv pip install --quiet --python jaxllm-env/bin/python --reinstall-package jaxllm "./jaxllm-src[$EXTRAS]"
jaxllm-env/bin/jaxllm --version
touch jaxllm-env/ready
END
  )
  on_hosts "$install_script"
}

# On a host: ~/jaxllm-run has the settings, log, pid, and once the command has ended, its code in `exit`. The command
# leads a process group of its own, so that it outlives the ssh connection and can be stopped whole.
start() {
  local words file=${ARGS[0]} start_script
  words=$(training_command "$(basename "$file")" | while IFS= read -r word; do printf '%q ' "$word"; done)
  if [ -f "$file" ]; then
    say "Copies the settings, so that all hosts have the same."
    to_hosts "$file" || return 1
  fi
  say "Starts the same command on every host. jax finds the others by the metadata of the TPU."
  start_script=$(
    cat <<END
set -eu
[ ! -f ~/$(printf %q "$(basename "$file")") ] || mv -f ~/$(printf %q "$(basename "$file")") ~/jaxllm-run/
cd ~/jaxllm-run
if [ -s pid ] && kill -0 "\$(cat pid)" 2>/dev/null; then echo "\$(hostname): runs already"; exit 0; fi
rm -f exit
# Start and end of the TPU's runtime are much faster with huge pages (v5e and newer).
sudo sh -c 'echo always > /sys/kernel/mm/transparent_hugepage/enabled' || true
cat > start.sh <<'SCRIPT'
trap : TERM
~/jaxllm-env/bin/jaxllm ${words% } >> log 2>&1
echo \$? > exit
SCRIPT
nohup setsid bash start.sh </dev/null >/dev/null 2>&1 &
echo \$! > pid
END
  )
  on_hosts "$start_script"
}

stop() {
  say "SIGTERM on every host: the run saves, and ends with code 75. Who has not ended after ten minutes is killed."
  # shellcheck disable=SC2016  # for the host's shell
  on_hosts 'cd ~/jaxllm-run 2>/dev/null && [ -s pid ] || exit 0
group=$(cat pid)
kill -TERM -- "-$group" 2>/dev/null || exit 0
for _ in $(seq 600); do kill -0 -- "-$group" 2>/dev/null || exit 0; sleep 1; done
kill -KILL -- "-$group"'
}

# How far the first host is: absent (not installed), running, stopped (rebooted), or the exit code of the command.
# shellcheck disable=SC2016  # for the host's shell
STATUS='if [ ! -e ~/jaxllm-env/ready ]; then echo absent
elif [ -s ~/jaxllm-run/exit ]; then cat ~/jaxllm-run/exit
elif [ -s ~/jaxllm-run/pid ] && kill -0 "$(cat ~/jaxllm-run/pid)" 2>/dev/null; then echo running
else echo stopped; fi'

# Or unreachable, with what gcloud and ssh said; what they say where all is well is of no use.
status() {
  local found said
  said=$(mktemp)
  if found=$(gcloud compute tpus queued-resources ssh "$NAME" --worker=0 --node=0 --project="$PROJECT" --zone="$ZONE" \
    ${ssh_flags[@]+"${ssh_flags[@]}"} --command="$STATUS" 2>"$said" </dev/null) && [ -n "$found" ]; then
    tail -n 1 <<<"$found"
  else
    tail -n 5 "$said" >&2
    echo unreachable
  fi
  rm -f "$said"
}

start_over() { stop && install && start; }

# So often in a row nobody answers (gcloud's state of the request, or ssh) before it counts as a crash.
UNREACHABLE=5

replace() { tpus queued-resources delete "$NAME" --force --quiet && create; }

crashed() { # WHAT
  failures=$((failures + 1))
  [ "$failures" -le "$RETRIES" ] || fail "$1 ($failures times); \`$0 logs\` shows what the first host says"
  say "$1: tries again ($failures of $RETRIES)"
}

watch() {
  local failures=0 up=0 lost=0 before='' now
  if [ -n "$DRY_RUN" ]; then
    say "Every $POLL s: is the TPU there, and how far is the first host?"
    tpus queued-resources describe "$NAME" --format='value(state.state)'
    on_hosts "$STATUS" --worker=0 --node=0
    say "Where the TPU was preempted: the request is made anew, and the same command goes on from $CHECKPOINTS."
    replace && wait_until_active && start_over
    return
  fi
  while :; do
    now=$(state)
    [ "$now" != ACTIVE ] || now=$(status)
    [ "$now" = "$before" ] || echo "$(date '+%F %T') $NAME: $now"
    before=$now
    case $now in
      unreachable | UNKNOWN) lost=$((lost + 1)) ;;
      *) lost=0 ;;
    esac
    case $now in
      unreachable | UNKNOWN)
        # Nothing is stopped or started: the run may well go on, and who cannot ask cannot start it either.
        [ $((lost % UNREACHABLE)) -gt 0 ] || { up=0 && crashed "no answer, $lost times in a row"; }
        ;;
      running)
        up=$((up + 1))
        [ "$up" -lt 60 ] || failures=0 # an hour without a crash
        ;;
      ABSENT) create || crashed "the TPU could not be asked for" ;;
      PREEMPTED | SUSPENDED)
        say "The TPU was taken away: asks for another."
        replace || crashed "the TPU could not be asked for"
        ;;
      FAILED) crashed "the request for the TPU failed" && replace || true ;;
      0) echo "finished" && return ;;
      2) fail "the settings or the data must be changed; \`$0 logs\` shows how" ;;
      absent | stopped | 75) start_over || crashed "it could not be started" ;;
      [0-9]*) up=0 && crashed "the run ended with code $now" && start_over || true ;;
      *) ;; # waiting for the TPU
    esac
    sleep "$POLL"
  done
}

need PROJECT "the Google Cloud project; \`gcloud projects list\` shows yours"
need ZONE "where the TPU is; \`gcloud compute tpus locations list\` shows the zones"
need NAME "a name for the TPU, such as llama"
case $VERB in
  create) create && wait_until_active ;;
  install) need_agent && install ;;
  train) need_training && need_agent && start ;;
  watch) need_training && read_topology && need_agent && watch ;;
  logs) on_hosts 'tail -n 100 -f ~/jaxllm-run/log' --worker=0 --node=0 ;;
  fetch)
    tpus queued-resources scp "$NAME:jaxllm-run/runs" . --recurse --worker=0 --node=0 \
      ${ssh_flags[@]+"${ssh_flags[@]}"}
    ;;
  stop) need_agent && stop ;;
  delete)
    say "Gives the TPU back. What is in the bucket stays."
    tpus queued-resources delete "$NAME" --force --quiet
    ;;
  *) fail "no verb '$VERB'; there are create, install, train, watch, logs, fetch, stop and delete" ;;
esac
