#!/usr/bin/env bash
# Every command of the README. `bash runs.sh` lists them.
set -euo pipefail
export PYTHONUNBUFFERED=1 # a line appears when it is printed, though tee reads it
cd "$(dirname "$0")"

usage() {
  cat <<'TEXT'
usage: bash runs.sh COMMAND

  demo            train a WaNet victim on the bundled digits, detect it, remove the backdoor
  audit SUSPECT [FLAGS]
                  every detector on one checkpoint, and the verdict over all
  test [ARGS]     run the tests (6 to 10 minutes on 2 cores; ARGS go to pytest)
  digits          the runs behind what the scripts' headers say of the bundled digits (an hour)
  mnist           every row of the README's tables (hours on 2 cores)
  level [DATASETS]
                  false alarms and finds of the verdict on new networks (hours; default: digits)
  public FOLDER   audit public checkpoints of others; results/public.py says where they come from
  cifar10         the CIFAR-10 rows on a network that two CPU cores can train (a day)
  lecture         ten attacks and four repairs on CIFAR-10, ABL's table (a day)
  gpu [ARGS]      the CIFAR-10 and GTSRB rows (needs a GPU; ARGS go to generator_reverse)
  bench [DATASET] folded against one label at a time, in seconds (default: digits)
  setup           only make the environment

digits, mnist, cifar10, lecture, level, public and gpu take --list (print their commands and stop),
--jobs N (so many runs at a time; default: one run of one thread a core, on a GPU one run) and
--slurm (submit them as job arrays; sbatch's own SBATCH_ variables choose the partition, the time,
GPUs, ...). Finished runs are skipped, a failed one is named at the end, and the same command makes
it again.

The first use makes .venv, unless an environment is active, and installs requirements.txt.
TEXT
}

setup() {
  if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then
    [ -f .venv/bin/activate ] || python3 -m venv .venv
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

# once FOLDER METHOD ARGS...: a line of a group's list; FOLDER is where the run writes its result
once() { echo "$1 python methods/$2.py ${*:3}"; }

# staged: the lines of a list after their stage: 1 clean networks, 2 attacks, 3 defences, 4 what
# reads the folder of another defence
staged() {
  awk '{ print /nc_mitigate/ ? 4 : / --ckpt / ? 3 : /methods\/clean.py/ ? 1 : 2, $0 }' |
    sort -s -n -k 1,1
}

# job STAGE FOLDER COMMAND...: run it unless FOLDER holds a result; its output goes to a log
job() {
  local log victim
  log="runs/logs/$(echo "${2#runs/}" | tr / -).log"
  victim=$(sed -n 's/.* --ckpt \([^ ]*\).*/\1/p' <<<"$*")
  if [ -f "$2/result.json" ]; then
    echo "== done: $2"
  elif [[ $victim == runs/* ]] && [ ! -f "$victim/result.json" ]; then
    echo "== left out without its victim: $2"
  elif "${@:3}" >"$log" 2>&1; then
    echo "== made: $2"
  else
    echo "${*:3}; its log: $log" >>runs/logs/failed
    echo "== failed: $2" >&2
  fi
}
export -f job

# report: what failed, and a failure
report() {
  if [ -f runs/logs/failed ]; then
    echo "failed:" >&2
    cat runs/logs/failed >&2
    exit 1
  fi
}

# group LIST JOBS: all jobs of a list, so many at a time; stops the script at the end if one failed
group() {
  local stage one=1
  nvidia-smi >/dev/null 2>&1 || one=$(getconf _NPROCESSORS_ONLN)
  if [ "${2:-$one}" -gt 1 ]; then export OMP_NUM_THREADS=1; fi
  rm -f runs/logs/failed
  for stage in 1 2 3 4; do
    awk -v stage=$stage '$1 == stage' <<<"$1" | xargs -P "${2:-$one}" -L 1 bash -c 'job "$@"' _
  done
  report
}

# submit NAME LIST JOBS: a Slurm job array a stage, each after the one before, then the tables
submit() {
  local stage lines count id after=()
  rm -f runs/logs/failed
  for stage in 1 2 3 4; do
    lines=runs/logs/slurm-$1-$stage.list
    awk -v stage=$stage '$1 == stage' <<<"$2" >"$lines"
    count=$(wc -l <"$lines")
    if [ "$count" -eq 0 ]; then continue; fi
    id=$(sbatch --parsable --array="1-$count${3:+%$3}" "${after[@]}" --job-name="$1-$stage" \
      --output="runs/logs/slurm-%x-%a.log" <<TASK
#!/usr/bin/env bash
export OMP_NUM_THREADS=\${SLURM_CPUS_PER_TASK:-1}
$(declare -f job)
job \$(sed -n "\${SLURM_ARRAY_TASK_ID}p" $lines)
TASK
    )
    after=(--dependency="afterany:${id%%;*}")
    echo "== submitted: job array ${id%%;*}, the $count runs of $lines"
  done
  id=$(sbatch --parsable "${after[@]}" --job-name="$1-tables" --output="runs/logs/slurm-%x.log" <<TASK
#!/usr/bin/env bash
set -e
$(declare -f report "$1_tables")
report
$1_tables ${args[*]@Q}
TASK
  )
  echo "== submitted: job ${id%%;*}, failed runs or else the tables: runs/logs/slurm-$1-tables.log"
}

# victims ATTACK DATASET ARCH SEEDS...
victims() {
  for seed in "${@:4}"; do
    once "runs/$2-$3-$1-s$seed" "$1" --dataset "$2" --arch "$3" --seed "$seed"
  done
}

# row DEFENCE VICTIM SEED ARGS...
row() {
  once "$2/$1-s$3" "$1" --ckpt "$2" --seed "$3" "${@:4}"
}

demo() {
  run wanet --dataset digits --s 1.0
  run generator_reverse --ckpt runs/digits-mnist_cnn-wanet-s0 --lpips-net none
}

# variant DATASET ARCH-NAME ATTACK ARGS...: another setting of an attack, seeds 0 to 2
variant() {
  for seed in 0 1 2; do
    local out="runs/$1-$2-s$seed"
    once "$out" "$3" --dataset "$1" --seed "$seed" --out "$out" "${@:4}"
  done
}

mnist() {
  local r=runs/mnist-mnist_cnn five=runs/mnist-mnist_conv5 s v pair defence
  victims clean mnist mnist_cnn 0 1 2 3 4 5 6 7 8 9
  victims badnets mnist mnist_cnn 0 1 2 3 4
  for v in blend wanet stealthy_adversarial freq_backdoor pruning_aware; do
    victims "$v" mnist mnist_cnn 0 1 2
  done
  variant mnist mnist_cnn-blend_50 blend --rate 0.5
  variant mnist mnist_cnn-blend_70 blend --rate 0.7
  variant mnist mnist_cnn-stealthy_no_adversarial stealthy_adversarial --no-adversarial
  # the networks of the input-aware and the stealthy attack's papers, and their clean control
  variant mnist mnist_conv5-clean clean --arch mnist_conv5 --lr 0.05
  variant mnist mnist_conv5-input_aware input_aware --arch mnist_conv5 --lr 0.05
  variant mnist mnist_conv5-input_aware_no_cross input_aware --arch mnist_conv5 --lr 0.05 --no-cross
  variant mnist mnist_conv5-input_aware_no_diversity input_aware --arch mnist_conv5 --lr 0.05 \
    --no-diversity
  variant mnist mnist_conv5-stealthy_adversarial stealthy_adversarial --arch mnist_conv5 --target 8
  variant mnist mnist_conv5-stealthy_no_adversarial stealthy_adversarial --arch mnist_conv5 \
    --target 8 --no-adversarial
  for s in 0 1 2 3 4 5 6 7 8 9; do
    row nc "$r-clean-s$s" "$s"
    row generator_reverse "$r-clean-s$s" "$s" --lpips-net none
  done
  for s in 0 1 2 3 4; do
    row nc "$r-badnets-s$s" "$s"
    row generator_reverse "$r-badnets-s$s" "$s" --lpips-net none
    row strip "$r-badnets-s$s" "$s"
  done
  for pair in "0 0" "0 1" "0 2" "0 3" "1 0" "1 1" "1 2" "2 0" "2 1" "2 2"; do
    # shellcheck disable=SC2086
    set -- $pair
    row generator_reverse "$r-wanet-s$1" "$2" --lpips-net none --repair-fraction .01 .03 .05
  done
  for s in 0 1 2; do
    for v in "$r-wanet" "$five-input_aware" "$r-stealthy_adversarial" \
      "$r-stealthy_no_adversarial" "$five-stealthy_adversarial" "$five-stealthy_no_adversarial"; do
      row nc "$v-s$s" "$s"
      row strip "$v-s$s" "$s"
    done
    for v in "$r-blend" "$r-freq_backdoor" "$five-clean" "$five-input_aware_no_cross" \
      "$five-input_aware_no_diversity"; do
      row nc "$v-s$s" "$s"
    done
    for v in "$five-input_aware" "$r-stealthy_adversarial" "$r-freq_backdoor" "$r-blend"; do
      row generator_reverse "$v-s$s" "$s" --lpips-net none
    done
    for v in clean badnets pruning_aware; do row fine_pruning "$r-$v-s$s" "$s"; done
    for v in badnets blend blend_50 blend_70 clean; do
      once "$r-$v-s$s/abl-s$s" abl --ckpt "$r-$v-s$s" --seed "$s" $(train_set "$v")
      once "$r-$v-s$s/abl_bounded-s$s" abl --ckpt "$r-$v-s$s" --seed "$s" $(train_set "$v") \
        --ascent bounded --out "$r-$v-s$s/abl_bounded-s$s"
    done
  done
  for v in trojannn invisible poison_ink feature_collision dfst latent composite; do
    victims "$v" mnist mnist_cnn 0
  done
  for s in 0 1 2; do
    for v in clean badnets; do
      for defence in finetune nad mcr purify gradcam sentinet; do
        row "$defence" "$r-$v-s$s" "$s" $(februus "$defence")
      done
    done
    once "$r-badnets-s$s/nc_mitigate-s$s" nc_mitigate --ckpt "$r-badnets-s$s" --seed "$s"
  done
  variant cifar10 mnist_cnn-freq_backdoor freq_backdoor --arch mnist_cnn --train-images 10000 \
    --epochs 20 --delta-p 0.95 --no-crops --mode replace --k 4
}

mnist_tables() {
  python results/table.py runs/mnist-* --save mnist
  python results/table.py runs/cifar10-mnist_cnn-* --save cifar10_subset
}

# train_set VICTIM: ABL's training set is the dataset's own where there was no attack
train_set() {
  if [ "$1" = clean ]; then echo --train-set clean; fi
}

# februus DEFENCE: Grad-CAM's rows are with the defence that is built on it
februus() {
  if [ "$1" = gradcam ]; then echo --februus; fi
}

cifar10() {
  local attack s
  for attack in clean badnets wanet input_aware; do
    victims "$attack" cifar10 airbench 0 1 2
    for s in 0 1 2; do
      row nc "runs/cifar10-airbench-$attack-s$s" "$s"
      row generator_reverse "runs/cifar10-airbench-$attack-s$s" "$s" --lpips-net none
      [ "$attack" = clean ] || row strip "runs/cifar10-airbench-$attack-s$s" "$s"
    done
  done
}

cifar10_tables() {
  python results/table.py runs/cifar10-{airbench,preact_resnet18,resnet18}-* --save cifar10
}

gpu() {
  local dataset r attack poisons s target
  for dataset in cifar10 gtsrb; do
    r=runs/$dataset-preact_resnet18
    for attack in clean badnets wanet input_aware; do
      victims "$attack" "$dataset" preact_resnet18 0 1 2
    done
    target=$([ "$dataset" = gtsrb ] && echo 15 || echo 0)
    variant "$dataset" preact_resnet18-stealthy_adversarial stealthy_adversarial \
      --target "$target" --arch preact_resnet18
    for poisons in 500 1500; do
      variant "$dataset" "resnet18-freq_backdoor_$poisons" freq_backdoor --arch resnet18 \
        --poisons "$poisons"
    done
    for attack in clean badnets wanet input_aware stealthy_adversarial; do
      for s in 0 1 2; do
        row nc "$r-$attack-s$s" "$s"
        row generator_reverse "$r-$attack-s$s" "$s" "$@"
        [ "$attack" = clean ] || row strip "$r-$attack-s$s" "$s"
      done
    done
  done
}

gpu_tables() {
  python results/table.py runs/cifar10-{airbench,preact_resnet18,resnet18}-* --save cifar10
  python results/table.py runs/gtsrb-{preact_resnet18,resnet18}-* --save gtsrb
}

# the verdict on networks that had no part in its choice; see results/level.py
level() {
  local dataset attack s
  for dataset in "${@:-digits}"; do
    for attack in clean badnets; do
      for s in $(seq 100 $([ $attack = clean ] && echo 119 || echo 109)); do
        victims $attack "$dataset" mnist_cnn "$s"
        row nc "runs/$dataset-mnist_cnn-$attack-s$s" "$s"
        row generator_reverse "runs/$dataset-mnist_cnn-$attack-s$s" "$s" --lpips-net none
      done
    done
  done
}

level_tables() {
  python results/table.py runs/*-s1[01]? --save level
  python results/level.py
}

# the runs behind what the headers of scripts say of digits, one seed
digits() {
  local b=runs/digits-mnist_cnn-badnets-s0 c=runs/digits-mnist_cnn-clean-s0 v
  local forty="--epochs 40 --batch-size 32"
  own() { once "runs/digits-mnist_cnn-$1-s0" "$2" --out "runs/digits-mnist_cnn-$1-s0" "${@:3}"; }
  on() { once "$1/$2-s0" "$3" --ckpt "$1" --out "$1/$2-s0" "${@:4}"; }
  for v in clean badnets poison_ink dfst latent composite feature_collision; do own $v $v; done
  own latent_code latent --weight 0.05 --inject-epochs 5 --inject-lr 0.01
  own composite_1 composite --weight 1
  own composite_0 composite --weight 0
  own feature_collision_watermark feature_collision --steps 0
  own feature_collision_small feature_collision --patch-size 8
  own feature_collision_all feature_collision --retrain all
  own feature_collision_fresh feature_collision --retrain fresh
  own feature_collision_whole feature_collision --retrain fresh --rate 1 --opacity 0.5
  for v in $b $c; do
    on $v finetune finetune
    on $v finetune_40 finetune $forty
    on $v nad nad
    on $v nad_40 nad $forty --teacher-epochs 20 --lr 0.03
    on $v gradcam gradcam --februus
    on $v gradcam_mean gradcam --februus --fill mean
    on $v mcr mcr
    on $v purify purify
    on $v sentinet sentinet
  done
  on $b nad_slow nad $forty --teacher-epochs 20 --lr 0.01
  on $b mcr_half mcr --batch-size 64
  on $b mcr_loss mcr --rule loss
  on $b nc nc
  on $b nc_mitigate nc_mitigate
}

digits_tables() {
  python results/table.py runs/digits-mnist_cnn-*-s0 --save digits
}

# ABL's table on its network: ten attacks, four repairs
lecture() {
  local r=runs/cifar10-wrn16_1 attack s defence
  for attack in clean badnets trojannn blend input_aware sig label_consistent feature_collision \
    dfst latent composite; do
    for s in 0 $([ $attack = badnets ] && echo 1 2); do
      victims $attack cifar10 wrn16_1 "$s"
      for defence in fine_pruning mcr nad; do row $defence "$r-$attack-s$s" "$s"; done
      case $attack in
        input_aware | latent) ;; # the attacker hands out no training set
        *) row abl "$r-$attack-s$s" "$s" $(train_set $attack) ;;
      esac
    done
  done
}

lecture_tables() {
  python results/table.py runs/cifar10-wrn16_1-* --save lecture
}

# other people's checkpoints, in the folder $1; see results/public.py
public() {
  setup
  python results/public.py "$@" --list
}

public_tables() {
  python results/public.py "$@"
  python results/table.py
}

bench() {
  local dataset=${1:-digits} out=runs/bench start
  run badnets --dataset "$dataset" --epochs 5 --out "$out/victim"
  start=$(date +%s%N)
  python methods/clean.py --dataset digits --epochs 1 --train-images 128 --out "$out/start" | {
    grep -m 1 "^epoch 1/1" >runs/logs/start.log
    echo "from the start of a script on digits to its first training step:" \
      "$((($(date +%s%N) - start) / 1000000)) ms"
    cat >/dev/null
  }
  python results/bench.py "$out/victim"
}

case "${1:-}" in
  demo | bench)
    setup
    "$@"
    ;;
  digits | mnist | cifar10 | lecture | level | public | gpu)
    name=$1 args=() jobs='' list='' slurm=''
    shift
    while [ $# -gt 0 ]; do
      case "$1" in
        --list) list=yes ;;
        --slurm) slurm=yes ;;
        --jobs)
          jobs=${2:-none}
          [[ $jobs =~ ^[1-9][0-9]*$ ]] || { echo "error: --jobs $jobs is not a number" >&2; exit 2; }
          shift
          ;;
        *) args+=("$1") ;;
      esac
      shift
    done
    lines=$("$name" "${args[@]}" | staged)
    if [ "$list" ]; then
      cut -d ' ' -f 3- <<<"$lines"
      exit
    fi
    if [ "$slurm" ] && ! command -v sbatch >/dev/null; then
      echo "error: --slurm needs Slurm's sbatch" >&2
      exit 2
    fi
    setup
    if [ "$slurm" ]; then
      submit "$name" "$lines" "$jobs"
      exit
    fi
    group "$lines" "$jobs"
    "${name}_tables" "${args[@]}"
    ;;
  setup) setup ;;
  audit)
    setup
    python results/audit.py "${@:2}"
    ;;
  test)
    setup
    echo "== python -m pytest ${*:2}"
    echo "Formulas and figures against independent oracles, whole runs on digits, bad input and a"
    echo "rehearsal on CUDA, with one process per core: all of it takes 6 to 10 minutes on 2 cores."
    python -m pytest "${@:2}"
    ;;
  "") usage ;;
  *)
    usage >&2
    exit 2
    ;;
esac
