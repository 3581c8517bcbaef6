"""Write Llama reward models with random bfloat16 weights, for benches: OUT/rm-0 .. OUT/rm-(COUNT-1), two shards each.

usage: make_members.py OUT COUNT [LAYERS]

Ten layers (the default) are 168 M parameters, 336 MB a member. Needs numpy alone; the files are the usual ones of a Hugging
Face checkpoint, with the tokenizer of the bundled demo.
"""
import json
import pathlib
import shutil
import sys

import numpy as np

HIDDEN, INTERMEDIATE, VOCABULARY, SHARDS = 1024, 3072, 31_000, 2
DEMO = pathlib.Path(__file__).resolve().parents[2] / "demo/family/rm-0"


def shapes(layers):
    yield "model.embed_tokens.weight", (VOCABULARY, HIDDEN)
    for layer in range(layers):
        at = f"model.layers.{layer}."
        for name in "qkvo":
            yield f"{at}self_attn.{name}_proj.weight", (HIDDEN, HIDDEN)
        for name in ("gate", "up"):
            yield f"{at}mlp.{name}_proj.weight", (INTERMEDIATE, HIDDEN)
        yield f"{at}mlp.down_proj.weight", (HIDDEN, INTERMEDIATE)
        for name in ("input", "post_attention"):
            yield f"{at}{name}_layernorm.weight", (HIDDEN,)
    yield "model.norm.weight", (HIDDEN,)
    yield "score.weight", (1, HIDDEN)


def to_bfloat16(values):
    """The upper half of each float32, rounded to nearest, ties to even."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def main():
    out, count = pathlib.Path(sys.argv[1]), int(sys.argv[2])
    layers = int(sys.argv[3]) if len(sys.argv) > 3 else 10
    tensors = list(shapes(layers))
    half = len(tensors) // SHARDS
    parts = [tensors[:half], tensors[half:]]
    config = {
        "architectures": ["LlamaForSequenceClassification"], "model_type": "llama", "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE, "num_hidden_layers": layers, "num_attention_heads": 16,
        "num_key_value_heads": 16, "head_dim": HIDDEN // 16, "vocab_size": VOCABULARY, "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
        "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
        "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "torch_dtype": "bfloat16", "dtype": "bfloat16",
    }
    shared = np.random.default_rng(0)
    base = {name: shared.standard_normal(shape, dtype=np.float32) * np.float32(0.02) for name, shape in tensors}
    for member in range(count):
        folder = out / f"rm-{member}"
        folder.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(1 + member)
        places = {}
        for index, part in enumerate(parts):
            file = f"model-{index + 1:05}-of-{SHARDS:05}.safetensors"
            header, begin = {"__metadata__": {"format": "pt"}}, 0
            for name, shape in part:
                end = begin + 2 * int(np.prod(shape))
                header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
                places[name], begin = file, end
            text = json.dumps(header).encode()
            text += b" " * (-len(text) % 8)
            with open(folder / file, "wb") as to:
                to.write(len(text).to_bytes(8, "little") + text)
                for name, shape in part:
                    values = base[name] + rng.standard_normal(shape, dtype=np.float32) * np.float32(0.001)
                    to.write(to_bfloat16(values).tobytes())
        index = {"metadata": {"total_size": 2 * sum(int(np.prod(shape)) for _, shape in tensors)}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        (folder / "config.json").write_text(json.dumps(config, indent=2))
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(DEMO / name, folder / name)


if __name__ == "__main__":
    main()
