#!/usr/bin/env bash
# Every command of the README. `bash runs.sh` lists them.
set -euo pipefail
cd "$(dirname "$0")"

usage() {
  cat <<'TEXT'
usage: bash runs.sh COMMAND

  demo            train a WaNet victim on the bundled digits, detect it, remove the backdoor
  test            run the tests
  mnist           every MNIST row of the README (hours on 2 cores; finished runs are skipped)
  gpu [ARGS]      the CIFAR-10 and GTSRB rows (needs a GPU; ARGS go to generator_reverse)
  bench [DATASET] folded against one label at a time, in seconds (default: digits)
  setup           only make the environment

The first use makes .venv, unless an environment is active, and installs requirements.txt.
TEXT
}

setup() {
  if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then
    [ -x .venv/bin/python ] || python3 -m venv .venv
    # shellcheck disable=SC1091
    . .venv/bin/activate
  fi
  mkdir -p runs/logs
  if ! python -m pip install -q -r requirements.txt >runs/logs/setup.log 2>&1; then
    tail -n 5 runs/logs/setup.log >&2
    echo "the installation failed; its log: runs/logs/setup.log" >&2
    exit 1
  fi
}

# run METHOD ARGS...: one script, its output on the terminal and in a log of its own
run() {
  local log
  log="runs/logs/$(echo "$*" | tr -cs 'a-zA-Z0-9._\n' '-').log"
  echo "== python methods/$1.py ${*:2}"
  if ! python "methods/$1.py" "${@:2}" 2>&1 | tee "$log"; then
    echo "failed: python methods/$1.py ${*:2}; its log: $log" >&2
    exit 1
  fi
}

# once FOLDER METHOD ARGS...: run unless FOLDER holds a result
once() {
  if [ -f "$1/result.json" ]; then echo "== done: $1"; else run "${@:2}"; fi
}

# victims ATTACK DATASET ARCH SEEDS...
victims() {
  for seed in "${@:4}"; do
    once "runs/$2-$3-$1-s$seed" "$1" --dataset "$2" --seed "$seed"
  done
}

# audit DEFENCE VICTIM SEED ARGS...
audit() {
  once "$2/$1-s$3" "$1" --ckpt "$2" --seed "$3" "${@:4}"
}

demo() {
  run wanet --dataset digits --s 1.0
  run generator_reverse --ckpt runs/digits-mnist_cnn-wanet-s0 --lpips-net none
}

# variant NAME ATTACK SEEDS -- ARGS...: another setting of an attack, on MNIST
variant() {
  local name=$1 attack=$2 seeds=() out
  shift 2
  while [ "$1" != -- ]; do seeds+=("$1") && shift; done
  for seed in "${seeds[@]}"; do
    out="runs/mnist-mnist_cnn-$name-s$seed"
    once "$out" "$attack" --dataset mnist --seed "$seed" --out "$out" "${@:2}"
  done
}

mnist() {
  local r=runs/mnist-mnist_cnn a s
  victims clean mnist mnist_cnn 0 1 2 3 4 5 6 7 8 9
  victims badnets mnist mnist_cnn 0 1 2 3 4
  for a in blend wanet input_aware stealthy_adversarial freq_backdoor pruning_aware; do
    victims "$a" mnist mnist_cnn 0 1 2
  done
  variant blend_50 blend 0 1 2 -- --rate 0.5
  variant blend_70 blend 0 1 2 -- --rate 0.7
  variant input_aware_no_cross input_aware 0 1 2 -- --no-cross
  variant stealthy_no_adversarial stealthy_adversarial 0 1 2 -- --no-adversarial
  for s in 0 1 2 3 4 5 6 7 8 9; do
    audit nc "$r-clean-s$s" "$s"
    audit generator_reverse "$r-clean-s$s" "$s" --lpips-net none
  done
  for s in 0 1 2 3 4; do
    audit nc "$r-badnets-s$s" "$s"
    audit generator_reverse "$r-badnets-s$s" "$s" --lpips-net none
    audit strip "$r-badnets-s$s" "$s"
  done
  for s in 0 1 2; do audit nc "$r-wanet-s$s" "$s"; done
  for pair in "0 0" "0 1" "0 2" "0 3" "1 0" "1 1" "1 2" "2 0" "2 1" "2 2"; do
    # shellcheck disable=SC2086
    set -- $pair
    audit generator_reverse "$r-wanet-s$1" "$2" --lpips-net none --repair-fraction .01 .03 .05
  done
  for s in 0 1 2; do
    for a in input_aware stealthy_adversarial stealthy_no_adversarial freq_backdoor blend; do
      audit nc "$r-$a-s$s" "$s"
      audit generator_reverse "$r-$a-s$s" "$s" --lpips-net none
    done
    for a in wanet input_aware stealthy_adversarial stealthy_no_adversarial; do
      audit strip "$r-$a-s$s" "$s"
    done
    for a in clean badnets pruning_aware; do audit fine_pruning "$r-$a-s$s" "$s"; done
    for a in badnets blend blend_50 blend_70; do audit abl "$r-$a-s$s" "$s"; done
    audit abl "$r-clean-s$s" "$s" --train-set clean
  done
  python results/table.py runs/mnist-* --save results/mnist.json
}

gpu() {
  for dataset in cifar10 gtsrb; do
    local r=runs/$dataset-preact_resnet18
    for attack in clean badnets wanet; do victims "$attack" "$dataset" preact_resnet18 0 1 2; done
    for attack in clean badnets wanet; do
      for s in 0 1 2; do
        audit nc "$r-$attack-s$s" "$s"
        audit generator_reverse "$r-$attack-s$s" "$s" "$@"
      done
    done
    python results/table.py "$r"-* --save "results/$dataset.json"
  done
}

bench() {
  local dataset=${1:-digits} labels out=runs/bench
  run badnets --dataset "$dataset" --epochs 5 --out "$out/victim"
  for repeat in 1 2 3; do
    for method in nc generator_reverse; do
      for labels in 1 default; do
        local options=()
        [ "$labels" = 1 ] && options=(--labels-at-once 1)
        if [ "$method" = nc ]; then options+=(--steps 20 --batch-size 64)
        # a small rate, for Adam's steps at a large one amplify the last digit's rounding
        else options+=(--steps 15 --lr 1e-4 --pretrain-steps 200 --lpips-net none); fi
        run "$method" --ckpt "$out/victim" --out "$out/$method-$labels-$repeat" "${options[@]}"
      done
    done
  done
  local start
  start=$(date +%s%N)
  run clean --dataset digits --epochs 1 --train-images 128 --out "$out/start"
  echo "one training step on digits, from the script's start to its end:" \
    "$((($(date +%s%N) - start) / 1000000)) ms"
  python results/bench.py "$out"
}

case "${1:-}" in
  demo | mnist | gpu | bench) setup && "$@" ;;
  setup) setup ;;
  test) setup && python -m pytest ;;
  "") usage ;;
  *) usage >&2 && exit 2 ;;
esac
