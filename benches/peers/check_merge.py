"""Check that what `warm merge` writes is what transformers loads: the tensors, and the scores.

usage: check_merge.py WARM MEMBER MEMBER...        needs torch, transformers

Merges the members uniformly to float32 and to bfloat16. Then transformers must load each with no tensor missing or left
over, every tensor must be the float64 mean rounded once, and the scores of `warm score` must be those of transformers.
"""
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer


def load(folder):
    return {name: tensor for file in sorted(Path(folder).glob("*.safetensors")) for name, tensor in load_file(file).items()}


def round_once(exact, dtype):
    """The nearest number of `dtype`, ties to even. PyTorch itself rounds float64 to float32 first, and ties twice."""
    near = exact.to(dtype)
    if dtype == torch.float32:
        return near
    bits = near.view(torch.int16)
    candidates = [(bits + step).view(dtype) for step in (-1, 0, 1)]
    distances = torch.stack([(candidate.double() - exact).abs().nan_to_num(torch.inf) for candidate in candidates])
    # Of two that are equally near, the even one.
    odd = torch.stack([candidate.view(torch.int16) & 1 for candidate in candidates]).double()
    best = (distances == distances.min(dim=0).values).double() * (2 - odd)
    return torch.stack(candidates).gather(0, best.argmax(dim=0, keepdim=True))[0]


def main():
    warm, folders = sys.argv[1], sys.argv[2:]
    members = [load(folder) for folder in folders]
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        with tempfile.TemporaryDirectory() as work:
            out = f"{work}/merged"
            subprocess.run([warm, "merge", *folders, "--dtype", name, "--out", out, "--max-shard-size", "50kB"], check=True, capture_output=True)
            written = load(out)
            wrong = 0
            for tensor in written:
                # As the merge defines it: each member times its coefficient, in order, in float64; rounded once.
                mean = sum(member[tensor].double() * (1.0 / len(members)) for member in members)
                assert written[tensor].dtype == dtype, tensor
                wrong += int((written[tensor] != round_once(mean, dtype)).sum())
            model, info = AutoModelForSequenceClassification.from_pretrained(out, output_loading_info=True)
            assert model.dtype == dtype, model.dtype
            left = {key: list(value) for key, value in info.items() if value}
            assert not left, left
            tokenizer = AutoTokenizer.from_pretrained(out)
            texts = ["hello", "The quick brown fox jumps over the lazy dog.", "a longer answer, with reasons: " * 8]
            lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
            scored = subprocess.run([warm, "score", out], input=lines, check=True, capture_output=True, text=True).stdout
            ours = [json.loads(line)["reward"] for line in scored.splitlines()]
            model = model.float().eval()
            with torch.no_grad():
                theirs = [float(model(**tokenizer(text, return_tensors="pt")).logits[0, 0]) for text in texts]
            largest = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
            total = sum(tensor.numel() for tensor in written.values())
            print(f"{name}: {len(written)} tensors in {len(list(Path(out).glob('*.safetensors')))} files, {wrong} of {total} elements not the float64 mean rounded once, scores differ by at most {largest:.2e}")
            assert largest < 1e-4 and wrong == 0, (ours, theirs)


if __name__ == "__main__":
    main()
