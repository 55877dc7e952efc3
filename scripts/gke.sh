#!/usr/bin/env bash
# Trains on TPU slices of a GKE cluster, by a JobSet. From your own machine, with gcloud, kubectl and docker:
#
#   export PROJECT=my-project REGION=us-east5 ZONE=us-east5-a CLUSTER=tpus NAME=llama TOPOLOGY=v5p:4x4x4
#   export IMAGE=us-docker.pkg.dev/my-project/images/jaxllm CHECKPOINTS=gs://my-bucket/llama
#   scripts/gke.sh create             # a cluster, a node pool for each slice, the JobSet controller
#   scripts/gke.sh image              # builds this checkout as a container image, and pushes it
#   scripts/gke.sh train run.yaml     # starts the run on every host; GKE starts it again after each preemption
#   scripts/gke.sh status             # the run and its pods
#   scripts/gke.sh logs               # what the first host says
#   scripts/gke.sh stop               # saves and stops; `train` goes on from there
#   scripts/gke.sh delete             # deletes the node pools, which cost money until then, and the cluster
#   scripts/gke.sh manifest run.yaml  # the manifest that `train` creates, to look at or to change
#
# Options, each also as an environment variable (--name or NAME): PROJECT, REGION, ZONE, CLUSTER, NAME, TOPOLOGY (chip
# and shape of one slice), IMAGE, CHECKPOINTS, SLICES (1), TASK (train; sft, dpo or distill), EXTRAS (tpu,gcs,data),
# QUEUE (multislice-queue, as xpk makes it), RESTARTS (50), --spot for preemptible nodes; CREATE_FLAGS are more words
# for the node pools, such as CREATE_FLAGS="--reservation-affinity=specific --reservation=...". --dry-run prints every
# command and runs none. Nothing secret is needed here: gcloud holds your login, and pods on the host's network act as
# the service account of the node pool, which needs access to the bucket (roles/storage.objectUser). A cluster made by
# `xpk cluster create` will do as well, and is the way to tpu7x: begin with `image`.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=scripts/steps.sh
. "$root/scripts/steps.sh"

PROJECT=${PROJECT:-} REGION=${REGION:-} ZONE=${ZONE:-} CLUSTER=${CLUSTER:-} NAME=${NAME:-} IMAGE=${IMAGE:-}
SLICES=${SLICES:-1} TASK=${TASK:-train} EXTRAS=${EXTRAS:-tpu,gcs,data} QUEUE=${QUEUE:-multislice-queue}
RESTARTS=${RESTARTS:-50} JOBSET=v0.10.1
read_options \
  "PROJECT REGION ZONE CLUSTER NAME TOPOLOGY IMAGE CHECKPOINTS SLICES TASK EXTRAS QUEUE RESTARTS CREATE_FLAGS" "$@"
read -ra create_flags <<<"${CREATE_FLAGS:-}"

need_cluster() {
  need PROJECT "the Google Cloud project; \`gcloud projects list\` shows yours"
  need REGION "the region of the cluster, such as us-east5"
  need CLUSTER "a name for the cluster"
}

# What GKE calls a chip, and its hosts. A host of a slice has four chips.
read_slice() {
  read_topology
  [ $((CHIPS % 4)) = 0 ] || fail "TOPOLOGY=$TOPOLOGY: hosts have 4 chips, and $CHIPS do not divide by that"
  HOSTS=$((CHIPS / 4))
  # cloud.google.com/kubernetes-engine/docs/how-to/tpu-multislice: slices of a Multislice are multi-host node pools.
  local larger=2x4
  [[ $SHAPE != *x*x* ]] || larger=2x2x2
  [ "$SLICES" = 1 ] || [ "$HOSTS" -gt 1 ] ||
    fail "SLICES=$SLICES of TOPOLOGY=$TOPOLOGY: GKE joins slices of two hosts or more only, and these have one;" \
      "take TOPOLOGY=$CHIP:$larger or larger, or SLICES=1"
  case $CHIP in
    v4) ACCELERATOR=tpu-v4-podslice machine=ct4p-hightpu-4t ;;
    v5e) ACCELERATOR=tpu-v5-lite-podslice machine=ct5lp-hightpu-4t ;;
    v5p) ACCELERATOR=tpu-v5p-slice machine=ct5p-hightpu-4t ;;
    v6e) ACCELERATOR=tpu-v6e-slice machine=ct6e-standard-4t ;;
    tpu7x) ACCELERATOR=tpu7x machine= ;;
  esac
}

clusters() { # GROUP COMMAND NAME...
  local group=$1 command=$2
  shift 2
  run gcloud container "$group" "$command" "$@" --project="$PROJECT" --location="$REGION"
}

create() {
  local i pool
  need ZONE "where the TPUs are, such as us-east5-a"
  need NAME "a name for the run, and the node pools"
  read_slice
  [ -n "$machine" ] || fail "TOPOLOGY=$TOPOLOGY: make the cluster by \`xpk cluster create --tpu-type=$CHIP-$SHAPE\`"
  say "The cluster, with a small node for its own services."
  clusters clusters create "$CLUSTER" --node-locations="$ZONE" --machine-type=e2-standard-8 --num-nodes=1
  say "A node pool for each of $SLICES slices of $TOPOLOGY: $HOSTS hosts each."
  for ((i = 0; i < SLICES; i++)); do
    pool=(--node-locations="$ZONE" --machine-type="$machine" --num-nodes="$HOSTS" --scopes=cloud-platform)
    # A pool of one host is no multi-host slice, and has no topology to place it by.
    [ "$HOSTS" = 1 ] || pool+=(--tpu-topology="$SHAPE")
    clusters node-pools create "$NAME-$i" --cluster="$CLUSTER" "${pool[@]}" ${SPOT:+--spot} \
      ${create_flags[@]+"${create_flags[@]}"}
  done
  say "kubectl talks to this cluster from here on, and the cluster learns what a JobSet is."
  clusters clusters get-credentials "$CLUSTER"
  run kubectl apply --server-side \
    -f "https://github.com/kubernetes-sigs/jobset/releases/download/$JOBSET/manifests.yaml"
  run kubectl rollout status deployment/jobset-controller-manager --namespace=jobset-system --timeout=5m
}

image() {
  need IMAGE "where the image goes, such as us-docker.pkg.dev/PROJECT/REPOSITORY/jaxllm"
  say "Builds the committed files of this checkout. docker may push after" \
    "\`gcloud auth configure-docker ${IMAGE%%/*}\`."
  run bash -o pipefail -c "git -C $(quoted "$root") archive HEAD |
  docker build --platform=linux/amd64 --build-arg=EXTRAS=$(quoted "$EXTRAS") \\
    -f scripts/Dockerfile -t $(quoted "$IMAGE") -"
  run docker push "$IMAGE"
}

# The words of the command as a list in JSON, which is YAML too.
command_list() {
  local word list=
  while IFS= read -r word; do
    word=${word//\\/\\\\}
    list="$list, \"${word//\"/\\\"}\""
  done < <(training_command "$1")
  printf '[%s]' "${list#, }"
}

manifest() {
  local text file=${ARGS[0]} name value
  [ ! -f "$file" ] || file=settings/$(basename "$file")
  text=$(cat "$root/scripts/gke_jobset.yaml")
  while IFS='=' read -r name value; do
    text=${text//"\${$name}"/"$value"}
  done <<END
NAME=$NAME
QUEUE=$QUEUE
RESTARTS=$RESTARTS
SLICES=$SLICES
HOSTS=$HOSTS
ACCELERATOR=$ACCELERATOR
SHAPE=$SHAPE
IMAGE=$IMAGE
COMMAND=$(command_list "$file")
END
  printf '%s\n' "$text"
}

need_manifest() {
  need NAME "a name for the run, such as llama"
  [[ $NAME =~ ^[a-z]([a-z0-9-]{0,26}[a-z0-9])?$ ]] ||
    fail "NAME=$NAME: at most 28 small letters, digits and dashes; GKE makes longer names of it"
  need IMAGE "the image that \`$0 image\` pushes"
  need_training
  read_slice
}

train() {
  local settings=--from-literal=none=
  [ ! -f "${ARGS[0]}" ] || settings=--from-file=${ARGS[0]}
  say "The settings, for all pods to read."
  run bash -o pipefail -c "kubectl create configmap $NAME-settings $(quoted "$settings") --dry-run=client -o yaml |
  kubectl apply -f -"
  say "The run goes on from $CHECKPOINTS whenever its pods start. An ended one of this name goes away by \`$0 stop\`."
  if [ -n "$DRY_RUN" ]; then
    printf "kubectl create -f - <<'END'\n%s\nEND\n" "$(manifest)"
  else
    manifest | kubectl create -f -
  fi
}

first=jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0
case $VERB in
  create) need_cluster && create ;;
  image) image ;;
  manifest) need_manifest && manifest ;;
  train) need_manifest && train ;;
  status)
    need NAME "the name of the run"
    run kubectl get jobset,pods --selector="xpk.google.com/workload=$NAME" -o wide
    ;;
  logs)
    need NAME "the name of the run"
    run kubectl logs --follow --tail=100 --selector="xpk.google.com/workload=$NAME,$first"
    ;;
  stop)
    need NAME "the name of the run"
    say "SIGTERM in every pod: the run saves and ends."
    run kubectl delete jobset "$NAME" --ignore-not-found
    ;;
  delete)
    need_cluster
    say "Deletes the cluster with its node pools. What is in the bucket stays."
    clusters clusters delete "$CLUSTER" --quiet
    ;;
  *) fail "no verb '$VERB'; there are create, image, train, status, logs, stop, delete and manifest" ;;
esac
