#!/usr/bin/env bash
# What `ray up` has each node do. It lies in ~/shoal, with the deployment's files; what it makes is in ~/.shoal.
#
#   node.sh install [REQUIREMENT]  Shoal, and its settings for Ray in ~/.shoal/env, which every shell reads
#   node.sh add PACKAGE...         more Python packages beside it
#   node.sh weights [OPTION...]    what shoal.yaml names by hub id into this node's cache (options of `hf download`)
#   node.sh redis                  on the head: a Redis for this cluster
#   node.sh deploy [OPTION...]     on the head: `shoal deploy` of shoal.yaml, with that Redis where there is one
#   node.sh stop                   the end of Ray and Redis here; on the head, of Ray on the workers, too
set -euo pipefail
umask 077

FILES=$HOME/shoal
OWN=$HOME/.shoal
REDIS_PORT=6380 # 6379 is Ray's
DASHBOARD=http://127.0.0.1:8265

# From REQUIREMENT where there is one; else the wheel that lies in ~/shoal; else the image's own; else the index's.
install() {
    local requirement=${1:-$(find "$FILES" -maxdepth 1 -name 'shoal-*.whl' | sort -V | tail -n 1)}
    local bin
    mkdir -p "$OWN"
    if [ -z "$requirement" ] && bin=$(command -v shoal); then
        bin=$(dirname "$bin")
    else
        [ -x "$OWN/venv/bin/pip" ] || make_venv
        bin=$OWN/venv/bin
        if [ ! -f "$requirement" ]; then
            "$bin/pip" install --quiet --disable-pip-version-check "${requirement:-shoal}"
        elif [ "$(sha256sum < "$requirement")" != "$(cat "$OWN/wheel" 2> /dev/null)" ]; then # never under a running Ray twice
            "$bin/pip" install --quiet --disable-pip-version-check "$requirement"
            "$bin/pip" install --quiet --disable-pip-version-check --no-deps --force-reinstall "$requirement"
            sha256sum < "$requirement" > "$OWN/wheel"
        fi
    fi
    {
        echo "export PATH=\"$bin:\$PATH\""
        "$bin/python3" -P -m shoal.cluster.ray_env "$OWN/run"
    } > "$OWN/env.new"
    mv "$OWN/env.new" "$OWN/env"
    grep -qxF '. ~/.shoal/env' ~/.bashrc || echo '. ~/.shoal/env' >> ~/.bashrc
}

make_venv() {
    local python
    package python3-venv
    for python in python3 python3.13 python3.12 python3.11; do
        if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; then
            "$python" -m venv "$OWN/venv"
            return
        fi
    done
    echo "node.sh: no Python 3.11 or newer on this machine" >&2
    exit 1
}

add() {
    "$(command -v python3)" -m pip install --quiet --disable-pip-version-check "$@"
}

weights() {
    local model
    python3 -P -m shoal.cluster.ray_up models "$FILES/shoal.yaml" | while read -r model; do
        HF_TOKEN_PATH=$FILES/hf-token hf download "$model" "$@" < /dev/null
    done
}

redis() {
    local folder=$OWN/redis address
    if ! command -v redis-server > /dev/null; then
        package redis-server
        as_root systemctl disable --now redis-server # Debian starts one, on Ray's port
    fi
    address=$(node_address)
    mkdir -p "$folder"
    cat > "$folder/new.conf" << END
bind $address
port $REDIS_PORT
protected-mode yes
requirepass $(cat "$FILES/redis-password")
maxmemory 1gb
maxmemory-policy allkeys-lru
save ""
appendonly no
dir $folder
pidfile $folder/redis.pid
logfile $folder/redis.log
daemonize yes
END
    if cmp -s "$folder/new.conf" "$folder/redis.conf" && ask_redis ping > /dev/null; then
        return
    fi
    stop_redis
    mv "$folder/new.conf" "$folder/redis.conf"
    redis-server "$folder/redis.conf"
}

ask_redis() {
    local address
    address=$(sed -n 's/^bind //p' "$OWN/redis/redis.conf")
    REDISCLI_AUTH=$(sed -n 's/^requirepass //p' "$OWN/redis/redis.conf") redis-cli -e -h "$address" -p "$REDIS_PORT" "$@"
}

stop_redis() {
    if [ -f "$OWN/redis/redis.conf" ]; then
        ask_redis shutdown nosave > /dev/null 2>&1 || true
        rm "$OWN/redis/redis.conf"
    fi
}

deploy() {
    local files=(--secret-file "$FILES/secret")
    if [ -f "$FILES/api-keys" ]; then
        files+=(--api-key-file "$FILES/api-keys")
    fi
    if [ -f "$OWN/redis/redis.conf" ]; then
        files+=(--redis-url "redis://$(node_address):$REDIS_PORT/0" --redis-password-file "$FILES/redis-password")
    fi
    await_dashboard
    shoal deploy --config "$FILES/shoal.yaml" --address "$DASHBOARD" "${files[@]}" "$@"
}

await_dashboard() { # up to a minute: `ray start` returns before it answers
    local status
    for _ in {1..60}; do
        status=$(curl -s -o /dev/null -w '%{http_code}' "$DASHBOARD/api/serve/applications/" \
            -H @<(printf 'Authorization: Bearer %s' "$(cat ~/.ray/auth_token)") || true)
        case $status in
        2?? | 4??) return ;;
        esac
        sleep 1
    done
}

stop() {
    local worker
    ray stop # the head's first: its autoscaler would start the workers anew
    stop_redis
    for worker in $(python3 -P -m shoal.cluster.ray_up workers ~/ray_bootstrap_config.yaml); do
        ssh -i ~/ray_bootstrap_key.pem -o BatchMode=yes -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null \
            -o LogLevel=ERROR "$worker" 'bash ~/shoal/node.sh stop' < /dev/null
    done
}

node_address() { # as Ray sees it
    python3 -P -c 'import ray.util; print(ray.util.get_node_ip_address())'
}

package() {
    if ! dpkg -s "$1" > /dev/null 2>&1; then
        as_root apt-get -o DPkg::Lock::Timeout=300 update -q # a fresh image is busy with its own updates
        as_root env DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 install -q -y "$1"
    fi
}

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi
}

if [ -f "$OWN/env" ]; then
    . "$OWN/env"
fi
case ${1:-} in
install | add | weights | redis | deploy | stop) "$@" ;;
*)
    sed -n '/^#   node.sh/s/^# *//p' "$0" >&2
    exit 2
    ;;
esac
