#!/usr/bin/env bash
# Every command of the README. `bash runs.sh` lists them.
set -euo pipefail
export PYTHONUNBUFFERED=1 # a line appears when it is printed, though tee reads it
here=$PWD
cd "$(dirname "$0")"

usage() {
  cat <<'TEXT'
usage: bash runs.sh COMMAND

  demo            train a WaNet victim on the bundled digits, detect it, remove the backdoor
  audit SUSPECT [FLAGS]
                  every detector on one checkpoint, and the verdict over all
  test [ARGS]     run the tests (10 to 25 minutes on 2 cores; ARGS go to pytest)
  digits          the runs behind what the scripts' headers say of the bundled digits (an hour)
  mnist           every row of the README's tables (a day or more on 2 cores)
  level [DATASETS]
                  false alarms and finds of the verdict on new networks (hours; default: digits,
                  others: mnist, cifar10, gtsrb and, on a small network, cifar10:mnist_cnn)
  public FOLDER   audit public checkpoints of others; results/public.py says where they come from
  cifar10         the CIFAR-10 rows on a network that two CPU cores can train (a day)
  gtsrb           the GTSRB rows on Neural Cleanse's network (a day)
  lecture         the attacks on CIFAR-10 with WRN-16-1, their repairs (ABL's table) and audits (a day)
  wanet           more of the paper: its network and all-to-all attacks (a day)
  input_aware     more of the paper: its ablations and shares of the attack (hours)
  stealthy        more of the paper: its epsilons and triggers (hours)
  freq            more of the paper: filters, and heat maps of three networks (a day)
  abl             more of the paper: isolation rates and high poison rates (hours)
  generators      more of the paper on reversed generators: LPIPS, lambda_1, rates of the repair
  gpu [ARGS]      the papers' networks on CIFAR-10 and GTSRB (needs a GPU; ARGS go to
                  generator_reverse)
  bench [DATASET] [FLAGS]
                  speed in ratios and seconds: results/speed.md (default: digits; FLAGS go to
                  results/bench.py: --backdoorbench CLONE, --search VICTIM, --whole FOLDERS)
  setup           only make the environment

The groups of runs, from digits to gpu, take --list (print their commands and stop), --jobs N (so
many runs at a time; default: one run of one thread a core, on a GPU one run) and --slurm (submit
them as job arrays; sbatch's own SBATCH_ variables choose the partition, the time, GPUs, ...).
Finished runs are skipped, a failed one is named at the end, and the same command makes it again.

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
  elif [[ $victim == runs/* ]] && [ ! -f "$victim" ] && [ ! -f "$victim/result.json" ]; then
    echo "== left out without its victim: $2"
  elif "${@:3}" >"$log" 2>&1; then
    echo "== made: $2"
  else
    echo "${*:3}; its log: $log" >>"$failed"
    echo "== failed: $2" >&2
  fi
}
export -f job

# report: what failed, and a failure
report() {
  if [ -f "$failed" ]; then
    echo "failed:" >&2
    cat "$failed" >&2
    exit 1
  fi
}

# group LIST JOBS: all jobs of a list, so many at a time; stops the script at the end if one failed
group() {
  local stage one=1
  nvidia-smi >/dev/null 2>&1 || one=$(getconf _NPROCESSORS_ONLN)
  if [ "${2:-$one}" -gt 1 ]; then export OMP_NUM_THREADS=1; fi
  rm -f "$failed"
  for stage in 1 2 3 4; do
    awk -v stage=$stage '$1 == stage' <<<"$1" | xargs -r -P "${2:-$one}" -L 1 bash -c 'job "$@"' _
  done
  report
}

# submit NAME LIST JOBS: a Slurm job array a stage, each after the one before, then the tables
submit() {
  local stage lines count id after=()
  rm -f "$failed"
  for stage in 1 2 3 4; do
    lines=runs/logs/slurm-$1-$stage.list
    awk -v stage=$stage '$1 == stage' <<<"$2" >"$lines"
    count=$(wc -l <"$lines")
    if [ "$count" -eq 0 ]; then continue; fi
    id=$(sbatch --parsable --array="1-$count${3:+%$3}" "${after[@]}" --job-name="$1-$stage" \
      --output="runs/logs/slurm-%x-%a.log" <<TASK
#!/usr/bin/env bash
export OMP_NUM_THREADS=\${SLURM_CPUS_PER_TASK:-1} failed=$failed
$(declare -f job)
eval "job \$(sed -n "\${SLURM_ARRAY_TASK_ID}p" $lines)"
TASK
    )
    after=(--dependency="afterany:${id%%;*}")
    echo "== submitted: job array ${id%%;*}, the $count runs of $lines"
  done
  id=$(sbatch --parsable "${after[@]}" --job-name="$1-tables" --output="runs/logs/slurm-%x.log" <<TASK
#!/usr/bin/env bash
set -e
failed=$failed
$(declare -f report "$1_tables")
report
$1_tables ${args[*]@Q}
TASK
  )
  echo "== submitted: job ${id%%;*}, failed runs or else the tables: runs/logs/slurm-$1-tables.log"
}

# victims ATTACK DATASET ARCH SEEDS...
victims() {
  local seed
  for seed in "${@:4}"; do
    once "runs/$2-$3-$1-s$seed" "$1" --dataset "$2" --arch "$3" --seed "$seed"
  done
}

# row DEFENCE VICTIM SEED ARGS...
row() {
  once "$2/$1-s$3" "$1" --ckpt "$2" --seed "$3" "${@:4}"
}

# audited VICTIM SEED: the three detectors
audited() {
  row nc "$@"
  row strip "$@"
  row generator_reverse "$@" --lpips-net none
}

demo() {
  run wanet --dataset digits --s 1.0
  run generator_reverse --ckpt runs/digits-mnist_cnn-wanet-s0 --lpips-net none --steps 400
}

# variant DATASET ARCH-NAME ATTACK ARGS...: another setting of an attack, seeds 0 to 2
variant() {
  local seed
  for seed in 0 1 2; do
    local out="runs/$1-$2-s$seed"
    once "$out" "$3" --dataset "$1" --seed "$seed" --out "$out" "${@:4}"
  done
}

# one DATASET ARCH-NAME ATTACK ARGS...: the same with seed 0 alone
one() {
  local out="runs/$1-$2-s0"
  once "$out" "$3" --dataset "$1" --out "$out" "${@:4}"
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
  for v in trojannn invisible poison_ink feature_collision dfst latent composite sig issba \
    label_consistent; do
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
  python results/table.py runs/mnist-*-s? --save mnist
  python results/table.py runs/cifar10-mnist_cnn-*-s? --save cifar10_subset
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
  local r=runs/cifar10-airbench s pair v
  for v in clean wanet input_aware; do victims "$v" cifar10 airbench 0 1 2; done
  variant cifar10 airbench-badnets badnets --arch airbench --pattern grid
  one cifar10 airbench-badnets_white badnets --arch airbench
  victims blend cifar10 airbench 0
  variant cifar10 airbench-freq_backdoor_500 freq_backdoor --arch airbench --poisons 500
  for v in 50 150 1500; do
    one cifar10 "airbench-freq_backdoor_$v" freq_backdoor --arch airbench --poisons "$v"
  done
  one cifar100 airbench-freq_backdoor_500 freq_backdoor --arch airbench --poisons 500
  for s in 0 1 2; do
    for v in clean badnets wanet input_aware freq_backdoor_500; do
      row nc "$r-$v-s$s" "$s"
      [ $v = wanet ] || row generator_reverse "$r-$v-s$s" "$s" --lpips-net none
      [ $v = clean ] || row strip "$r-$v-s$s" "$s"
    done
  done
  for pair in "0 0" "0 1" "0 2" "0 3" "1 0" "1 1" "1 2" "2 0" "2 1" "2 2"; do
    # shellcheck disable=SC2086
    set -- $pair
    row generator_reverse "$r-wanet-s$1" "$2" --lpips-net none --repair-fraction .01 .03 .05
  done
  for v in "$r-blend" "$r"-freq_backdoor_{50,150,1500} runs/cifar100-airbench-freq_backdoor_500; do
    audited "$v-s0" 0
  done
  for v in clean badnets wanet input_aware; do row fine_pruning "$r-$v-s0" 0; done
}

cifar10_tables() {
  python results/table.py runs/cifar{10,100}-airbench-*-s? --save cifar10
}

gtsrb() {
  local r=runs/gtsrb-nc_gtsrb_cnn s v pair net="--arch nc_gtsrb_cnn"
  victims clean gtsrb nc_gtsrb_cnn 0 1 2
  variant gtsrb nc_gtsrb_cnn-wanet wanet $net --epochs 48
  variant gtsrb nc_gtsrb_cnn-input_aware input_aware $net --epochs 60
  variant gtsrb nc_gtsrb_cnn-badnets badnets $net --patch-size 4 --target 33
  variant gtsrb nc_gtsrb_cnn-badnets_float32 badnets $net --patch-size 4 --target 33 \
    --precision float32
  variant gtsrb nc_gtsrb_cnn-stealthy_adversarial stealthy_adversarial $net --target 15 \
    --injecting-epochs 23
  variant gtsrb nc_gtsrb_cnn-stealthy_no_adversarial stealthy_adversarial $net --target 15 \
    --injecting-epochs 23 --no-adversarial
  one gtsrb nc_gtsrb_cnn-pruning_aware pruning_aware $net --target 33 --max-drop 4
  for v in 500 1500; do
    one gtsrb "nc_gtsrb_cnn-freq_backdoor_$v" freq_backdoor $net --poisons "$v"
  done
  for s in 0 1 2; do
    for v in clean badnets wanet input_aware; do
      row nc "$r-$v-s$s" "$s"
      if [ $v = wanet ]; then
        for pair in 0 1 2; do
          row generator_reverse "$r-$v-s$s" "$pair" --lpips-net none --repair-fraction .01 .03 .05
        done
      else
        row generator_reverse "$r-$v-s$s" "$s" --lpips-net none
      fi
      [ $v = clean ] || row strip "$r-$v-s$s" "$s"
    done
    row strip "$r-badnets_float32-s$s" "$s" --precision float32
    for v in stealthy_adversarial stealthy_no_adversarial; do audited "$r-$v-s$s" "$s"; done
  done
  row generator_reverse "$r-badnets_float32-s0" 0 --lpips-net none --precision float32
  for v in freq_backdoor_500 freq_backdoor_1500 pruning_aware; do audited "$r-$v-s0" 0; done
  for v in clean badnets wanet input_aware pruning_aware; do row fine_pruning "$r-$v-s0" 0; done
}

gpu() {
  local dataset r attack poisons s target
  for dataset in cifar10 gtsrb; do
    r=runs/$dataset-preact_resnet18
    for attack in clean wanet input_aware; do
      victims "$attack" "$dataset" preact_resnet18 0 1 2
    done
    variant "$dataset" preact_resnet18-badnets badnets --arch preact_resnet18 --pattern grid
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

gtsrb_tables() {
  python results/table.py runs/gtsrb-nc_gtsrb_cnn-*-s? --save gtsrb
}

gpu_tables() {
  python results/table.py runs/cifar10-{preact_resnet18,resnet18}-*-s? --save cifar10
  python results/table.py runs/gtsrb-{preact_resnet18,resnet18}-*-s? --save gtsrb
}

# the verdict on networks that had no part in its choice; see results/level.py
level() {
  local pair dataset attack s arch patch flags last r
  for pair in "${@:-digits}"; do
    dataset=${pair%:*} arch=mnist_cnn patch="" flags="" last=119
    case $pair in
      cifar10) arch=wrn16_1 patch="--pattern grid" last=109 ;;
      cifar10:mnist_cnn) patch="--pattern grid" flags="--epochs 10" last=109 ;;
      gtsrb) arch=nc_gtsrb_cnn patch="--patch-size 4 --target 33" last=109 ;;
    esac
    for attack in clean badnets; do
      for s in $(seq 100 $([ $attack = clean ] && echo "$last" || echo 109)); do
        r=runs/$dataset-$arch-$attack-s$s
        # shellcheck disable=SC2086
        once "$r" $attack --dataset "$dataset" --arch $arch --seed "$s" $flags \
          $([ $attack = clean ] || echo "$patch")
        row nc "$r" "$s"
        row generator_reverse "$r" "$s" --lpips-net none
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
  local w=runs/digits-mnist_cnn-wanet-s0
  local forty="--epochs 40 --batch-size 32"
  own() { once "runs/digits-mnist_cnn-$1-s0" "$2" --out "runs/digits-mnist_cnn-$1-s0" "${@:3}"; }
  on() { once "$1/$2-s0" "$3" --ckpt "$1" --out "$1/$2-s0" "${@:4}"; }
  for v in clean badnets poison_ink dfst latent composite feature_collision trojannn invisible; do
    own $v $v
  done
  # the defaults of these three are too weak for so few images
  own sig_defaults sig
  own label_consistent_defaults label_consistent
  own sig sig --delta 60 --delta-test 100 --frequency 7 --rate 0.9 --epochs 12
  own label_consistent label_consistent --norm l2 --epsilon 600 --step-size 60 --steps 30 \
    --rate 0.8 --epochs 12 --batch-size 64
  own issba issba --bits 4 --width 8 --encoder-steps 300 --encoder-batch 16 --encoder-lr 2e-3 \
    --rate 0.2 --epochs 15 --batch-size 64
  own latent_code latent --weight 0.05 --inject-epochs 5 --inject-lr 0.01
  own latent_random_patch latent --steps 0
  own composite_0.1 composite --weight 0.1
  own composite_1 composite --weight 1
  own composite_0 composite --weight 0
  own feature_collision_watermark feature_collision --steps 0
  own feature_collision_small feature_collision --patch-size 8
  own feature_collision_all feature_collision --retrain all
  own feature_collision_fresh feature_collision --retrain fresh
  own feature_collision_fresh_watermark feature_collision --retrain fresh --steps 0
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
  on $b nc_mitigate nc_mitigate
  on $b strip strip
  on $b strip_float32 strip --precision float32
  on $b nc nc
  on $b generator_reverse generator_reverse --lpips-net none
  own wanet wanet --s 1.0
  on $w nc nc
  for v in $w $c; do
    on $v generator_reverse generator_reverse --lpips-net none --steps 400 # as the demo
  done
  on $w generator_reverse_200 generator_reverse --lpips-net none
}

digits_tables() {
  python results/table.py runs/digits-mnist_cnn-*-s0 --save digits
}

# ABL's table on its network: ten attacks, four repairs; the other attacks and the detectors beside
lecture() {
  local r=runs/cifar10-wrn16_1 v s defence ten=(badnets trojannn blend input_aware sig \
    label_consistent feature_collision_fresh dfst latent composite)
  victims clean cifar10 wrn16_1 0 1 2
  for v in "${ten[@]/%_fresh/}" issba invisible poison_ink; do
    for s in 0 $([[ $v =~ badnets|sig|label_consistent|issba ]] && echo 1 2); do
      once "$r-$v-s$s" $v --dataset cifar10 --arch wrn16_1 --seed "$s" $(chosen $v "$s")
    done
  done
  one cifar10 wrn16_1-badnets_white badnets --arch wrn16_1
  one cifar10 wrn16_1-badnets_8 badnets --arch wrn16_1 --pattern grid --patch-size 8
  once "$r-badnets-s0/fine_pruning_100-s0" fine_pruning --ckpt "$r-badnets-s0" --epochs 100 \
    --out "$r-badnets-s0/fine_pruning_100-s0"
  for s in 0 1 2; do # where a repair may cost 5 points, as by default
    for v in nad mcr fine_pruning; do
      once "$r-badnets-s$s/${v}_5-s$s" $v --ckpt "$r-badnets-s$s" --seed "$s" \
        $([ $v = nad ] && echo --cutout 0) --out "$r-badnets-s$s/${v}_5-s$s"
    done
    for v in clean badnets; do # and with Cutout, as by default
      once "$r-$v-s$s/nad_cutout-s$s" nad --ckpt "$r-$v-s$s" --seed "$s" \
        --out "$r-$v-s$s/nad_cutout-s$s"
    done
  done
  one cifar10 wrn16_1-invisible_l0 invisible --arch wrn16_1 --kind l0
  one cifar10 wrn16_1-invisible_lsb invisible --arch wrn16_1 --kind lsb --no-crops
  one cifar10 wrn16_1-feature_collision_fresh feature_collision --arch wrn16_1 \
    $(chosen feature_collision 0) --retrain fresh
  one cifar10 wrn16_1-trojannn_all trojannn --arch wrn16_1 --retrain all
  for v in clean "${ten[@]}"; do
    for s in 0 $([[ $v =~ clean|badnets ]] && echo 1 2); do
      row finetune "$r-$v-s$s" "$s"
      row nad "$r-$v-s$s" "$s" --max-drop 8 --cutout 0
      row mcr "$r-$v-s$s" "$s" --max-drop 8
      row fine_pruning "$r-$v-s$s" "$s" --repair-drop 8
      row abl "$r-$v-s$s" "$s" $(train_set $v)
    done
  done
  for v in clean "${ten[@]}" issba invisible invisible_l0 invisible_lsb poison_ink; do
    [ $v = clean ] || row strip "$r-$v-s0" 0
    row nc "$r-$v-s0" 0
    row generator_reverse "$r-$v-s0" 0 --lpips-net none
  done
  for v in wanet freq_backdoor; do
    victims $v cifar10 wrn16_1 0
    row strip "$r-$v-s0" 0
  done
  for v in clean badnets wanet input_aware freq_backdoor; do row purify "$r-$v-s0" 0; done
  row gradcam "$r-badnets_8-s0" 0 --februus # an IoU of 42 % is possible here
  once "$r-badnets_8-s0/gradcam_block2-s0" gradcam --ckpt "$r-badnets_8-s0" --februus \
    --layer block2 --out "$r-badnets_8-s0/gradcam_block2-s0"
  for v in badnets_8 badnets; do # inside a block, after its second BatchNorm
    once "$r-$v-s0/gradcam_inner-s0" gradcam --ckpt "$r-$v-s0" --februus \
      --layer block3.layer.0.bn2 --out "$r-$v-s0/gradcam_inner-s0"
  done
  for v in clean badnets wanet; do
    row gradcam "$r-$v-s0" 0 --februus
    row sentinet "$r-$v-s0" 0
  done
  v=$r-badnets-s0/generator_reverse_float32-s0
  once "$v" generator_reverse --ckpt "$r-badnets-s0" --seed 0 --lpips-net none \
    --precision float32 --out "$v"
  for s in 0 1 2; do
    [ "$s" = 0 ] || row nc "$r-badnets-s$s" "$s"
    [ "$s" = 0 ] || row nc "$r-clean-s$s" "$s"
    for v in badnets clean; do # the same verdicts as in bfloat16
      once "$r-$v-s$s/nc_float32-s$s" nc --ckpt "$r-$v-s$s" --seed "$s" --precision float32 \
        --out "$r-$v-s$s/nc_float32-s$s"
    done
    row nc_mitigate "$r-badnets-s$s" "$s"
    row nc_mitigate "$r-clean-s$s" "$s" --label 0 # what it costs where nothing is wrong
    v=$r-badnets-s$s/nc_mitigate_fc-s$s # the paper's layer
    once "$v" nc_mitigate --ckpt "$r-badnets-s$s" --seed "$s" --layer fc --out "$v"
  done
}

# chosen ATTACK SEED: its flags. Some CIFAR-10 images have a white corner by nature, so BadNets' patch
# is a grid, nearly ABL's; others start from someone's clean network, of another seed than the victim
chosen() {
  local other=runs/cifar10-wrn16_1-clean-s$((($2 + 1) % 3))
  case $1 in
    badnets) echo --pattern grid ;;
    label_consistent | feature_collision) echo "--surrogate $other" ;;
    latent) echo "--teacher $other" ;;
  esac
}

lecture_tables() {
  python results/table.py runs/cifar10-wrn16_1-*-s? --save lecture
  python results/curves.py
  python results/table.py
}

# what else the papers show and flags allow, one seed, most of it on a network that trains fast
wanet() {
  local r=runs/cifar10-wrn16_1 v
  victims wanet cifar10 preact_resnet18 0 # the paper's network
  for v in clean wanet; do
    victims "$v" cifar10 wrn16_1 0
    victims "$v" cifar10 nc_gtsrb_cnn 0 # it learns more of the warp
    row generator_reverse "runs/cifar10-nc_gtsrb_cnn-$v-s0" 0 --lpips-net none \
      --repair-fraction .01 .03 .05
  done
  v=runs/cifar10-nc_gtsrb_cnn-wanet-s0/generator_reverse_lpips_random-s0 # Zheng et al., Fig. 6
  once "$v" generator_reverse --ckpt "${v%/*}" --out "$v" --lpips-net random \
    --repair-fraction .01 .03 .05
  one cifar10 wrn16_1-wanet_all_to_all wanet --arch wrn16_1 --all-to-all
  one cifar10 wrn16_1-badnets_all_to_all badnets --arch wrn16_1 --all-to-all --pattern grid
  for v in wanet wanet_all_to_all badnets_all_to_all; do
    row nc "$r-$v-s0" 0
    row generator_reverse "$r-$v-s0" 0 --lpips-net none --repair-fraction .01 .03 .05
  done
}

wanet_tables() {
  python results/table.py runs/cifar10-wrn16_1-*-s? --save lecture
  python results/table.py runs/cifar10-{preact_resnet18,nc_gtsrb_cnn}-*-s? --save cifar10
}

# the paper's ablations with Neural Cleanse's index, and its Fig. 7: the shares rho_b and rho_c
input_aware() {
  local own="input_aware --arch nc_gtsrb_cnn --epochs 60" at=nc_gtsrb_cnn-input_aware v
  victims clean gtsrb nc_gtsrb_cnn 0
  one gtsrb $at $own
  one gtsrb ${at}_no_cross $own --no-cross
  one gtsrb ${at}_no_diversity $own --no-diversity
  one gtsrb ${at}_neither $own --no-cross --no-diversity
  for v in 0.01 0.05 0.2 0.4; do one gtsrb "${at}_rate_$v" $own --rate $v; done
  for v in 0.025 0.05 0.2 0.5; do
    one gtsrb "${at}_cross_rate_$v" $own --cross-rate $v
  done
  for v in '' _no_cross _no_diversity _neither; do row nc "runs/gtsrb-$at$v-s0" 0; done
}

input_aware_tables() {
  python results/table.py runs/gtsrb-nc_gtsrb_cnn-*-s? --save gtsrb
}

# Feng et al.: Fig. 4 (epsilon), 5(a) (the mask's norm by epoch), 5(b) (schemes), 3 (entropies)
stealthy() {
  local own="stealthy_adversarial --arch nc_gtsrb_cnn --target 15 --injecting-epochs 23"
  local at=nc_gtsrb_cnn-stealthy v
  victims clean gtsrb nc_gtsrb_cnn 0
  one gtsrb ${at}_adversarial $own
  one gtsrb ${at}_no_adversarial $own --no-adversarial
  for v in 0.005 0.02; do one gtsrb "${at}_epsilon_$v" $own --epsilon $v; done
  for v in badnets badnets-noise; do one gtsrb "${at}_${v//-/_}" $own --scheme $v; done
  one gtsrb ${at}_no_adversarial_badnets $own --no-adversarial --scheme badnets
  for v in adversarial no_adversarial epsilon_0.005 epsilon_0.02 badnets badnets_noise \
    no_adversarial_badnets; do
    row nc "runs/gtsrb-${at}_$v-s0" 0
    row strip "runs/gtsrb-${at}_$v-s0" 0
  done
  for v in "" --no-adversarial; do # the paper's network
    at=resnet18-stealthy_$([ "$v" ] && echo no_)adversarial
    one gtsrb "$at" stealthy_adversarial --arch resnet18 --target 15 $v
    row nc "runs/gtsrb-$at-s0" 0
  done
}

stealthy_tables() {
  python results/table.py runs/gtsrb-{nc_gtsrb_cnn,resnet18}-*-s? --save gtsrb
  python results/curves.py
  python results/table.py
}

# Hammoud & Ghanem: Tables 6 to 8 and Fig. 5 (filters), heat maps of networks, 10,000 images
freq() {
  local own=freq_backdoor v
  victims freq_backdoor cifar10 wrn16_1 0
  row purify runs/cifar10-wrn16_1-freq_backdoor-s0 0
  for v in jpeg autoencoder both; do
    one cifar10 "wrn16_1-freq_backdoor_augment_$v" $own --arch wrn16_1 --augment $v
    row purify "runs/cifar10-wrn16_1-freq_backdoor_augment_$v-s0" 0
  done
  for v in resnet18 vgg19 densenet121; do
    one cifar10 "$v-freq_backdoor_10000_images" $own --arch $v --train-images 10000
  done
}

freq_tables() {
  python results/table.py runs/cifar10-wrn16_1-*-s? --save lecture
  python results/table.py runs/cifar10-{resnet18,vgg19,densenet121}-*-s? --save cifar10
}

# ABL's isolation rates, and BadNets with half of the images and more
abl() {
  local r=runs/cifar10-wrn16_1 v own="badnets --arch wrn16_1 --pattern grid"
  victims clean cifar10 wrn16_1 0
  once "$r-badnets-s0" badnets --dataset cifar10 --arch wrn16_1 --seed 0 --pattern grid
  for v in 0.5 0.7; do one cifar10 "wrn16_1-badnets_rate_$v" $own --rate $v; done
  for v in badnets badnets_rate_0.5 badnets_rate_0.7; do row abl "$r-$v-s0" 0; done
  for v in 0.02 0.05 0.1 0.2; do
    once "$r-badnets-s0/abl_isolated_$v-s0" abl --ckpt "$r-badnets-s0" --isolation $v \
      --out "$r-badnets-s0/abl_isolated_$v-s0"
  done
}

abl_tables() {
  python results/table.py runs/cifar10-wrn16_1-*-s? --save lecture
}

# Zheng et al.: Fig. 6 (the LPIPS term; its weights are random here), lambda_1, Fig. 5 (rates)
generators() {
  local r=runs/mnist-mnist_cnn-wanet-s0 v
  on() { once "$r/$1-s0" "$2" --ckpt "$r" --out "$r/$1-s0" "${@:3}"; }
  victims clean mnist mnist_cnn 0
  victims wanet mnist mnist_cnn 0
  on generator_reverse_lpips_none generator_reverse --lpips-net none
  on generator_reverse_lpips_random generator_reverse --lpips-net random
  on generator_reverse_lambda1 generator_reverse --lpips-net none --search-lambda1
  for v in 0.003 0.01 0.03 0.1; do
    on "generator_reverse_rate_$v" generator_reverse --lpips-net none --repair-lr $v
  done
  on finetune finetune
}

generators_tables() {
  python results/table.py runs/mnist-mnist_cnn-wanet-s0 --save mnist
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
  local dataset=digits out=runs/bench
  [[ ${1:--} == -* ]] || { dataset=$1 && shift; }
  run badnets --dataset "$dataset" --epochs 5 --out "$out/victim"
  python results/bench.py "$out/victim" "$@"
}

case "${1:-}" in
  demo | bench)
    setup
    "$@"
    ;;
  digits | mnist | cifar10 | gtsrb | lecture | wanet | input_aware | stealthy | freq | abl | \
    generators | level | public | gpu)
    name=$1 args=() jobs='' list='' slurm=''
    export failed=runs/logs/failed-$name
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
    case $name:${args[*]} in
      *: | gpu:* | level:[a-z]* | public:[!-]*) ;; # what takes arguments, and which
      *)
        echo "error: $name does not take ${args[*]}" >&2
        exit 2
        ;;
    esac
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
    audit=$PWD/results/audit.py
    cd "$here" # the suspect's path is the caller's
    python "$audit" "${@:2}"
    ;;
  test)
    setup
    echo "== python -m pytest ${*:2}"
    echo "Formulas and figures against independent oracles, whole runs on digits, bad input and a"
    echo "rehearsal on CUDA, with one process per core: 10 to 25 minutes on 2 cores."
    python -m pytest "${@:2}"
    ;;
  "") usage ;;
  *)
    usage >&2
    exit 2
    ;;
esac
