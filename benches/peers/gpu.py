"""What benches/gpu.sh needs beside the bench: models of the right shapes, transformers on the same card, and the table.

    python3 gpu.py make FOLDER SHAPE [--members N]     random weights in bfloat16, and N members around them
    python3 gpu.py beside MODEL --bench GPU_BENCH --device cuda:0
    python3 gpu.py server MODEL --warm WARM --bench GPU_BENCH --device cuda:0
    python3 gpu.py step MODEL --warm WARM --device cuda:0
    python3 gpu.py table RESULTS

Only `beside` needs torch and transformers; where there are none it says so and is skipped.
"""
import argparse
import array
import json
import math
import os
import random
import re
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

FAMILY = Path(__file__).resolve().parents[2] / "demo" / "family" / "rm-0"
TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
# The published shapes; a run without a card takes the last.
SHAPES = {
    "qwen3-0.6b": ("Qwen3", dict(vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28,
                                 num_attention_heads=16, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True)),
    "llama-1b": ("Llama", dict(vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
                               num_attention_heads=32, num_key_value_heads=8, head_dim=64)),
    "llama-8b": ("Llama", dict(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                               num_attention_heads=32, num_key_value_heads=8, head_dim=128)),
    # Four of 48 layers: what a mixture costs is a matter of one.
    "qwen3-moe-4l": ("Qwen3Moe", dict(vocab_size=151936, hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768, num_experts=128,
                                      num_experts_per_tok=8, norm_topk_prob=True, num_hidden_layers=4, num_attention_heads=32,
                                      num_key_value_heads=4, head_dim=128)),
    "tiny-moe": ("Qwen3Moe", dict(vocab_size=4096, hidden_size=64, intermediate_size=128, moe_intermediate_size=32, num_experts=8,
                                  num_experts_per_tok=2, norm_topk_prob=True, num_hidden_layers=2, num_attention_heads=4,
                                  num_key_value_heads=2, head_dim=16)),
    "tiny": ("Llama", dict(vocab_size=4096, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                           num_attention_heads=4, num_key_value_heads=2, head_dim=16)),
}
# What must hold, by the name of a result: the field, and the bound (a floor where it is positive, else a ceiling).
BOUNDS = {
    "parity, all": ("largest", -1e-4),
    "parity in float16, all": ("largest", -2e-2),
    "flash, all": ("largest", -1e-2),
    "memory of a forward": ("share_of_plan", -1.0),
    "out of memory": ("recovered", True),
    "a lost device": ("told", True),
    "rank agreement": ("share", 0.999),
    "deviation": ("median", -5e-3),
    "alone against packed": ("largest", -1e-3),
    "alone against packed, batch invariant": ("equal_bits", True),
    "load of a merge of 4": ("times_a_read", -2.0),
    "mixed lengths beside transformers": ("times", 2.0),
    "a group beside transformers": ("times", 3.0),
    "a saturated server": ("share_of_engine", 0.9),
}
# The part of the card's own rate of matrix products that packs of equal lengths must reach, by the shape.
SHARES = {"llama-8b": 0.60, "llama-1b": 0.45, "qwen3-0.6b": 0.35}
# A model that is only to show that everything runs reads no more than this.
SMALL_POSITIONS = 256


def lengths(model):
    """Tokens of a prompt and of its completions, as the bench has them for this model."""
    most = json.loads((model / "config.json").read_text())["max_position_embeddings"]
    long = min(1024, most // 2)
    return long, long // 4


def trainers_step(model):
    """What a trainer with 64 cards scores at once."""
    prompt, completion = lengths(model)
    prompt, completion = (1000, 2000) if prompt == 1024 else (prompt, completion)
    return f"prompts=512,group=16,prompt={prompt},completion={completion}"


def say(**result):
    print(json.dumps(result), flush=True)


def noise(count, std, seed):
    """Normally distributed numbers as bfloat16: the upper halves of float32."""
    rng = random.Random(seed)
    floats = array.array("f", (rng.gauss(0, std) for _ in range(count)))
    halves = array.array("H", floats.tobytes())
    return halves[1 if sys.byteorder == "little" else 0 :: 2].tobytes()


# Drawn once and used over and over. A prime number of them, so that no two rows of a matrix begin at the same place.
DRAWN = 1_000_003
WHOLE = 64 << 20


def shapes_of(kind, n):
    """Names and shapes of a sequence classifier's tensors, and how far its numbers lie around zero (None: ones)."""
    hidden, inner, dim = n["hidden_size"], n["intermediate_size"], n["head_dim"]
    queries, keys = n["num_attention_heads"] * dim, n["num_key_value_heads"] * dim
    yield "model.embed_tokens.weight", [n["vocab_size"], hidden], 0.02
    for layer in range(n["num_hidden_layers"]):
        name = f"model.layers.{layer}."
        parts = {"self_attn.q_proj": [queries, hidden], "self_attn.k_proj": [keys, hidden], "self_attn.v_proj": [keys, hidden],
                 "self_attn.o_proj": [hidden, queries]}
        # A mixture has a router, and experts of a width of their own.
        mixture = n.get("num_experts", 0)
        if mixture:
            parts["mlp.gate"] = [mixture, hidden]
        wide = n["moe_intermediate_size"] if mixture else inner
        for mlp in [f"mlp.experts.{expert}." for expert in range(mixture)] or ["mlp."]:
            parts |= {f"{mlp}gate_proj": [wide, hidden], f"{mlp}up_proj": [wide, hidden], f"{mlp}down_proj": [hidden, wide]}
        for part, shape in parts.items():
            yield f"{name}{part}.weight", shape, 1 / math.sqrt(shape[1])
        norms = ["input_layernorm", "post_attention_layernorm"]
        for norm in norms:
            yield f"{name}{norm}.weight", [hidden], None
        if kind.startswith("Qwen3"):
            for norm in ("self_attn.q_norm", "self_attn.k_norm"):
                yield f"{name}{norm}.weight", [dim], None
    yield "model.norm.weight", [hidden], None
    # A random head gives rewards of some size, so that ranks mean something.
    yield "score.weight", [1, hidden], 0.1


def make(folder, shape, members):
    kind, numbers = SHAPES[shape]
    config = dict(numbers, architectures=[f"{kind}ForSequenceClassification"], model_type="qwen3_moe" if kind == "Qwen3Moe" else kind.lower(), dtype="bfloat16", torch_dtype="bfloat16",
                  max_position_embeddings=SMALL_POSITIONS if shape.startswith("tiny") else 8192, rope_theta=500000.0, rms_norm_eps=1e-5, hidden_act="silu", attention_bias=False,
                  mlp_bias=False, num_labels=1, id2label={"0": "LABEL_0"}, pad_token_id=0, eos_token_id=2, bos_token_id=1, use_cache=False)
    tensors = list(shapes_of(kind, numbers))
    blocks = {}

    def block(std):
        if std not in blocks:
            drawn = struct.pack("<H", 0x3F80) if std is None else noise(DRAWN, std, len(blocks))
            blocks[std] = drawn * max(1, WHOLE // len(drawn))
        return blocks[std]

    def write(target, shift):
        target.mkdir(parents=True, exist_ok=True)
        header, end = {}, 0
        for name, dims, _ in tensors:
            start, end = end, end + 2 * math.prod(dims)
            header[name] = {"dtype": "BF16", "shape": dims, "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(target / "model.safetensors", "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for number, (_, dims, std) in enumerate(tensors):
                drawn, rest = memoryview(block(std)), 2 * math.prod(dims)
                # Members differ in where their numbers begin, by little of the whole: like runs of one training.
                at = 2 * ((number * 104_729 + shift * (number % 7 == 0)) % DRAWN) if std is not None else 0
                while rest:
                    part = drawn[at : at + min(rest, len(drawn) - at)]
                    file.write(part)
                    at, rest = 0, rest - len(part)
        (target / "config.json").write_text(json.dumps(config, indent=1))
        for name in TEXT_FILES:
            shutil.copy(FAMILY / name, target / name)

    write(folder / shape, 0)
    for member in range(members):
        write(folder / f"{shape}-member-{member}", member + 1)
    say(what="made", shape=shape, members=members, parameters=sum(math.prod(dims) for _, dims, _ in tensors))


class Peer:
    """transformers with its own fused attention, in padded batches of 16 sorted by length."""

    def __init__(self, folder, dtype, device):
        import torch
        from transformers import AutoModelForSequenceClassification

        self.torch, self.device = torch, device
        loaded = AutoModelForSequenceClassification.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
        self.model = loaded.to(self.device).eval()

    def scores(self, samples, batch=16):
        torch, scores = self.torch, [0.0] * len(samples)
        order = sorted(range(len(samples)), key=lambda i: len(samples[i]))
        with torch.inference_mode():
            for start in range(0, len(order), batch):
                chosen = order[start : start + batch]
                longest = max(len(samples[i]) for i in chosen)
                ids = torch.tensor([samples[i] + [0] * (longest - len(samples[i])) for i in chosen], device=self.device)
                mask = torch.tensor([[1] * len(samples[i]) + [0] * (longest - len(samples[i])) for i in chosen], device=self.device)
                for i, score in zip(chosen, self.model(input_ids=ids, attention_mask=mask).logits[:, 0].float().tolist()):
                    scores[i] = score
        return scores

    def seconds(self, samples, rounds=3):
        times = []
        for _ in range(rounds + 1):
            start = time.perf_counter()
            self.scores(samples)
            times.append(time.perf_counter() - start)
        return statistics.median(times[1:])


def ids(rng, vocabulary, length):
    return [rng.randrange(10, vocabulary - 10) for _ in range(length)]


def bench(program, arguments):
    done = subprocess.run([program, *arguments], stdout=subprocess.PIPE, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def beside(model, program, device, rounds):
    try:
        import torch
        import transformers  # noqa: F401
    except ImportError as error:
        say(what="beside transformers", model=model.name, skipped=str(error))
        return

    config = json.loads((model / "config.json").read_text())
    vocabulary, positions = config["vocab_size"], config["max_position_embeddings"]
    rng = random.Random(1)
    long, short = lengths(model)
    # Groups of eight completions of one prompt: a reward is compared within its group.
    groups = []
    for _ in range(32):
        prompt = ids(rng, vocabulary, rng.randrange(long // 16, long // 4))
        groups.append([prompt + ids(rng, vocabulary, rng.randrange(long // 32, long // 4)) for _ in range(8)])
    samples = [sample for group in groups for sample in group]
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "ids.json"
        path.write_text(json.dumps(samples))
        found = bench(program, ["scores", "--device", device, "--dtype", "bfloat16", "--ids", str(path), str(model)])[-1]["rewards"]
    exact = Peer(model, torch.float32, device).scores(samples)
    pairs = agreed = 0
    for first in range(0, len(samples), 8):
        for i in range(first, first + 8):
            for j in range(i + 1, first + 8):
                if abs(exact[i] - exact[j]) > 1e-2:
                    pairs += 1
                    agreed += (found[i] > found[j]) == (exact[i] > exact[j])
    say(what="rank agreement", model=model.name, pairs=pairs, share=agreed / max(pairs, 1))
    deviations = [abs(a - b) for a, b in zip(found, exact)]
    say(what="deviation", model=model.name, median=statistics.median(deviations), largest=max(deviations))

    peer = Peer(model, torch.bfloat16, device)
    rates = {result["what"]: result for result in bench(program, ["rates", "--rounds", rounds, "--device", device, "--dtype", "bfloat16", str(model)])}
    # The same lengths as in the bench: 64 to 4096 evenly on a scale of doublings, and 16 completions of 256 behind 1024.
    mixed = [ids(rng, vocabulary, min(int(long / 16 * 64 ** (i / 63)), positions, 4 * long)) for i in range(64)]
    prompt = ids(rng, vocabulary, long)
    group = [prompt + ids(rng, vocabulary, short) for _ in range(16)]
    for what, samples in (("mixed lengths", mixed), ("a group", group)):
        theirs = sum(len(sample) for sample in samples) / peer.seconds(samples)
        ours = rates[what]["tokens_per_second"]
        say(what=f"{what} beside transformers", model=model.name, tokens_per_second=ours, transformers=theirs, times=ours / theirs)


def server(model, warm, program, device, rounds, seconds, callers):
    rates = {result["what"]: result for result in bench(program, ["rates", "--rounds", rounds, "--device", device, "--dtype", "bfloat16", str(model)])}
    prompt, completion = lengths(model)
    engine = rates["groups that fill a pack"]["tokens_per_second"]
    arguments = [warm, "serve", str(model), "--device", device, "--dtype", "bfloat16", "--max-pack-tokens", "16384",
                 "--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0", "--drain-delay", "0s"]
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, env={**os.environ, "NO_COLOR": "1"})
    try:
        address = None
        for line in process.stderr:
            line = re.sub(r"\x1b\[[0-9;]*m", "", line)
            if found := re.search(r"grpc=(\S+)", line):
                address = found[1]
            if re.search(r"\bready\b", line):
                break
        # Somebody has to go on reading, or the server stops at a full pipe.
        threading.Thread(target=lambda: [None for _ in process.stderr], daemon=True).start()
        # Groups like those of the engine's own rate, from many callers at once.
        run = [warm, "bench", "--addr", address, "--duration", seconds, "--concurrency", callers, "--prompt-tokens", str(prompt),
               "--completion-tokens", str(completion), "--group", "16", "--json"]
        found = json.loads(subprocess.run(run, stdout=subprocess.PIPE, text=True, check=True).stdout)
        rate = found["per_second"]["tokens"]
        say(what="a saturated server", model=model.name, tokens_per_second=rate, engine=engine, share_of_engine=rate / engine,
            p50_ms=found["latency_ms"]["scored"]["p50"])
    finally:
        process.terminate()
        process.wait(timeout=60)


def step(model, warm, device):
    """A trainer's step by the rate of groups like its own, measured on the card."""
    workload = trainers_step(model)
    run = [warm, "plan", str(model), "--dtype", "bfloat16", "--device", device, "--max-pack-tokens", "16384", "--workload", workload,
           "--step-seconds", "60", "--measure", "--json"]
    found = json.loads(subprocess.run(run, stdout=subprocess.PIPE, text=True, check=True).stdout)["step"]
    say(what="a step of 64 cards' trainer", model=model.name, workload=workload, seconds=found["seconds"], cards_for_60_s=found["cards"],
        distinct_tokens=found["distinct_tokens"], rate=found["rate"])


def verdict(what, line):
    """The field that counts, its bound in words, and whether it holds; None for what has no bound."""
    if what == "equal lengths" and line.get("model") in SHARES:
        field, bound = "share_of_matrix_rate", SHARES[line["model"]]
    elif what in BOUNDS:
        field, bound = BOUNDS[what]
    else:
        return None
    if bound is True:
        return field, "true", line[field] is True
    if what.startswith("parity") and (line["skipped"] or not line["cases"]) or line.get("absent") is not None and line["absent"] == line["shapes"]:
        return "what was checked", "all of it", False
    return field, f"{'>=' if bound > 0 else '<='} {abs(bound)}", line[field] >= bound if bound > 0 else line[field] <= -bound


def table(results):
    lines = [json.loads(line) for line in results.read_text().splitlines() if line.startswith("{")]
    missed, seen = 0, {line["what"] for line in lines}
    for line in lines:
        what = line.pop("what")
        # Each of these has a line for all of them.
        if what in ("parity", "flash"):
            continue
        numbers = ", ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in line.items())
        found = verdict(what, line)
        missed += what == "FAILED"
        words = ""
        if found:
            field, bound, holds = found
            missed += not holds
            words = f"  {'holds' if holds else 'MISSED'}: {field} {bound}"
        print(f"{what:36} {numbers}{words}")
    for what in BOUNDS.keys() - seen:
        print(f"{what:36} not run")
    print(f"{missed} bounds missed")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=["make", "beside", "server", "step", "table"])
    parser.add_argument("path", type=Path)
    parser.add_argument("shape", nargs="?")
    parser.add_argument("--members", type=int, default=0)
    parser.add_argument("--bench")
    parser.add_argument("--warm")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--rounds", default="3")
    parser.add_argument("--seconds", default="20s")
    parser.add_argument("--callers", default="32")
    given = parser.parse_args()
    if given.verb == "make":
        if given.shape not in SHAPES:
            sys.exit(f"expected one of {', '.join(SHAPES)}, found {given.shape}")
        make(given.path, given.shape, given.members)
    elif given.verb == "beside":
        beside(given.path, given.bench, given.device, given.rounds)
    elif given.verb == "server":
        server(given.path, given.warm, given.bench, given.device, given.rounds, given.seconds, given.callers)
    elif given.verb == "step":
        step(given.path, given.warm, given.device)
    else:
        table(given.path)


if __name__ == "__main__":
    main()
