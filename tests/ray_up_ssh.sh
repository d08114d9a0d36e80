#!/usr/bin/env bash
# What an operator does to serve on machines of their own, and to end it: the commands of docs/DEPLOY_RAY_UP.md. Run by
# tests/cluster/test_ray_up_ssh.py on a machine from which SSH reaches the others.
#
#   ray_up_ssh.sh up HEAD WORKER KEY MODEL      the folder serving/, and a service that answers
#   ray_up_ssh.sh down                          nothing of it on either machine
set -euo pipefail

up() {
    local head=$1 worker=$2 key=$3 model=$4
    shoal ray-up init serving --cloud on-premises --model "$model"
    cd serving
    sed -i "s|<10.0.0.10>|$head|; s|<10.0.0.11>|$worker|; s|<ubuntu>|$USER|; s|<~/.ssh/id_ed25519>|$key|" on-premises.yaml
    # A machine without GPUs, and what makes the answer the worker's.
    sed -i "s|^engine:|engine:\n  device: cpu\n  max_model_len: 512|" node/shoal.yaml
    sed -i "s|^server:|server:\n  node_labels: {shoal/role: replica}|" node/shoal.yaml
    sed -i "s|^cluster_name:.*|&\nmin_workers: 0|" on-premises.yaml # the head alone, at first
    shoal ray-up check on-premises.yaml
    ray up -y on-premises.yaml
    sed -i "s|^min_workers: 0|min_workers: 1|" on-premises.yaml
    ray up -y --no-restart on-premises.yaml
    ray exec on-premises.yaml 'bash ~/shoal/node.sh deploy'
}

down() {
    cd serving
    ray exec on-premises.yaml 'bash ~/shoal/node.sh stop'
    ray down -y on-premises.yaml
}

"$@"
