"""The work of size.sh: writes models of random weights, serves them, and measures. Python's own library alone.

    python3 size.py WARM SIZE...
"""

import json
import os
import pathlib
import shutil
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benches"))
from serving import Server  # noqa: E402

MEMBERS, RANK = 5, 16
# Hidden width, width of the MLP, layers, heads, heads of keys, width of a head, rows of the embedding.
SIZES = {
    "tiny": (64, 192, 2, 4, 2, 16, 4096),
    "60M": (640, 1920, 12, 10, 5, 64, 4096),
    "0.6B": (1024, 3072, 28, 16, 8, 128, 151_936),
}
ADMISSION = 2 << 30


def config(size):
    hidden, inner, layers, heads, keys, width, rows = SIZES[size]
    return {
        "architectures": ["LlamaForSequenceClassification"], "model_type": "llama", "hidden_size": hidden, "intermediate_size": inner,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": keys, "head_dim": width, "vocab_size": rows,
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "hidden_act": "silu", "attention_bias": False,
        "mlp_bias": False, "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
        "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "dtype": "bfloat16",
    }


def projections(size):
    hidden, inner, layers, heads, keys, width, _ = SIZES[size]
    for layer in range(layers):
        at = f"model.layers.{layer}."
        yield f"{at}self_attn.q_proj", (heads * width, hidden)
        yield f"{at}self_attn.k_proj", (keys * width, hidden)
        yield f"{at}self_attn.v_proj", (keys * width, hidden)
        yield f"{at}self_attn.o_proj", (hidden, heads * width)
        yield f"{at}mlp.gate_proj", (inner, hidden)
        yield f"{at}mlp.up_proj", (inner, hidden)
        yield f"{at}mlp.down_proj", (hidden, inner)


def tensors(size):
    hidden, _, layers, *_, rows = SIZES[size]
    yield "model.embed_tokens.weight", (rows, hidden)
    for name, shape in projections(size):
        yield f"{name}.weight", shape
    for layer in range(layers):
        for name in ("input", "post_attention"):
            yield f"model.layers.{layer}.{name}_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    yield "score.weight", (1, hidden)


def count(shape):
    return shape[0] * (shape[1] if len(shape) > 1 else 1)


# The upper byte of a bfloat16 is its sign and most of its exponent: with one of these two every number lies between 1/128 and
# 1/32 on either side, as weights do.
SIGNS = bytes(0x3C if byte < 128 else 0xBC for byte in range(256))


def random(numbers):
    values = bytearray(2 * numbers)
    values[0::2] = os.urandom(numbers)
    values[1::2] = os.urandom(numbers).translate(SIGNS)
    return values


def write(path, named):
    """A safetensors file of random numbers; norms are 1."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in named:
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + 2 * count(shape)]}
        end += 2 * count(shape)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in named:
            file.write(b"\x80\x3f" * shape[0] if len(shape) == 1 else random(count(shape)))


def members(size, folder):
    for number in range(MEMBERS):
        member = folder / f"rm-{number}"
        member.mkdir()
        write(member / "model.safetensors", list(tensors(size)))
        (member / "config.json").write_text(json.dumps(config(size)))
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(ROOT / "demo/family/rm-0" / name, member / name)
        yield str(member)


def adapters(size, folder):
    """LoRA adapters on every matrix of the first member."""
    named = []
    for name, (rows, columns) in projections(size):
        named += [(f"base_model.model.{name}.lora_A.weight", (RANK, columns)), (f"base_model.model.{name}.lora_B.weight", (rows, RANK))]
    named.append(("base_model.model.score.weight", (1, SIZES[size][0])))
    for number in range(MEMBERS):
        adapter = folder / f"lora-{number}"
        adapter.mkdir()
        write(adapter / "adapter_model.safetensors", named)
        targets = sorted({name.rsplit(".", 1)[1] for name, _ in projections(size)})
        (adapter / "adapter_config.json").write_text(json.dumps({
            "peft_type": "LORA", "task_type": "SEQ_CLS", "base_model_name_or_path": "../rm-0", "r": RANK, "lora_alpha": RANK,
            "target_modules": targets, "modules_to_save": ["score"], "bias": "none", "fan_in_fan_out": False, "use_rslora": False,
        }))
        yield str(adapter)


def forget(folder):
    """Lets the system drop what it keeps of these files, as a node that has never read them."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def memory(server, name):
    lines = pathlib.Path(f"/proc/{server.process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def started(warm, folder, models, *flags):
    """A server that has just become ready, and how long it took."""
    forget(folder)
    begun = time.monotonic()
    server = Server(warm, models[0], os.cpu_count(), *models[1:], *flags)
    return server, time.monotonic() - begun


def tokens_per_second(server):
    shape = ["--prompt-tokens", "256", "--completion-tokens", "256", "--group", "1", "--concurrency", "4", "--duration", "20s"]
    found = server.bench(*shape)
    if not found["samples"]["scored"]:
        raise SystemExit("nothing was scored in 20 s, so there is no rate to tell")
    return found["per_second"]["tokens"]


def free():
    lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def measure(warm, size):
    parameters = sum(count(shape) for _, shape in tensors(size))
    # The merge and every member in float32, and what is in flight.
    needed = 4 * parameters * (1 + MEMBERS) + ADMISSION
    if needed > free():
        print(f"{size}: left out, {needed / 1e9:.0f} GB are needed and {free() / 1e9:.0f} GB free", file=sys.stderr)
        return
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        full = list(members(size, folder))
        ways = [("off", full), ("resident", full), ("adapters", list(adapters(size, folder)))]
        for ensemble, models in ways:
            cache = folder / f"cache-{ensemble}"
            flags = ["--ensemble", ensemble, "--cache-dir", cache]
            server, cold = started(warm, folder, models, *flags)
            with server:
                ready, most = memory(server, "VmRSS"), memory(server, "VmHWM")
                rate = tokens_per_second(server)
            server, cached = started(warm, folder, models, *flags)
            server.stop()
            print(
                f"| {parameters / 1e6:.1f} M | {ensemble} | {ready / 1e9:.2f} GB | {most / 1e9:.2f} GB | {cold:.1f} s | {cached:.1f} s | {rate:.0f} |",
                flush=True,
            )


def main():
    warm, *sizes = sys.argv[1:]
    print("| parameters | `ensemble` (M = 5) | memory when ready | most while loading | until ready | with the merge cached | tokens/s |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for size in sizes:
        measure(warm, size)


if __name__ == "__main__":
    main()
