#!/usr/bin/env bash
# LLaMA-3-8B whole (32 layers, vocabulary 128,256, 4096 tokens a sequence) on one GPU of 80 GB: saved
# activations near 4 bits, gradients and optimizer states in 8. Trains 20 steps on the text of the Python
# interpreter's own library; more with --train-iters N. All arguments go to pretrain_gpt_agoq.py.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
source "$root/scripts/setup.sh"
agoq_setup
out="${OUTPUT:-runs/llama3-8b}"
mkdir -p "$out"
if [ ! -e "$out/corpus_report.json" ]; then
    library="$("$AGOQ_PYTHON" -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')"
    "$AGOQ_PYTHON" "$root/scripts/prepare_corpus.py" --input "$library" --output "$out/corpus"
fi
export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"
export CUDA_DEVICE_MAX_CONNECTIONS=1
# The tokenizer's own vocabulary is smaller: it is padded to LLaMA-3's.
exec "$AGOQ_PYTHON" -m torch.distributed.run --standalone --nproc-per-node 1 "$root/pretrain_gpt_agoq.py" \
    --num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32 \
    --group-query-attention --num-query-groups 8 --swiglu --normalization RMSNorm --norm-epsilon 1e-5 \
    --position-embedding-type rope --rotary-base 500000 --disable-bias-linear \
    --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0 --init-method-std 0.02 \
    --make-vocab-size-divisible-by 128256 --seq-length 4096 --max-position-embeddings 4096 --bf16 \
    --micro-batch-size 1 --global-batch-size 4 --train-iters 20 --lr 1e-4 --lr-warmup-iters 10 \
    --lr-decay-style constant --adam-beta2 0.95 --weight-decay 0.1 --clip-grad 1 \
    --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$out/corpus_tokenizer" \
    --train-data-path "$out/corpus_train_text_document" --valid-data-path "$out/corpus_valid_text_document" \
    --data-cache-path "$out/cache" --eval-iters 0 --eval-interval 1000 --num-workers 0 \
    --log-interval 1 --log-throughput --use-distributed-optimizer \
    --agoq-activations agoq --agoq-loss-chunks 8 --agoq-grad-bits 8 --agoq-optimizer-bits 8 \
    --agoq-report "$out/report.json" "$@"
