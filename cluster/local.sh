#!/usr/bin/env bash
# A Ray cluster on this machine: a head without CPUs for tasks, and workers, each a process of its own with one CPU.
#
#   cluster/local.sh up [WORKERS]    start a head and WORKERS (2) workers, and wait until they have joined
#   cluster/local.sh add [WORKERS]   start WORKERS (1) more
#   cluster/local.sh status          what runs, where the dashboard is
#   cluster/local.sh env             what a shell needs to talk to it: eval "$(cluster/local.sh env)"
#   cluster/local.sh down [NAME]     end all of it, or one worker, as a spot machine is taken away: it is drained first
#
# It asks for a token made here, so that others cannot use it: the dashboard is on 127.0.0.1, Ray's own ports are not,
# and its metrics can be read without the token. Only what this script started is ended. The token, logs and Ray's files
# are in LOCAL_CLUSTER, a folder with a short path (/tmp/metadist-cluster-<user id>).
set -euo pipefail

LOCAL_CLUSTER=${LOCAL_CLUSTER:-/tmp/metadist-cluster-$(id -u)}
CPUS=${CPUS:-1}       # of each worker
GPUS=${GPUS:-0}       # of each worker
STORE=${STORE:-200000000}  # bytes of shared memory of each process for Ray's objects
LONGEST_PATH=33  # of LOCAL_CLUSTER: the paths of Ray's sockets in it must not be longer than a system allows

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
[ -x "$here/.venv/bin/ray" ] && PATH=$here/.venv/bin:$PATH  # jobs run the python of the head's PATH

fail() { echo "local.sh: $*" >&2; exit "${code:-1}"; }

# Of every `ray start` here: who may talk to it, and a host that is gone is noticed after 6 s in place of 64.
environment() {
  export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$LOCAL_CLUSTER/token
  export RAY_health_check_initial_delay_ms=0 RAY_health_check_period_ms=500
  export RAY_health_check_timeout_ms=1500 RAY_health_check_failure_threshold=3
  export RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=1  # several nodes on a Mac, too
  export RAY_USAGE_STATS_ENABLED=0 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
  export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=${RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S:-5}
}

# WANTED: it, or a free port where another process has it; 0: any free one.
free_port() {
  python - "$1" <<'PYTHON'
import socket, sys
for port in (int(sys.argv[1]), 0):
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        print(probe.getsockname()[1])
        break
PYTHON
}

# When process PID began: a number may be given to another process later.
began() { ps -o lstart= -p "$1" 2>/dev/null || true; }

runs() {
  local pid start
  [ -f "$LOCAL_CLUSTER/$1.pid" ] && { read -r pid && read -r start; } <"$LOCAL_CLUSTER/$1.pid" || return 1
  [ "$(began "$pid")" = "$start" ]
}

names() {
  local file
  for file in "$LOCAL_CLUSTER"/head.pid "$LOCAL_CLUSTER"/worker-*.pid; do
    [ -e "$file" ] && basename "$file" .pid
  done
  true
}

# NAME ARGUMENTS...: start a node in the background, and wait until it has joined. Each has a folder of its own, else
# one would remove the working directories of another's jobs. One after another: a start takes a core for seconds, and
# Ray gives up after thirty.
start() {
  local name=$1 pid
  shift
  echo "starting ${name/#head/the head}" >&2
  : >"$LOCAL_CLUSTER/$name.log"
  set -m  # a process group of its own: what ends this script or its terminal does not end it
  nohup ray start --block --node-ip-address=127.0.0.1 --object-store-memory="$STORE" --disable-usage-stats \
    --min-worker-port=0 --max-worker-port=0 --dashboard-agent-listen-port="$(free_port 0)" \
    --temp-dir="$LOCAL_CLUSTER/$name" "$@" >>"$LOCAL_CLUSTER/$name.log" 2>&1 </dev/null &
  pid=$!
  set +m
  printf '%s\n%s\n' "$pid" "$(began "$pid")" >"$LOCAL_CLUSTER/$name.pid"
  until grep -q "Ray runtime started" "$LOCAL_CLUSTER/$name.log"; do
    if ! runs "$name"; then
      tail -n 20 "$LOCAL_CLUSTER/$name.log" >&2
      fail "$name did not start; its log is $LOCAL_CLUSTER/$name.log"
    fi
    sleep 0.2
  done
}

add() {
  local last=0 name number
  runs head || fail "no cluster runs here: cluster/local.sh up"
  environment
  for name in $(names); do
    name=${name#worker-}
    [ "$name" != head ] && [ "$name" -gt "$last" ] && last=$name
  done
  for ((number = last + 1; number <= last + $1; number++)); do
    start "worker-$number" --address="127.0.0.1:$(cat "$LOCAL_CLUSTER/port")" --num-cpus="$CPUS" --num-gpus="$GPUS"
  done
}

up() {
  local port dashboard
  command -v ray >/dev/null || fail "there is no ray command: activate the virtual environment that has metadist"
  [ ${#LOCAL_CLUSTER} -le $LONGEST_PATH ] || fail "LOCAL_CLUSTER=$LOCAL_CLUSTER is longer than $LONGEST_PATH characters"
  ! runs head || fail "a cluster runs already: cluster/local.sh status"
  (umask 077 && mkdir -p "$LOCAL_CLUSTER")
  [ -O "$LOCAL_CLUSTER" ] && [ ! -L "$LOCAL_CLUSTER" ] || fail "$LOCAL_CLUSTER is not yours: set LOCAL_CLUSTER"
  chmod 700 "$LOCAL_CLUSTER"
  rm -f "$LOCAL_CLUSTER"/*.pid "$LOCAL_CLUSTER"/*.log "$LOCAL_CLUSTER/token"
  (umask 077 && python -c 'import secrets; print(secrets.token_hex(32), end="")' >"$LOCAL_CLUSTER/token")
  environment
  port=$(free_port 6379)
  dashboard=$(free_port 8265)
  echo "$port" >"$LOCAL_CLUSTER/port"
  echo "http://127.0.0.1:$dashboard" >"$LOCAL_CLUSTER/dashboard"
  start head --head --port="$port" --num-cpus=0 --num-gpus=0 \
    --include-dashboard=true --dashboard-host=127.0.0.1 --dashboard-port="$dashboard" --ray-client-server-port="$(free_port 0)"
  add "$1"
  status
  echo "Next: eval \"\$(cluster/local.sh env)\""
}

status() {
  local name
  runs head || fail "no cluster runs here: cluster/local.sh up"
  echo "dashboard and jobs: $(cat "$LOCAL_CLUSTER/dashboard")"
  for name in $(names); do
    if runs "$name"; then echo "$name: runs (process $(head -n 1 "$LOCAL_CLUSTER/$name.pid"))"; else echo "$name: has ended"; fi
  done
}

env_of_a_shell() {
  runs head || fail "no cluster runs here: cluster/local.sh up"
  echo "export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$LOCAL_CLUSTER/token"
  echo "export RAY_API_SERVER_ADDRESS=$(cat "$LOCAL_CLUSTER/dashboard")"
}

# PID: it and all that it started.
descendants() {
  local child
  echo "$1"
  for child in $(ps -A -o pid= -o ppid= | awk -v parent="$1" '$2 == parent { print $1 }'); do descendants "$child"; done
}

# NAME...: TERM, which has Ray drain the node; what is left of it after 20 s is killed.
stop() {
  local name pid all="" end=$((SECONDS + 20))
  for name in "$@"; do
    runs "$name" || continue
    pid=$(head -n 1 "$LOCAL_CLUSTER/$name.pid")
    all="$all $(descendants "$pid")"
    kill -TERM "$pid"
  done
  for name in "$@"; do
    while runs "$name" && [ $SECONDS -lt $end ]; do sleep 0.2; done
    rm -f "$LOCAL_CLUSTER/$name.pid"
  done
  for pid in $all; do kill -KILL "$pid" 2>/dev/null || true; done
}

down() {
  local workers
  if [ -n "$1" ]; then
    runs "$1" || { code=2; fail "there is no $1 here: cluster/local.sh status"; }
    stop "$1"
    return
  fi
  workers=$(names | grep -v '^head$' || true)
  # shellcheck disable=SC2086  # names without blanks, one word each
  stop $workers
  stop head
  rm -rf "$LOCAL_CLUSTER"/{head,head.log,worker-*,token,port,dashboard}
  rmdir "$LOCAL_CLUSTER" 2>/dev/null || true
}

case ${1:-} in
  up) up "${2:-2}" ;;
  add) add "${2:-1}" && status ;;
  status) status ;;
  env) env_of_a_shell ;;
  down) down "${2:-}" ;;
  *)
    sed -n '2,/^$/s/^# \{0,1\}//p' "$0" | sed '/^set /d' >&2
    exit 2
    ;;
esac
