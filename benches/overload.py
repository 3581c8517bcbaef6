"""What a server does at ten times its capacity: goodput, how fast what is refused is answered, and memory.

    python overload.py --warm target/release/warm --model FOLDER [--seconds 20] [--times 10]

Capacity is what callers in a closed loop get done; then requests come at random times at so many times that rate, whatever has
come back. Load generator and server share the machine. Latencies count from when a request was due. Needs nothing beside Python.
"""
import argparse
import itertools
import json
import threading
from pathlib import Path

from serving import Server

# Below what the load generator keeps under way, so that the server has to refuse.
MAX_REQUESTS, IN_FLIGHT, CALLERS = 128, 4096, 16


class Memory:
    """The server's resident memory, watched while a load runs."""

    def __init__(self, pid):
        self.file, self.seen, self.done = Path(f"/proc/{pid}/status"), [], threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)

    def now(self):
        lines = self.file.read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))

    def watch(self):
        while not self.done.wait(0.1):
            self.seen.append(self.now())

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.done.set()
        self.thread.join()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--warm", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=int, default=20)
    parser.add_argument("--times", type=float, default=10)
    parser.add_argument("--nice", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=128, help="of each request's one sample")
    options = parser.parse_args()
    shape = ["--prompt-tokens", str(options.tokens // 2), "--completion-tokens", str(options.tokens - options.tokens // 2), "--group", "1"]

    seeds = itertools.count(1)

    def bench(*extra):
        # Every run has texts of its own: what the server keeps of one would make it look faster in the next.
        return server.bench("--seed", next(seeds), "--duration", f"{options.seconds}s", "--warmup", "3s", *shape, *extra)

    def measure(server, *extra):
        memory = Memory(server.process.pid)
        capacity = bench("--concurrency", str(CALLERS))["per_second"]["requests"]
        before = memory.now()
        with memory:
            flood = bench("--rate", str(options.times * capacity), "--in-flight", str(IN_FLIGHT), *extra)
        after = bench("--concurrency", str(CALLERS))["per_second"]["requests"]
        goodput, latency = flood["per_second"]["requests"], flood["latency_ms"]
        figures = lambda times: times and {key: times[key] for key in ("p50", "p99", "p99.9")}
        return {
            "capacity_per_s": capacity,
            "asked_per_s": options.times * capacity,
            "goodput_per_s": goodput,
            "goodput_of_capacity": goodput / ((capacity + after) / 2),
            "requests": flood["requests"],
            "refused_ms": figures(latency["refused"]),
            "refused_since_sent_ms": figures(latency["refused_since_sent"]),
            "scored_ms": figures(latency["scored"]),
            "send_lag_p99_ms": flood["send_lag_ms"]["p99"],
            "memory_mib": {"before": before, "largest": max(memory.seen), "last": memory.seen[-1]},
            "capacity_afterwards_per_s": after,
        }

    rows = {}
    with Server(options.warm, options.model, options.threads, "--nice", options.nice, "--admission-max-requests", MAX_REQUESTS) as server:
        rows[f"{MAX_REQUESTS} requests in flight"] = measure(server)
    # Room for more than is done in the time that callers wait.
    with Server(options.warm, options.model, options.threads, "--nice", options.nice) as server:
        rows["default settings, deadline 2 s"] = measure(server, "--timeout", "2s")
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
