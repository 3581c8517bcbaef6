"""What benches/gpu.sh needs beside the bench: models of the right shapes, transformers on the same card, and the table.

    python3 gpu.py make FOLDER SHAPE [--members N]     random weights in bfloat16, and N members around them
    python3 gpu.py beside MODEL --bench GPU_BENCH --device cuda:0
    python3 gpu.py server MODEL --warm WARM --bench GPU_BENCH --device cuda:0
    python3 gpu.py table RESULTS
"""
import argparse
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

FAMILY = Path(__file__).resolve().parents[2] / "demo" / "family" / "rm-0"
TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
# The published shapes; a smoke test of this file takes the last.
SHAPES = {
    "qwen3-0.6b": ("qwen3", dict(vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28,
                                 num_attention_heads=16, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True)),
    "llama-1b": ("llama", dict(vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
                               num_attention_heads=32, num_key_value_heads=8, head_dim=64)),
    "llama-8b": ("llama", dict(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                               num_attention_heads=32, num_key_value_heads=8, head_dim=128)),
    "tiny": ("llama", dict(vocab_size=4096, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                           num_attention_heads=4, num_key_value_heads=2, head_dim=16)),
}
# What must hold, by the name of a result: the field, and the bound (a floor where it is positive, else a ceiling).
BOUNDS = {
    "parity, all": ("largest", -1e-4),
    "rank agreement": ("share", 0.999),
    "deviation": ("median", -5e-3),
    "mixed lengths beside transformers": ("times", 2.0),
    "a group beside transformers": ("times", 3.0),
    "a saturated server": ("share_of_engine", 0.9),
}


def say(**result):
    print(json.dumps(result), flush=True)


def make(folder, shape, members):
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    kind, numbers = SHAPES[shape]
    config = AutoConfig.for_model(kind, **numbers, max_position_embeddings=8192, rope_theta=500000.0, num_labels=1,
                                  pad_token_id=0, eos_token_id=2, bos_token_id=1, use_cache=False)
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForSequenceClassification.from_config(config, dtype=torch.bfloat16)
    # A random head gives rewards of some size, so that ranks mean something.
    torch.nn.init.normal_(model.score.weight, std=0.1)

    def write(target):
        model.save_pretrained(target)
        for name in TEXT_FILES:
            shutil.copy(FAMILY / name, target / name)

    write(folder / shape)
    for member in range(members):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 1e-3)
        write(folder / f"{shape}-member-{member}")
    say(what="made", shape=shape, parameters=sum(p.numel() for p in model.parameters()))


class Peer:
    """transformers with its own fused attention, in padded batches of 16 sorted by length."""

    def __init__(self, folder, dtype):
        import torch
        from transformers import AutoModelForSequenceClassification

        self.torch = torch
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
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
    import torch

    vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
    rng = random.Random(1)
    # Groups of eight completions of one prompt: a reward is compared within its group.
    groups = []
    for _ in range(32):
        prompt = ids(rng, vocabulary, rng.randrange(50, 300))
        groups.append([prompt + ids(rng, vocabulary, rng.randrange(20, 200)) for _ in range(8)])
    samples = [sample for group in groups for sample in group]
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "ids.json"
        path.write_text(json.dumps(samples))
        found = bench(program, ["scores", "--device", device, "--dtype", "bfloat16", "--ids", str(path), str(model)])[-1]["rewards"]
    exact = Peer(model, torch.float32).scores(samples)
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

    peer = Peer(model, torch.bfloat16)
    rates = {result["what"]: result for result in bench(program, ["rates", "--rounds", rounds, "--device", device, "--dtype", "bfloat16", str(model)])}
    # The same lengths as in the bench: 64 to 4096 evenly on a scale of doublings, and 16 completions of 256 behind 1024.
    mixed = [ids(rng, vocabulary, int(64 * 64 ** (i / 63))) for i in range(64)]
    prompt = ids(rng, vocabulary, 1024)
    group = [prompt + ids(rng, vocabulary, 256) for _ in range(16)]
    for what, samples in (("mixed lengths", mixed), ("a group", group)):
        theirs = sum(len(sample) for sample in samples) / peer.seconds(samples)
        ours = rates[what]["tokens_per_second"]
        say(what=f"{what} beside transformers", model=model.name, tokens_per_second=ours, transformers=theirs, times=ours / theirs)


def server(model, warm, program, device, rounds):
    rates = {result["what"]: result for result in bench(program, ["rates", "--rounds", rounds, "--device", device, "--dtype", "bfloat16", str(model)])}
    engine = rates["a group"]["tokens_per_second"]
    arguments = [warm, "serve", str(model), "--device", device, "--dtype", "bfloat16", "--max-pack-tokens", "16384",
                 "--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0", "--drain-delay", "0s"]
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, env={**os.environ, "NO_COLOR": "1"})
    try:
        address = None
        for line in process.stderr:
            if found := re.search(r"grpc=(\S+)", line):
                address = found[1]
            if re.search(r"\bready\b", line):
                break
        # Somebody has to go on reading, or the server stops at a full pipe.
        threading.Thread(target=lambda: [None for _ in process.stderr], daemon=True).start()
        # The group of the engine's own rate, from many callers at once.
        run = [warm, "bench", "--addr", address, "--duration", "20s", "--concurrency", "32", "--prompt-tokens", "1024",
               "--completion-tokens", "256", "--group", "16", "--json"]
        found = json.loads(subprocess.run(run, stdout=subprocess.PIPE, text=True, check=True).stdout)
        rate = found["per_second"]["tokens"]
        say(what="a saturated server", model=model.name, tokens_per_second=rate, engine=engine, share_of_engine=rate / engine,
            p50_ms=found["latency_ms"]["scored"]["p50"])
    finally:
        process.terminate()
        process.wait(timeout=60)


def table(results):
    lines = [json.loads(line) for line in results.read_text().splitlines() if line.startswith("{")]
    missed = 0
    for line in lines:
        what = line.pop("what")
        if what == "parity":
            continue
        numbers = ", ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in line.items())
        verdict = ""
        if what in BOUNDS:
            field, bound = BOUNDS[what]
            holds = line[field] >= bound if bound > 0 else line[field] <= -bound
            missed += not holds
            verdict = f"  {'holds' if holds else 'MISSED'}: {field} {'>=' if bound > 0 else '<='} {abs(bound)}"
        print(f"{what:36} {numbers}{verdict}")
    print(f"{missed} bounds missed")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=["make", "beside", "server", "table"])
    parser.add_argument("path", type=Path)
    parser.add_argument("shape", nargs="?")
    parser.add_argument("--members", type=int, default=0)
    parser.add_argument("--bench")
    parser.add_argument("--warm")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--rounds", default="3")
    given = parser.parse_args()
    if given.verb == "make":
        if given.shape not in SHAPES:
            sys.exit(f"expected one of {', '.join(SHAPES)}, found {given.shape}")
        make(given.path, given.shape, given.members)
    elif given.verb == "beside":
        beside(given.path, given.bench, given.device, given.rounds)
    elif given.verb == "server":
        server(given.path, given.warm, given.bench, given.device, given.rounds)
    else:
        table(given.path)


if __name__ == "__main__":
    main()
