"""Writes the models of the comparisons: random weights in the shapes that people serve on a CPU, with the demo's tokenizer.

    python models.py FOLDER
"""
import shutil
import sys
from pathlib import Path

import torch
from transformers import BertConfig, BertForSequenceClassification, Qwen3Config, Qwen3ForSequenceClassification

FAMILY = Path(__file__).resolve().parents[2] / "demo" / "family" / "rm-0"
TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def write(model, folder):
    model.to(torch.float32).save_pretrained(folder)
    for name in TEXT_FILES:
        shutil.copy(FAMILY / name, folder / name)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{folder.name}: {parameters / 1e6:.1f} M parameters")


def main(root):
    torch.manual_seed(0)
    decoder = Qwen3Config(
        vocab_size=4096, hidden_size=640, intermediate_size=1920, num_hidden_layers=12, num_attention_heads=10,
        num_key_value_heads=5, head_dim=64, max_position_embeddings=8192, pad_token_id=0, eos_token_id=2, num_labels=1,
        tie_word_embeddings=True, use_cache=False,
    )
    write(Qwen3ForSequenceClassification(decoder), root / "qwen3-60m")
    encoder = BertConfig(
        vocab_size=30522, hidden_size=384, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=12,
        max_position_embeddings=512, pad_token_id=0, num_labels=1,
    )
    write(BertForSequenceClassification(encoder), root / "bert-22m")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
