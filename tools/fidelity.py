#!/usr/bin/env python3
"""A mid-sized random reward model and its reference scores, in float32 and, for scale, in bfloat16.

    tools/fidelity.py WORK [--cases 8] [--tokens 1024]
    warm verify WORK/qwen3 --golden WORK/qwen3/golden.json --key float32

Writes WORK/FAMILY (hidden 1024, 12 layers) for a few families and heads. golden.json holds the scores of transformers in
float32 and in bfloat16 of the same weights, so that a deviation can be compared with what bfloat16 costs.

Needs torch, transformers and tokenizers.
"""

import argparse
import json
import random
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedTokenizerFast

VOCAB = 8192
DECODER = dict(hidden_size=1024, intermediate_size=2816, num_hidden_layers=12, num_attention_heads=16, num_key_value_heads=8,
               max_position_embeddings=2048, pad_token_id=0, bos_token_id=1, eos_token_id=2)
ENCODER = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=12, num_attention_heads=16, max_position_embeddings=2048, pad_token_id=0)
FAMILIES = {
    "llama": ("llama", dict(DECODER, rope_theta=500000.0), "score"),
    "qwen3-mlp-head": ("qwen3", dict(DECODER, head_dim=64), "mlp"),
    "bert": ("bert", ENCODER, "classifier"),
}


def tokenizer():
    words = ["<pad>", "<s>", "</s>", "<unk>"] + [f"w{i}" for i in range(VOCAB - 4)]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
                                   model_input_names=["input_ids", "attention_mask"])


def family(folder, model_type, config, head, lengths):
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, vocab_size=VOCAB, num_labels=1, **config)
    config._attn_implementation = "eager"
    model = AutoModelForSequenceClassification.from_config(config).eval().float()
    if head == "mlp":
        width = config.hidden_size
        model.score = torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.ReLU(), torch.nn.Linear(width, 1))
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            scale = 0.5 if "embed" in name else 1.1 / parameter.shape[-1] ** 0.5
            parameter.data = torch.randn(parameter.shape) * scale
        elif name.endswith("bias"):
            parameter.data = torch.randn(parameter.shape) * 0.1
        else:
            parameter.data = 1 + 0.1 * torch.randn(parameter.shape)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    draw = random.Random(0)
    inputs = [[draw.randrange(4, VOCAB) for _ in range(length)] for length in lengths]

    def scores(dtype):
        # The rotary frequencies stay as they are; only weights and arithmetic change.
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        model.to(dtype)
        for name, buffer in model.named_buffers():
            buffer.data = buffers[name]
        with torch.no_grad():
            return [float(model(input_ids=torch.tensor([ids])).logits[0, 0]) for ids in inputs]

    full = scores(torch.float32)
    half = scores(torch.bfloat16)
    cases = [{"input_ids": ids, "scores": {"float32": f, "bfloat16": h}} for ids, f, h in zip(inputs, full, half)]
    (folder / "golden.json").write_text(json.dumps({"transformers": transformers.__version__, "cases": cases}) + "\n")
    parameters = sum(p.numel() for p in model.parameters())
    deviation = max(abs(h - f) / max(1, abs(f)) for f, h in zip(full, half))
    print(f"{folder.name}: {parameters / 1e6:.0f} M parameters, {len(cases)} cases, scores {min(full):.3f} to {max(full):.3f}, "
          f"bfloat16 deviates by {deviation:.2e}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--cases", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--only")
    arguments = parser.parse_args()
    lengths = [arguments.tokens - 37 * (i % 4) for i in range(arguments.cases)]
    for name, (model_type, config, head) in FAMILIES.items():
        if arguments.only is None or name in arguments.only.split(","):
            family(arguments.work / name, model_type, config, head, lengths)


if __name__ == "__main__":
    main()
