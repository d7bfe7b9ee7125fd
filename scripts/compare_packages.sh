#!/usr/bin/env bash
# scripts/compare_methods.py on further models and other data, all of it from Debian's packages:
#
#     scripts/compare_packages.sh manpages      # a small OLMoE that read English manual pages learns the German ones
#     scripts/compare_packages.sh rust          # a small Mixtral that read Rust learns Go
#     scripts/compare_packages.sh ruby          # a small Qwen2-MoE that read Ruby learns how Rails is written
#     scripts/compare_packages.sh rust --folder runs/rust --arms usaf-default,lora-experts-attention --seeds 1
#
# Needs Debian or Ubuntu, and pip install -e ".[bench]". What follows the first word goes to scripts/compare_methods.py,
# whose --help says what there is. scripts/pretrain_manpages.py and scripts/pretrain_rust.py say which texts are learned,
# held out and remembered; either takes less than an hour on a core, once. The packages are those that apt knows
# (bookworm's, for docs/results).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

BED=${1:-}
case $BED in
manpages)
    PACKAGES=(manpages manpages-dev git-man systemd manpages-de manpages-de-dev)
    HELD_OUT=(systemd c_library) FORGETTING=english PRETRAINING_STEPS=${PRETRAINING_STEPS:-1500}
    ;;
rust)
    PACKAGES=(golang-golang-x-tools-dev golang-golang-x-net-dev golang-github-prometheus-client-golang-dev
        golang-google-grpc-dev golang-etcd-server-dev)
    for crate in async-std bindgen cargo clap futures-util gimli git2 h2 hyper image nix nom num-bigint object rand \
        rayon regex rustls sequoia-openpgp syn tokio trust-dns-proto; do
        PACKAGES+=("librust-$crate-dev")
    done
    HELD_OUT=(grpc etcd) FORGETTING=rust PRETRAINING_STEPS=${PRETRAINING_STEPS:-900}
    ;;
ruby)
    PACKAGES=(redmine puppet-agent vagrant rubocop libruby3.1 rake jekyll)
    for name in actioncable actionmailer actionpack actionview activejob activemodel activerecord activestorage \
        activesupport railties acts-as-taggable-on cancancan carrierwave devise doorkeeper friendly-id paper-trail \
        will-paginate \
        asciidoctor bio bundler capybara concurrent dnsruby fog-aws fog-openstack graphql haml kramdown mail mongo \
        net-ssh octokit pdf-reader prawn rack rouge rspec-core ruby-parser sass sequel sidekiq soap4r xmpp4r; do
        PACKAGES+=("ruby-$name")
    done
    HELD_OUT=(plugins redmine) FORGETTING=ruby PRETRAINING_STEPS=${PRETRAINING_STEPS:-1200}
    ;;
*)
    echo "error: ${BED:-no model}: the first word must be manpages, rust or ruby, and what follows it goes to" \
        "scripts/compare_methods.py" >&2
    exit 2
    ;;
esac
shift

WORK=${WORK:-data/$BED}                               # git-ignored; 70 to 150 MB
STEPS=${STEPS:-180} SEQ_LEN=${SEQ_LEN:-256} MICROBATCH=${MICROBATCH:-4}
TRAIN_FROM=${TRAIN_FROM:-0} FRAC=${FRAC:-0.02} EVAL_SAMPLES=${EVAL_SAMPLES:-32}
PYTHON=${PYTHON:-$(pwd)/.venv/bin/python}

if [ ! -x "$PYTHON" ]; then
    echo "error: PYTHON=$PYTHON: no such program; set PYTHON to one in which USAF is installed" >&2
    exit 2
fi
for tool in apt-get dpkg-deb; do
    if ! command -v "$tool" > /dev/null; then
        echo "error: the texts are in Debian's packages, and $tool is not here; run this on Debian or Ubuntu" >&2
        exit 2
    fi
done

if ! grep -qs held_out_perplexity "$WORK/moe/training_log.jsonl"; then  # its last line
    mkdir -p "$WORK/packages"
    for package in "${PACKAGES[@]}"; do
        if [ ! -d "$WORK/packages/$package" ]; then
            (cd "$WORK/packages" && apt-get download "$package")
            dpkg-deb -x "$WORK/packages/${package}"_*.deb "$WORK/packages/$package.part"
            mv "$WORK/packages/$package.part" "$WORK/packages/$package"
        fi
    done
    CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=1 "$PYTHON" "scripts/pretrain_$BED.py" --packages "$WORK/packages" \
        --output "$WORK" --steps "$PRETRAINING_STEPS"
fi

exec "$PYTHON" scripts/compare_methods.py --model "$WORK/moe" --dataset "$WORK/train.jsonl" \
    --heldout "$WORK/${HELD_OUT[0]}.jsonl" --heldout "$WORK/${HELD_OUT[1]}.jsonl" \
    --forgetting "$WORK/$FORGETTING.jsonl" --steps "$STEPS" --seq-len "$SEQ_LEN" --microbatch "$MICROBATCH" \
    --train-from "$TRAIN_FROM" --frac "$FRAC" --eval-samples "$EVAL_SAMPLES" "$@"
