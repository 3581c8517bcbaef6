"""warm beside Hugging Face transformers on one CPU: the same model, the same samples, turn by turn in one run.

    python models.py /tmp/models
    python side_by_side.py --warm target/release/warm --models /tmp/models --texts texts.jsonl [--only WORK] [--json OUT]

Both sides compute in float32 with the same number of threads. warm is asked as a trainer asks it: over gRPC, by `warm bench`.
transformers gets its samples tokenised, in padded batches of 16, in this process. Whoever is not being timed is idle. A ratio
above 1 says how many times faster warm is; it is the ratio of the medians of all rounds. The second ratio is that of processor
time, the load generator's included: on a machine that others use as well it is the steadier one.

A line of --texts is {"prompt", "chosen", "rejected"} or {"prompt", "completions": [...]}.
"""
import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from serving import Server  # noqa: E402

BATCH = 16
# The slack of float32 sums in another order; a larger difference would be another score.
TOLERANCE = 2e-4


class Peer:
    def __init__(self, folder, dtype=torch.float32):
        self.model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=dtype).eval()
        self.pad = self.model.config.pad_token_id

    @torch.inference_mode()
    def scores(self, samples, batch=BATCH, by_length=False):
        order = sorted(range(len(samples)), key=lambda i: len(samples[i])) if by_length else range(len(samples))
        order, scores = list(order), [0.0] * len(samples)
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            longest = max(len(samples[i]) for i in chosen)
            ids = torch.tensor([samples[i] + [self.pad] * (longest - len(samples[i])) for i in chosen])
            mask = torch.tensor([[1] * len(samples[i]) + [0] * (longest - len(samples[i])) for i in chosen])
            for i, score in zip(chosen, self.model(input_ids=ids, attention_mask=mask).logits[:, 0].tolist()):
                scores[i] = score
        return scores


class Warm(Server):
    """A server of one model, and the load generator that asks it."""

    def __init__(self, binary, folder, threads, pack, cache="off"):
        # Rounds repeat their samples: what one round left in a cache would make the next one look faster than it is.
        super().__init__(binary, folder, threads, "--max-pack-tokens", pack, "--prefix-cache-bytes", cache)

    def lines(self, file, callers, extra=()):
        times = ["--warmup", "0s", "--duration", "1h", "--timeout", "10m"]
        count = sum(1 for _ in open(file))
        answer = self.bench("--input", file, "--concurrency", callers, "--requests", count, *times, *extra)
        if answer["samples"]["failed"] or answer["requests"]["refused"] or not answer["samples"]["scored"]:
            raise SystemExit(f"not everything was scored: {answer}")
        return answer

    def scores(self, file):
        arguments = [self.warm, "score", "--connect", self.address, "--input", file]
        answers = map(json.loads, subprocess.run(arguments, check=True, capture_output=True, text=True).stdout.splitlines())
        return [score["reward"] for answer in answers for score in answer.get("scores", [answer])]

    def processor_seconds(self):
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def requests(folder, name, samples):
    """One request for every sample."""
    file = Path(folder) / f"{name}.jsonl"
    file.write_text("".join(json.dumps({"input_ids": ids}) + "\n" for ids in samples))
    return str(file)


def compare(name, warm, file, samples, ways, rounds, callers, agree=True, server=()):
    """Times every way of the peer beside warm, and prints a row for each."""
    if agree:
        # Once outside of the rounds: both sides have the same samples, or the row means nothing. It warms both up, too.
        expected, found = ways[0][1](), warm.scores(file)
        worst = max(abs(a - b) / max(1.0, abs(a)) for a, b in zip(expected, found))
        if worst > TOLERANCE:
            raise SystemExit(f"{name}: the scores differ by {worst}")
    own, times = [], {label: [] for label, _ in ways}
    for _ in range(rounds):
        own.append(time_warm(warm, file, callers, server))
        for label, run in ways:
            times[label].append(time_peer(run))
    return ratios(name, own, times, sum(map(len, samples)))


def time_warm(warm, file, callers, server=()):
    before, children = warm.processor_seconds(), resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = warm.lines(file, callers, server)["seconds"]
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    client = after.ru_utime + after.ru_stime - children.ru_utime - children.ru_stime
    return seconds, warm.processor_seconds() - before + client


def time_peer(run):
    start = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - start[0], time.process_time() - start[1]


def ratios(name, own, times, tokens):
    median = lambda taken, which: statistics.median(times[which] for times in taken)
    rows = []
    for label, taken in times.items():
        wall, processor = (median(taken, which) / median(own, which) for which in (0, 1))
        speed = tokens / median(own, 0)
        rows.append({"work": name, "against": label, "ratio": round(wall, 2), "processor_ratio": round(processor, 2), "tokens_per_s": round(speed)})
        print(f"| {name} | {label} | {wall:.2f} | {processor:.2f} | {speed:.0f} |", flush=True)
    return rows


def spread(name, warm, peer, draw, shape, rounds):
    """A group whose samples come one by one, each in a request and a pack of its own, between those of another group. Every
    round has samples of its own: what warm has kept is what it was sent in this round."""
    prompt, count, completion = shape
    own, times = [], {"transformers, one padded batch each": []}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(rounds):
            prompts = [draw(prompt) for _ in range(2)]
            samples = [shared + draw(completion) for _ in range(count) for shared in prompts]
            file = requests(folder, "spread", samples)
            own.append(time_warm(warm, file, 1))
            groups = [samples[0::2], samples[1::2]]
            expected = []
            times["transformers, one padded batch each"].append(
                time_peer(lambda: expected.extend(peer.scores(group, batch=count) for group in groups))
            )
            # After the time was taken: warm has all of them now, and still says the same.
            found = warm.scores(file)
            worst = max(abs(a - b) / max(1.0, abs(a)) for g in range(2) for a, b in zip(expected[g], found[g::2]))
            if worst > TOLERANCE:
                raise SystemExit(f"{name}: the scores differ by {worst}")
    return ratios(name, own, times, 2 * count * (prompt + completion))


def chat_texts(file, tokenizer, count, generator):
    lines = [json.loads(line) for line in open(file)]
    generator.shuffle(lines)
    samples = []
    for line in lines:
        for completion in line.get("completions") or [line["chosen"], line["rejected"]]:
            messages = [{"role": "user", "content": line["prompt"]}, {"role": "assistant", "content": completion}]
            ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
            samples.append(ids[:2048])
    samples = samples[:count]
    generator.shuffle(samples)
    return samples


def print_ceiling(prompt, count, completion):
    distinct, whole = prompt + count * completion, count * (prompt + completion)
    print(f"|   distinct tokens: {distinct} of {whole} | ceiling {whole / distinct:.1f} | | | |", flush=True)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--warm", required=True)
    parser.add_argument("--models", required=True)
    parser.add_argument("--texts")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scale", type=int, default=100, help="percent of the samples, for slow machines")
    parser.add_argument("--cache", default="1GiB", help="prefix_cache_bytes of the spread groups")
    parser.add_argument("--only", help="work whose name contains this")
    parser.add_argument("--json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    generator, rows = random.Random(0), []
    draw = lambda length, vocabulary=4000: [generator.randrange(5, vocabulary) for _ in range(length)]
    wanted = lambda name: options.only is None or options.only in name
    print("| work | against | ratio | processor time | warm, tokens/s |\n|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        decoder = f"{options.models}/qwen3-60m"
        peer = Peer(decoder)
        warm = Warm(options.warm, decoder, options.threads, 8192)
        try:
            if options.texts and wanted("chat texts"):
                samples = chat_texts(options.texts, AutoTokenizer.from_pretrained(decoder), 48 * options.scale // 100, generator)
                file = requests(folder, "chat", samples)
                ways = [
                    ("transformers, batches of 16 sorted by length", lambda: peer.scores(samples, by_length=True)),
                    ("transformers, batches of 16 as they come", lambda: peer.scores(samples)),
                ]
                rows += compare("chat texts", warm, file, samples, ways, options.rounds, 64)
            if wanted("equal lengths"):
                samples = [draw(512) for _ in range(max(1, 32 * options.scale // 100))]
                file = requests(folder, "equal", samples)
                half = Peer(decoder, torch.bfloat16)
                ways = [("transformers float32", lambda: peer.scores(samples)), ("transformers bfloat16", lambda: half.scores(samples))]
                rows += compare("equal lengths of 512", warm, file, samples, ways, options.rounds, 32)
            for prompt, count, completion in [(512, 16, 128), (300, 16, 1000), (4000, 4, 500)]:
                name = f"group {prompt} + {count} x {completion}"
                if not wanted(name):
                    continue
                shared = draw(prompt)
                samples = [shared + draw(completion) for _ in range(count)]
                group = Path(folder) / "group.jsonl"
                group.write_text(json.dumps({"prompt": shared, "completions": [ids[prompt:] for ids in samples]}) + "\n")
                ways = [("transformers, one padded batch", lambda: peer.scores(samples, batch=count))]
                rows += compare(name, warm, str(group), samples, ways, min(options.rounds, 3), 1)
                print_ceiling(prompt, count, completion)
        finally:
            warm.stop()
        if wanted("spread"):
            warm = Warm(options.warm, decoder, options.threads, 8192, options.cache)
            try:
                for prompt, count, completion in [(512, 16, 128), (300, 16, 1000), (4000, 4, 500)]:
                    shape = (prompt, max(2, count * options.scale // 100), completion)
                    rows += spread(f"spread {shape[0]} + {shape[1]} x {shape[2]}", warm, peer, draw, shape, options.rounds)
                    print_ceiling(*shape)
            finally:
                warm.stop()
        if wanted("encoder"):
            encoder = f"{options.models}/bert-22m"
            peer, warm = Peer(encoder), Warm(options.warm, encoder, options.threads, 8192)
            try:
                samples = [draw(generator.choice([16, 32, 64, 128, 256, 512]) - generator.randrange(12), 30000) for _ in range(128 * options.scale // 100)]
                file = requests(folder, "encoder", samples)
                ways = [
                    ("transformers, batches of 16 sorted by length", lambda: peer.scores(samples, by_length=True)),
                    ("transformers, batches of 16 as they come", lambda: peer.scores(samples)),
                ]
                rows += compare("encoder of 22 M", warm, file, samples, ways, options.rounds, 64)
            finally:
                warm.stop()
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    sys.exit(main())
