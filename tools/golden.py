#!/usr/bin/env python3
"""Reference scores of a checkpoint, by Hugging Face transformers, for `warm verify`.

    tools/golden.py CKPT --data X.jsonl [--out golden.json]

X.jsonl holds lines as `warm score` reads them: {"text"}, {"text", "text_pair"}, {"messages"}, {"prompt", "completion"},
{"prompt", "completions"} or {"input_ids"}. The output holds, case by case, the input, the token ids, the position of the
token that the head reads, and the score, in float32 on the CPU, one sequence at a time, without padding.

transformers is the referee: its tokenizer, its chat template, its body, and its own head where the class of the checkpoint
is one of its own. A head that transformers does not know (OpenRLHF's value head, GRM's v_head, UltraRM's regression_head,
InternLM2's v_head, an MLP under `score`, ArmoRM's gating network, rows of a language-model head, steps) is applied here,
in a few lines of torch, from the checkpoint's own tensors. --pooling and --head say what a recipe says.

Needs torch, transformers and safetensors.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import torch
import transformers
from safetensors import safe_open
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

HEADS = ("score", "v_head.summary", "v_head", "value_head", "regression_head", "reward_head", "score_head", "out_proj")
GATE = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"


def tensors_of(folder, prefixes):
    """The checkpoint's tensors whose names begin with one of these."""
    index = folder / "model.safetensors.index.json"
    files = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {"model.safetensors"}
    found = {}
    for file in sorted(files):
        with safe_open(folder / file, framework="pt") as tensors:
            for name in tensors.keys():
                if any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes):
                    found[name] = tensors.get_tensor(name).float()
    return found


def linear(tensors, name, x):
    return torch.nn.functional.linear(x, tensors[name + ".weight"], tensors.get(name + ".bias"))


def forget(model):
    """Dynamic rotary scaling keeps the frequencies of the longest sequence so far; every case is to be scored as if it came alone."""
    for module in model.modules():
        if hasattr(module, "original_inv_freq") and hasattr(module, "max_seq_len_cached"):
            module.inv_freq = module.original_inv_freq.clone()
            module.max_seq_len_cached = module.original_max_seq_len


def sequence(tensors, name, x):
    """NAME alone, or NAME.0, NAME.2, ... with ReLU between them."""
    if name + ".weight" in tensors:
        return linear(tensors, name, x)
    layers = sorted(int(key[len(name) + 1 : -len(".weight")]) for key in tensors if key.startswith(name + ".") and key.endswith(".weight"))
    for place, layer in enumerate(layers):
        x = linear(tensors, f"{name}.{layer}", x if place == 0 else torch.relu(x))
    return x


class Referee:
    def __init__(self, folder, pooling, head):
        self.folder, self.choice = folder, head
        self.config = AutoConfig.from_pretrained(folder)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.raw = json.loads((folder / "config.json").read_text())
        self.pad = self.raw.get("pad_token_id")
        self.gating = tensors_of(folder, ["regression_layer", "reward_transform_matrix", "gating"])
        self.tensors, self.name, self.native = {}, None, None
        if "tokens" in head:
            self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
            self.pooling = pooling or "last_token"
            return
        if self.gating:
            self.name, self.pooling = "regression_layer", pooling or "first_pad_minus_one"
        else:
            prefix = self.raw.get("value_head_prefix")
            self.tensors = tensors_of(folder, list(HEADS) + ([prefix] if prefix else []))
            known = [name for name in ([prefix] if prefix else []) + list(HEADS)
                     if any(key in self.tensors for key in (f"{name}.weight", f"{name}.0.weight"))]
            self.name = head.get("name") or (known[0] if known else None)
            native = self.name is None or (self.name == "score" and "score.0.weight" not in self.tensors)
            if native and pooling is None and "at" not in head and prefix is None:
                # The head's own rows decide; a config without labels would mean two.
                rows = {"num_labels": len(self.tensors["score.weight"])} if self.name == "score" else {}
                model, info = AutoModelForSequenceClassification.from_pretrained(
                    folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True, **rows)
                if not info["missing_keys"]:
                    self.native = model.eval()
                    return
            if self.name is None:
                sys.exit(f"{folder}: no head that this tool knows")
            own = (self.raw.get("architectures") or [""])[0]
            before_2025 = own == "INFORMForSequenceClassification" or own.endswith("ForRewardModel")
            last = prefix is not None or self.name != "score"
            self.pooling = pooling or ("last_token" if last else "first_pad_minus_one" if before_2025 else "last_non_pad")
        self.model = AutoModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()

    def encode(self, line):
        """Token ids and segment numbers, as transformers makes them."""
        tokenizer = self.tokenizer
        if "input_ids" in line:
            return {"input_ids": line["input_ids"]}
        if "messages" in line or ("prompt" in line and not line.get("raw")):
            messages = line.get("messages")
            if messages is None:
                prompt, completion = line["prompt"], line["completion"]
                prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
                messages = prompt + ([{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion)
            encoded = tokenizer.apply_chat_template(
                messages, tools=line.get("tools"), tokenize=True, return_dict=True, **line.get("template_args", {}))
            encoded = dict(encoded)
            return {key: value[0] if isinstance(value[0], list) else value for key, value in encoded.items()}
        if "prompt" in line:
            return dict(tokenizer(line["prompt"] + line["completion"]))
        return dict(tokenizer(line["text"], line.get("text_pair")))

    def one_token(self, name):
        if isinstance(name, int):
            return name
        ids = self.tokenizer(name, add_special_tokens=False)["input_ids"]
        if len(ids) == 1 and ids[0] != self.tokenizer.unk_token_id:
            return ids[0]
        found = self.tokenizer.convert_tokens_to_ids(name)
        if found is None or found == self.tokenizer.unk_token_id:
            sys.exit(f"{name!r} is not one token but {ids}")
        return found

    def position(self, ids):
        pad, last = self.pad, len(ids) - 1
        if isinstance(self.pooling, dict):
            return max(i for i, token in enumerate(ids) if token == self.one_token(self.pooling["token"]))
        if self.pooling == "last_non_pad" and pad is not None:
            return max((i for i, token in enumerate(ids) if token != pad), default=0)
        if self.pooling == "first_pad_minus_one" and pad is not None:
            first = ids.index(pad) if pad in ids else 0
            return (first - 1) % len(ids)
        return 0 if self.pooling == "cls" else last

    def outputs(self, hidden):
        if "tokens" in self.choice:
            rows = self.choice["tokens"]
            logits = hidden
            groups = [[self.one_token(name) for name in rows.get(side) or []] for side in ("plus", "minus")]
            return torch.stack([torch.logsumexp(logits[ids].double(), 0) for ids in groups if ids])
        if self.name == "regression_layer":
            return linear(self.gating, "regression_layer", hidden)
        return sequence(self.tensors, self.name, hidden)

    def combine(self, outputs, steps):
        weights = self.choice.get("weights")
        rows = "tokens" in self.choice
        if weights is None and len(outputs) == 2 and (rows or steps):
            weights = [1.0, -1.0] if rows else [-1.0, 1.0]
        elif isinstance(weights, dict):
            names = self.raw.get("id2label", {})
            weights = [weights.get(names.get(str(i)), 0.0) for i in range(len(outputs))]
        score = float(outputs[0]) if weights is None else sum(w * float(o) for w, o in zip(weights, outputs))
        default = "probability" if steps and len(outputs) == 2 else "logit"
        return 1 / (1 + math.exp(-score)) if self.choice.get("as", default) == "probability" else score

    def score(self, encoded):
        """What the reference says of one sequence: fields of a case."""
        ids = list(encoded["input_ids"])
        names = ("input_ids", "token_type_ids")
        given = {key: torch.tensor([list(value)]) for key, value in encoded.items() if key in names}
        given["attention_mask"] = torch.ones_like(given["input_ids"])
        forget(self.native if self.native is not None else self.model)
        if self.native is not None:
            logits = self.native(**given).logits[0]
            position = {"pooled_position": 0}  # encoders read the first token, or the mean of all
            if hasattr(self.native, "score"):  # transformers' own pooling: the rightmost token that is not the pad token
                pad = self.native.config.pad_token_id
                at = max((i for i, token in enumerate(ids) if token != pad), default=0) if pad is not None else len(ids) - 1
                position = {"pooled_position": at}
            weighted = self.combine(logits, False) if "weights" in self.choice else None
            values = [float(value) for value in logits]
            return {**position, "score": weighted if weighted is not None else values[0] if len(values) == 1 else values}
        hidden = self.model(**given).logits[0] if "tokens" in self.choice else self.model(**given).last_hidden_state[0]
        at = self.choice.get("at", "last")
        if at != "last":
            name = at["each"] if isinstance(at, dict) else json.loads(at.split(None, 1)[1])
            marker = self.one_token(name)
            places = [i for i, token in enumerate(ids) if token == marker]
            if not places:
                return {"failure": "no step"}
            steps = [{"position": i, "outputs": [float(o) for o in self.outputs(hidden[i])]} for i in places]
            for step in steps:
                step["reward"] = self.combine(step["outputs"], True)
            rewards = [step["reward"] for step in steps]
            reduce = {"last": lambda r: r[-1], "min": min, "product": math.prod, "mean": lambda r: sum(r) / len(r)}
            return {"pooled_position": places[-1], "steps": steps, "score": reduce[self.choice.get("reduce", "last")](rewards)}
        if self.pooling == "mean":
            outputs, position = self.outputs(hidden.mean(0)), 0
        else:
            position = self.position(ids)
            outputs = self.outputs(hidden[position])
        if self.name == "regression_layer":
            return {"pooled_position": position, "score": self.gated(ids, hidden, outputs), "outputs": [float(o) for o in outputs]}
        values = [float(value) for value in outputs]
        plain = len(values) == 1 or "weights" in self.choice or "tokens" in self.choice
        return {"pooled_position": position, "score": self.combine(outputs, False) if plain else values}

    def gated(self, ids, hidden, objectives):
        pattern = self.tokenizer(self.choice.get("gate_at", GATE), add_special_tokens=False)["input_ids"]
        at = max(i for i in range(len(ids) - len(pattern) + 1) if ids[i : i + len(pattern)] == pattern)
        gate = torch.softmax(sequence_of(self.gating, "gating.layers", hidden[at]) / self.raw.get("gating_temperature", 10), 0)
        gate = gate * self.gating["gating.logit_scale"][0]
        return float((gate * (objectives @ self.gating["reward_transform_matrix"])).sum())


def sequence_of(tensors, name, x):
    """NAME.0, NAME.1, ... with ReLU between them."""
    count = len([key for key in tensors if key.startswith(name + ".") and key.endswith(".weight")])
    for layer in range(count):
        x = linear(tensors, f"{name}.{layer}", x if layer == 0 else torch.relu(x))
    return x


def expand(line):
    """A line with several completions is a case for each of them."""
    if "completions" not in line:
        return [line]
    rest = {key: value for key, value in line.items() if key != "completions"}
    return [{**rest, "completion": completion} for completion in line["completions"]]


def golden(folder, lines, pooling=None, head=None):
    referee = Referee(Path(folder), pooling, head or {})
    closing = referee.raw.get("reward_token_id")
    cases = []
    for line in (case for line in lines for case in expand(line)):
        case = {key: value for key, value in line.items() if key != "id"}
        try:
            encoded = referee.encode(line)
        except Exception as error:  # the template refuses the conversation
            cases.append({**case, "failure": str(error)})
            continue
        if closing is not None and "input_ids" not in line and encoded["input_ids"][-1] != closing:
            encoded["input_ids"] = list(encoded["input_ids"]) + [closing]
            encoded.pop("token_type_ids", None)
        with torch.no_grad():
            case.update(input_ids=list(encoded["input_ids"]), **referee.score(encoded))
        cases.append(case)
    return {"transformers": transformers.__version__, "checkpoint": Path(folder).name, "cases": cases}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--data", required=True, help="lines of JSON, as warm score reads them")
    parser.add_argument("--out", default="-")
    parser.add_argument("--pooling", help="as in a recipe; JSON for {\"token\": NAME}")
    parser.add_argument("--head", default="{}", help="JSON, as `head:` in a recipe")
    arguments = parser.parse_args()
    pooling = arguments.pooling
    pooling = json.loads(pooling) if pooling and pooling.startswith("{") else pooling
    lines = [json.loads(line) for line in open(arguments.data, encoding="utf-8") if line.strip()]
    text = json.dumps(golden(arguments.checkpoint, lines, pooling, json.loads(arguments.head)), ensure_ascii=False, indent=1)
    if arguments.out == "-":
        print(text)
    else:
        Path(arguments.out).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
