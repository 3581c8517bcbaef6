"""How the cost of scoring grows with the length of a sample, the size of a group and the number of callers.

    python growth.py measure --warm target/release/warm --model FOLDER --out growth.json [--rounds 2] [--longest 16384]
    python growth.py plot growth.json growth.svg

Every point is `warm bench` against a server of its own on loopback, which computes with --threads threads. Needs nothing beside
Python. A token is counted where a caller sent it, also where the server had it computed already.
"""
import argparse
import json
import math
import platform
from pathlib import Path

from serving import Server

PACK = 8192


def bench(server, options, callers, prompt, completion, group=1):
    shape = ["--prompt-tokens", prompt, "--completion-tokens", completion, "--group", group]
    # So many requests of every caller, however long they take.
    ends = ["--requests", options.rounds * callers, "--warmup", "0s", "--duration", "1h", "--timeout", "10m"]
    answer = server.bench("--concurrency", callers, *shape, *ends)
    if answer["samples"]["failed"] or answer["requests"]["refused"] or not answer["samples"]["scored"]:
        raise SystemExit(f"not everything was scored: {answer}")
    return answer


def doublings(first, last):
    return [first << step for step in range(int(math.log2(last / first)) + 1)]


def point(x, answer):
    latency = answer["latency_ms"]["scored"]
    found = {"x": x, "tokens_per_s": answer["per_second"]["tokens"], "samples_per_s": answer["per_second"]["samples"]}
    found.update(p50_ms=latency["p50"], p99_ms=latency["p99"], samples=answer["samples"]["scored"])
    print(json.dumps(found), flush=True)
    return found


def measure(options):
    curves = {}
    serve = lambda *flags: Server(options.warm, options.model, options.threads, "--prefix-cache-bytes", "off", *flags)
    measured = lambda server, x, *load: point(x, bench(server, options, *load))
    # Twice as many callers as a pack has samples, so that the next pack is there when one ends.
    with serve("--max-tokens", options.longest, "--max-pack-tokens", max(PACK, options.longest)) as server:
        lengths = doublings(64, options.longest)
        curves["length"] = [measured(server, n, max(2, 2 * PACK // n), n // 2, n - n // 2) for n in lengths]
    with serve("--max-pack-tokens", PACK) as server:
        curves["group"] = [measured(server, n, max(2, 16 // n), 512, 128, n) for n in doublings(1, 64)]
        curves["callers"] = [measured(server, n, n, 64, 64) for n in doublings(1, 512)]
    config = json.loads((Path(options.model) / "config.json").read_text())
    shape = {key: config.get(key) for key in ("model_type", "hidden_size", "num_hidden_layers")}
    machine = {"processor": processor(), "threads": options.threads}
    Path(options.out).write_text(json.dumps({"model": shape, "machine": machine, "curves": curves}, indent=1) + "\n")


def processor():
    for line in open("/proc/cpuinfo") if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


# One panel for each curve: its title, what stands below it, and the lines with their colours.
PANELS = [
    ("length", "tokens/s by length", "tokens of a sample", [("tokens_per_s", "tokens/s", "#1f6f8b")]),
    ("group", "tokens/s by group size", "completions of 128 tokens behind a prompt of 512", [("tokens_per_s", "tokens/s, as sent", "#1f6f8b")]),
    ("callers", "milliseconds by callers", "callers, each with one sample of 128 tokens at a time",
     [("p50_ms", "p50", "#1f6f8b"), ("p99_ms", "p99", "#c8553d"), ("samples_per_s", "samples/s", "#7a8450")]),
]
WIDTH, HEIGHT, LEFT, TOP, BOTTOM, RIGHT = 360, 260, 58, 34, 46, 14


def plot(file, into):
    measured = json.loads(Path(file).read_text())
    parts = [panel(*what, measured["curves"][what[0]], index * WIDTH) for index, what in enumerate(PANELS)]
    model, machine = measured["model"], measured["machine"]
    words = f"{model['model_type']}, hidden {model['hidden_size']}, {model['num_hidden_layers']} layers, float32; " \
            f"{machine['processor']}, {machine['threads']} threads"
    Path(into).write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH * len(PANELS)} {HEIGHT + 22}" '
        f'font-family="sans-serif" font-size="11" fill="#333">\n<rect width="100%" height="100%" fill="#fff"/>\n'
        + "\n".join(parts)
        + f'\n<text x="{LEFT}" y="{HEIGHT + 14}" fill="#777">{escaped(words)}</text>\n</svg>\n'
    )


def panel(_, title, below, lines, points, offset):
    """Both axes go by doublings: a straight line is a power."""
    inner_width, inner_height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    xs, ys = [p["x"] for p in points], [p[key] for p in points for key, _, _ in lines]
    # At least two doublings from bottom to top, so that noise does not look like a slope.
    low, high = math.log2(min(ys)), math.log2(max(ys))
    low, high = math.floor(min(low, high - 2)), math.ceil(high)
    place_x = lambda x: offset + LEFT + inner_width * (math.log2(x / xs[0]) / max(1e-9, math.log2(xs[-1] / xs[0])))
    place_y = lambda y: TOP + inner_height * (high - math.log2(y)) / (high - low)
    drawn = [f'<text x="{offset + LEFT}" y="18" font-size="13" fill="#111">{escaped(title)}</text>']
    drawn.append(f'<text x="{offset + LEFT + inner_width / 2}" y="{HEIGHT - 10}" text-anchor="middle">{escaped(below)}</text>')
    step = max(1, math.ceil((high - low) / 7))
    for power in range(low, high + 1, step):
        y = place_y(2.0**power)
        drawn.append(f'<path d="M{offset + LEFT} {y:.1f}h{inner_width}" stroke="#e4e4e4"/>')
        drawn.append(f'<text x="{offset + LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{short(2.0**power)}</text>')
    for x in xs:
        drawn.append(f'<text x="{place_x(x):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{short(x)}</text>')
    for number, (key, name, colour) in enumerate(lines):
        path = " ".join(f"{place_x(p['x']):.1f},{place_y(p[key]):.1f}" for p in points)
        drawn.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        drawn += [f'<circle cx="{place_x(p["x"]):.1f}" cy="{place_y(p[key]):.1f}" r="2.5" fill="{colour}"/>' for p in points]
        drawn.append(f'<text x="{offset + LEFT + 8 + 76 * number}" y="{TOP + 10}" fill="{colour}">{escaped(name)}</text>')
    return "\n".join(drawn)


def short(value):
    return f"{value / 1024:g}k" if value >= 1024 else f"{value:g}"


def escaped(text):
    return text.replace("&", "&amp;").replace("<", "&lt;")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    measuring = verbs.add_parser("measure")
    measuring.add_argument("--warm", required=True)
    measuring.add_argument("--model", required=True)
    measuring.add_argument("--out", required=True)
    measuring.add_argument("--threads", type=int, default=2)
    measuring.add_argument("--rounds", type=int, default=2, help="requests of each caller for a point")
    measuring.add_argument("--longest", type=int, default=16384, help="tokens of the longest samples")
    plotting = verbs.add_parser("plot")
    plotting.add_argument("json")
    plotting.add_argument("svg")
    options = parser.parse_args()
    if options.verb == "measure":
        measure(options)
    else:
        plot(options.json, options.svg)


if __name__ == "__main__":
    main()
