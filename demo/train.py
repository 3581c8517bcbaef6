#!/usr/bin/env python3
"""Train the bundled demo family: five small reward models that share one starting point.

The recipe is WARM's (arXiv 2401.12187), at toy scale:

  tokenizer  a byte-level BPE learnt on the corpus
  pretrain   one language model on ChatML conversations, next-token loss
  probe      one linear reward head on the frozen features  -> family/init
  members    M Bradley-Terry fine-tunings of all weights from init, each with its own
             seed, data order, learning rate and randomly swapped labels -> family/rm-K
  card       accuracy on val.jsonl of every checkpoint, of ENS and of WARM -> WORK/card.json
  golden     reference scores from transformers -> golden.json

Stages leave their results on disk, so each can be run alone and repeated:

  train.py --data DATA --out demo --work WORK --stage all

DATA holds corpus.jsonl.gz ({"prompt","response"}), train.jsonl.gz and val.jsonl
({"prompt","chosen","rejected"}).  val.jsonl is read by the card stage alone.
"""

import argparse
import gzip
import json
import math
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3ForSequenceClassification,
)

PAD, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# The pre-tokenisation of GPT-4 and Qwen: words keep their leading space, digits stand
# alone, punctuation and line breaks form their own pieces.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


# ---------------------------------------------------------------------------- data


def read_jsonl(path):
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def chat(prompt, answer):
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def render(tok, prompt, answer):
    return tok.apply_chat_template(chat(prompt, answer), tokenize=False)


def encode(tok, texts):
    """Token ids of each text; the special tokens are already written in the text."""
    return [e.ids for e in tok.backend_tokenizer.encode_batch(texts, add_special_tokens=False)]


def encode_pairs(tok, pairs, max_len):
    """Two lists of token ids, chosen and rejected.

    An answer over the limit loses its end, but keeps the closing "<|im_end|>\\n": the
    reward is read at the last token, which must be the same kind of place every time.
    """
    closing = encode(tok, [IM_END + "\n"])[0]

    def cut(ids):
        return ids if len(ids) <= max_len else ids[: max_len - len(closing)] + closing

    return tuple(
        [cut(i) for i in encode(tok, [render(tok, p["prompt"], p[side]) for p in pairs])]
        for side in ("chosen", "rejected")
    )


def pad_batch(seqs, pad_id, width=None):
    width = width or max(map(len, seqs))
    return torch.tensor([s + [pad_id] * (width - len(s)) for s in seqs])


# ----------------------------------------------------------------------- tokenizer


def stage_tokenizer(a):
    texts = []
    for row in read_jsonl(a.data / "corpus.jsonl.gz"):
        texts += [row["prompt"], row["response"]]
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=a.vocab,
        special_tokens=[PAD, IM_START, IM_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tok.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tok,
        pad_token=PAD,
        eos_token=IM_END,
        model_max_length=a.max_positions,
    )
    fast.chat_template = CHATML
    save_tokenizer(fast, a.work / "tokenizer")
    print(f"tokenizer: {len(fast)} tokens")


def save_tokenizer(tok, folder):
    tok.save_pretrained(folder)
    # The family carries six copies of this file; without indentation it is half the size.
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(data, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")
    # transformers 5 writes a class name that transformers 4 does not know; both know this one.
    path = folder / "tokenizer_config.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    write_json(path, data | {"tokenizer_class": "PreTrainedTokenizerFast"})


def load_tokenizer(a):
    return AutoTokenizer.from_pretrained(a.work / "tokenizer")


# ------------------------------------------------------------------------ pretrain


def build_config(a, tok):
    return Qwen3Config(
        vocab_size=len(tok),
        hidden_size=a.hidden,
        intermediate_size=a.ffn,
        num_hidden_layers=a.layers,
        num_attention_heads=a.heads,
        num_key_value_heads=a.kv_heads,
        head_dim=a.head_dim,
        max_position_embeddings=a.max_positions,
        tie_word_embeddings=True,
        use_cache=False,
        pad_token_id=tok.convert_tokens_to_ids(PAD),
        eos_token_id=tok.convert_tokens_to_ids(IM_END),
        bos_token_id=None,
        num_labels=1,
    )


def lm_tokens(a, tok):
    """The corpus as one document list, cached: a flat id array and the documents' ends."""
    path = a.work / "lm_tokens.npz"
    if not path.exists():
        rows = read_jsonl(a.data / "corpus.jsonl.gz")
        docs = encode(tok, [render(tok, r["prompt"], r["response"]) + PAD for r in rows])
        flat = np.concatenate([np.array(d, dtype=np.uint16) for d in docs])
        np.savez(path, flat=flat, ends=np.cumsum([len(d) for d in docs]))
    data = np.load(path)
    return np.split(data["flat"], data["ends"][:-1])


def epoch_stream(docs, seed):
    order = np.random.default_rng(seed).permutation(len(docs))
    return np.concatenate([docs[i] for i in order]).astype(np.int64)


def decay_groups(model, weight_decay):
    """Weight decay for matrices only; norms and their kind stay free."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    return [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]


def amp(a):
    """bf16 arithmetic while training; the weights and the optimiser stay float32."""
    return torch.autocast("cpu", torch.bfloat16, enabled=not a.no_amp)


def compiled(a, function):
    """torch.compile, several times faster here: eager mode spends most of its time between
    the small kernels of so small a model."""
    return function if a.no_compile else torch.compile(function, dynamic=False)


def stage_pretrain(a):
    tok = load_tokenizer(a)
    docs = lm_tokens(a, tok)
    torch.manual_seed(a.seed)
    model = Qwen3ForCausalLM(build_config(a, tok)).train()
    opt = torch.optim.AdamW(decay_groups(model, 0.1), lr=a.lm_lr, betas=(0.9, 0.95))
    step, used, history = 0, 0.0, []
    saved = a.work / "pretrain.ckpt"
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        model.load_state_dict(state["model"])
        opt.load_state_dict(state["opt"])
        step, used, history = state["step"], state["seconds"], state["history"]
    params = sum(p.numel() for p in model.parameters())
    per_step = a.lm_batch * a.lm_context
    total = sum(map(len, docs))
    per_epoch = total // per_step
    print(f"pretrain: {params} parameters, {total} tokens an epoch of {per_epoch} steps", flush=True)

    def save():
        state = {"model": model.state_dict(), "opt": opt.state_dict()}
        state |= {"step": step, "seconds": used, "history": history}
        torch.save(state, saved.with_suffix(".tmp"))
        os.replace(saved.with_suffix(".tmp"), saved)

    def lm_loss(batch):
        hidden = model.model(input_ids=batch, use_cache=False).last_hidden_state
        logits = model.lm_head(hidden[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())

    lm_loss = compiled(a, lm_loss)
    epoch, stream, recent = -1, None, []
    while True:
        began = time.time()
        # The schedule ends at the step count or at the time limit, whichever comes first,
        # so that the learning rate reaches its floor on a busy machine too.
        progress = step / a.lm_steps
        if a.lm_minutes:
            progress = max(progress, used / (60 * a.lm_minutes))
        if progress >= 1:
            break
        if step // per_epoch != epoch:
            epoch = step // per_epoch
            stream = epoch_stream(docs, a.seed + 1 + epoch)
        at = (step % per_epoch) * per_step
        batch = torch.from_numpy(stream[at : at + per_step].reshape(a.lm_batch, a.lm_context))
        warm = min(1.0, (step + 1) / 100)
        lr = a.lm_lr * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
        for group in opt.param_groups:
            group["lr"] = lr
        with amp(a):
            loss = lm_loss(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        opt.zero_grad(set_to_none=True)
        step += 1
        used += time.time() - began
        recent.append(loss.item())
        if step % 50 == 0:
            mean = sum(recent) / len(recent)
            history.append([step, round(mean, 4)])
            recent = []
            print(
                f"step {step} loss {mean:.4f} lr {lr:.2e} {used:.0f}s"
                f" {step * per_step / used:.0f} tok/s",
                flush=True,
            )
        if step % 250 == 0:
            save()
    save()
    model.save_pretrained(a.work / "lm")
    info = {"steps": step, "tokens": step * per_step, "epoch_tokens": total, "seconds": round(used)}
    write_json(a.work / "pretrain.json", info | {"parameters": params, "history": history})


# --------------------------------------------------------------------------- probe


def rewards(model, seqs, pad_id):
    """Rewards of token-id lists, pooled at the last token as transformers does.

    Padding stands on the right and attention is causal, so no token sees it and no
    attention mask is needed.
    """
    ids = pad_batch(seqs, pad_id)
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    last = torch.tensor([len(s) - 1 for s in seqs])
    return model.score(hidden[torch.arange(len(seqs)), last]).squeeze(-1).float()


def by_length(seqs, tokens):
    """Index groups of like length, each at most `tokens` padded tokens."""
    order = sorted(range(len(seqs)), key=lambda i: len(seqs[i]))
    groups, group = [], []
    for i in order:
        if group and (len(group) + 1) * len(seqs[i]) > tokens:
            groups.append(group)
            group = []
        group.append(i)
    return groups + [group]


def even_groups(seqs, pad_id):
    """Batches of up to eight sequences of like length, padded to a multiple of 128 tokens.

    There is little padding this way, and few shapes to compile for.  Yields the indices,
    the padded ids and the places of the last tokens.
    """
    order = sorted(range(len(seqs)), key=lambda i: len(seqs[i]))
    for at in range(0, len(seqs), 8):
        group = order[at : at + 8]
        width = -(-len(seqs[group[-1]]) // 128) * 128
        last = torch.tensor([len(seqs[i]) - 1 for i in group])
        yield group, pad_batch([seqs[i] for i in group], pad_id, width), last


def pooled_state(model, a):
    """The compiled function from padded ids to the hidden state at the last token."""

    def state(ids, last):
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        return hidden[torch.arange(len(ids)), last]

    # Each caller brings a new model: forget the code compiled for the one before.
    torch.compiler.reset()
    return compiled(a, state)


@torch.no_grad()
def last_features(model, seqs, pad_id, a):
    state = pooled_state(model, a)
    out = torch.empty(len(seqs), model.config.hidden_size)
    for group, ids, last in even_groups(seqs, pad_id):
        with amp(a):
            out[group] = state(ids, last).float()
    return out


def fit_head(diff, l2, smooth):
    """Logistic regression without intercept on feature differences, by L-BFGS.

    `smooth` is the share of labels that the members will see swapped.  Taking it into the
    loss gives the head the scale which suits those labels, so that the members need not
    begin by shrinking it.

    The features are scaled to unit variance for the fit, so that one penalty suits all of
    them; the scale is folded back into the weights.
    """
    scale = diff.std(0).clamp_min(1e-6)
    x = (diff / scale).double()
    w = torch.zeros(x.shape[1], dtype=torch.float64, requires_grad=True)
    opt = torch.optim.LBFGS([w], max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        opt.zero_grad()
        margin = x @ w
        loss = F.softplus(-margin).mean() + smooth * margin.mean() + l2 * (w * w).sum()
        loss.backward()
        return loss

    opt.step(closure)
    return (w.detach() / scale).float()


def stage_probe(a):
    tok = load_tokenizer(a)
    lm = Qwen3ForCausalLM.from_pretrained(a.work / "lm", dtype=torch.float32)
    # Rounding before the fit: the head is then fitted on the features that init really has.
    lm.to(torch.bfloat16).to(torch.float32)
    model = Qwen3ForSequenceClassification(build_config(a, tok)).eval()
    model.model.load_state_dict(lm.model.state_dict())
    pairs = read_jsonl(a.data / "train.jsonl.gz")
    chosen, rejected = encode_pairs(tok, pairs, a.probe_len)
    began = time.time()
    features = last_features(model, chosen + rejected, tok.pad_token_id, a)
    diff = features[: len(pairs)] - features[len(pairs) :]
    head = fit_head(diff, a.probe_l2, a.swap)
    with torch.no_grad():
        model.score.weight.copy_(head[None])
    save_member(model, tok, a.out / "family" / "init")
    accuracy = (diff @ head > 0).float().mean().item()
    info = {"train_accuracy": accuracy, "seconds": round(time.time() - began)}
    write_json(a.work / "probe.json", info)
    print(f"probe: train accuracy {accuracy:.4f}")


def save_member(model, tok, folder):
    model.to(torch.bfloat16).save_pretrained(folder)
    save_tokenizer(tok, folder)


def load_member(folder):
    """A checkpoint with its stored bf16 weights widened to float32."""
    return AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()


# ------------------------------------------------------------------------- members


def swap_labels(count, share, seed):
    """Which pairs a member sees the wrong way round: exactly `share` of them."""
    swapped = np.zeros(count, dtype=bool)
    chosen = np.random.default_rng(seed).permutation(count)[: round(share * count)]
    swapped[chosen] = True
    return swapped


def fine_tune(model, chosen, rejected, pad_id, a, seed, lr):
    """Bradley-Terry fine-tuning of all weights, in place."""
    swapped = swap_labels(len(chosen), a.swap, 1000 + seed)
    better = [r if s else c for c, r, s in zip(chosen, rejected, swapped)]
    worse = [c if s else r for c, r, s in zip(chosen, rejected, swapped)]
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    opt = torch.optim.AdamW(decay_groups(model, a.rm_decay), lr=lr, betas=(0.9, 0.98))
    state = pooled_state(model, a)
    steps = int(a.rm_epochs * len(better) / a.rm_batch)
    order, step, recent = [], 0, []
    began = time.time()
    model.train()
    while step < steps:
        if len(order) < a.rm_batch:
            order += list(rng.permutation(len(better)))
        pick, order = order[: a.rm_batch], order[a.rm_batch :]
        warm = min(1.0, (step + 1) / (0.1 * steps))
        for group in opt.param_groups:
            group["lr"] = lr * warm * 0.5 * (1 + math.cos(math.pi * step / steps))
        seqs = [better[i] for i in pick] + [worse[i] for i in pick]
        # The loss is that of the whole batch, whatever groups its parts were computed in.
        parts, order_in_parts = [], []
        for group, ids, last in even_groups(seqs, pad_id):
            with amp(a):
                parts.append(model.score(state(ids, last)).squeeze(-1).float())
            order_in_parts += group
        scores = torch.cat(parts)[torch.tensor(order_in_parts).argsort()]
        loss = F.softplus(scores[len(pick) :] - scores[: len(pick)]).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        opt.zero_grad(set_to_none=True)
        step += 1
        recent.append(loss.item())
        if step % 25 == 0:
            mean = sum(recent) / len(recent)
            recent = []
            print(f"  step {step}/{steps} loss {mean:.4f} {time.time() - began:.0f}s", flush=True)
    return {"steps": steps, "seconds": round(time.time() - began)}


def stage_members(a):
    tok = load_tokenizer(a)
    chosen, rejected = encode_pairs(tok, read_jsonl(a.data / "train.jsonl.gz"), a.rm_len)
    for k, lr in enumerate(a.rm_lrs):
        if a.only is not None and k not in a.only:
            continue
        model = load_member(a.out / "family" / "init")
        seed = a.seed + 101 + k
        print(f"rm-{k}: seed {seed} lr {lr}", flush=True)
        info = fine_tune(model, chosen, rejected, tok.pad_token_id, a, seed, lr)
        save_member(model, tok, a.out / "family" / f"rm-{k}")
        write_json(a.work / f"rm-{k}.json", info | {"seed": seed, "lr": lr})


# ---------------------------------------------------------------------------- card


def average(folders):
    """WARM: the members' stored weights averaged in float64, kept as float32."""
    model = load_member(folders[0])
    states = [load_member(f).state_dict() for f in folders]
    mean = {n: torch.stack([s[n].double() for s in states]).mean(0).float() for n in states[0]}
    model.load_state_dict(mean)
    return model


@torch.no_grad()
def score_all(model, seqs, pad_id):
    out = torch.empty(len(seqs))
    for group in by_length(seqs, 4096):
        out[group] = rewards(model, [seqs[i] for i in group], pad_id)
    return out.numpy()


def members_of(a):
    return [a.out / "family" / f"rm-{k}" for k in range(len(a.rm_lrs))]


def length_balanced(pairs):
    """The subset on which "longer wins" is right exactly half of the time.

    Pairs are matched one to one across the two directions: each pair whose chosen answer
    is longer is taken with one whose chosen answer is shorter by about as many characters.
    """
    gap = np.array([len(p["chosen"]) - len(p["rejected"]) for p in pairs])
    longer = [i for i in np.argsort(np.abs(gap), kind="stable") if gap[i] > 0]
    shorter = [i for i in np.argsort(np.abs(gap), kind="stable") if gap[i] < 0]
    keep, i, j = [], 0, 0
    while i < len(longer) and j < len(shorter):
        x, y = abs(gap[longer[i]]), abs(gap[shorter[j]])
        if abs(x - y) <= 0.1 * max(x, y) + 10:
            keep += [longer[i], shorter[j]]
            i, j = i + 1, j + 1
        elif x < y:
            i += 1
        else:
            j += 1
    return np.array(sorted(keep))


def val_margins(a, tok, pairs):
    """Reward of chosen minus reward of rejected, of init, each member and their average.

    Scoring takes minutes, so each result is kept, and is used again until one of the
    checkpoints that it came from has been written anew.
    """
    init, members = a.out / "family" / "init", members_of(a)
    jobs = {"init": [init]} | {f.name: [f] for f in members} | {"warm": members}
    chosen, rejected = encode_pairs(tok, pairs, a.max_positions)
    margins = {}
    for name, folders in jobs.items():
        path = a.work / f"margins-{name}.npy"
        written = max((f / "model.safetensors").stat().st_mtime for f in folders)
        if not path.exists() or path.stat().st_mtime < written:
            scores = score_all(average(folders), chosen + rejected, tok.pad_token_id)
            np.save(path, scores[: len(pairs)] - scores[len(pairs) :])
        margins[name] = np.load(path)
        print(f"{name} {(margins[name] > 0).mean():.4f}", flush=True)
    return margins


def stage_card(a):
    tok = load_tokenizer(a)
    pairs = read_jsonl(a.data / "val.jsonl")
    margins = val_margins(a, tok, pairs)
    margins["ens"] = np.mean([margins[f.name] for f in members_of(a)], axis=0)
    margins["length"] = np.array([len(p["chosen"]) - len(p["rejected"]) for p in pairs])
    subset = length_balanced(pairs)
    card = {"n": len(pairs), "n_balanced": len(subset)}
    for name, margin in margins.items():
        right = margin > 0
        p = right.mean()
        card[name] = {
            "accuracy": round(float(p), 4),
            "standard_error": round(float(np.sqrt(p * (1 - p) / len(pairs))), 4),
            "balanced": round(float(right[subset].mean()), 4),
        }
        print(name, card[name])
    write_json(a.work / "card.json", card)


# -------------------------------------------------------------------------- golden

LONG_ANSWER = """\
A sourdough starter is a small, living culture of wild yeast and lactic acid bacteria. You \
feed it with flour and water, and in return it raises your bread and gives it flavour. Here \
is how to begin one and how to keep it alive.

**Day 1.** Stir 50 g of wholemeal rye flour into 50 g of lukewarm water in a clean jar. Rye \
works well because it carries many wild yeasts and plenty of minerals. Cover the jar loosely, \
so that gas can leave, and let it stand at 22 to 26 °C.

**Days 2 and 3.** You may see many bubbles on the second day. This is usually not yeast yet \
but other bacteria, which die off once the mixture turns sour. Do not be discouraged when the \
bubbles stop. Once a day, throw away all but 50 g, then add 50 g of flour and 50 g of water.

**Days 4 to 7.** Feed the culture every twelve hours now. It should begin to rise and fall in \
a regular rhythm, and the smell should change from unpleasant to fresh and fruity, a little \
like yoghurt or green apples. A rubber band around the jar at the level just after feeding \
makes the rise easy to read.

**When is it ready?** A mature starter doubles within four to six hours of being fed. You can \
also drop a spoonful into a glass of water: if it floats, it holds enough gas to lift a loaf.

Some questions that beginners often ask:

1. *Why must I discard some of it?* Without discarding, the amount would double with every \
feeding, and the yeast would run short of food while the acid kept building up.
2. *There is a dark liquid on top. Is it spoiled?* No. The liquid is mostly water and alcohol, \
and it shows that the culture is hungry. Stir it in or pour it off, then feed.
3. *Can I keep it in the refrigerator?* Yes. At 4 °C one feeding a week is enough. Take it out \
a day before baking and feed it twice at room temperature.
4. *What does spoilage look like?* Pink or orange streaks, or fuzzy mould, mean that you should \
throw everything away and start again with a clean jar.

For a first loaf, mix 100 g of active starter with 350 g of water, 500 g of strong white flour \
and 10 g of salt. Fold the dough four times over two hours, let it rise until it has grown by \
about half, shape it, and rest it overnight in the refrigerator. Bake it in a covered pot at \
240 °C for 25 minutes, then uncovered at 220 °C for another 20. Let it cool before you cut it, \
hard as that is: the crumb goes on setting for an hour."""

CODE_ANSWER = """\
You can do it in one pass with a dictionary:

```python
def two_sum(numbers: list[int], target: int) -> tuple[int, int] | None:
    seen: dict[int, int] = {}
    for i, x in enumerate(numbers):
        if (j := seen.get(target - x)) is not None:
            return j, i
        seen[x] = i
    return None
```

Each element is looked up once, so the running time is O(n) instead of O(n²)."""


def golden_conversations():
    """Conversations for checking another implementation; none of them is in the data."""

    def turns(*contents, system=None):
        head = [] if system is None else [{"role": "system", "content": system}]
        roles = ("user", "assistant")
        return head + [{"role": roles[i % 2], "content": c} for i, c in enumerate(contents)]

    return [
        turns("What is the capital of Mongolia?", "The capital of Mongolia is Ulaanbaatar."),
        turns("What is the capital of Mongolia?", "no idea, google it"),
        turns("Say nothing.", ""),
        turns("How do I make a sourdough starter?", LONG_ANSWER),
        turns("Find two numbers in a list which add up to a target.", CODE_ANSWER),
        turns(
            "Wie sagt man „Guten Morgen“ auf Japanisch, Arabisch und Hindi?",
            "おはようございます (ohayō gozaimasu), صباح الخير und सुप्रभात. Schönen Tag! 🌞👩🏽‍🚀",
        ),
        turns(
            "I have 3 apples.",
            "Nice! What would you like to do with them?",
            "I eat one. How many are left?",
            "Two: 3 − 1 = 2.",
        ),
        turns(
            "Who are you?",
            "Arr, I be a humble bilge-bot, sailin' the seven seas o' data!",
            system="You are a pirate. Answer in one sentence.",
        ),
        turns(
            "List the first ten primes",
            "| n | prime |\n|---|---|\n"
            + "\n".join(
                f"| {n} | {p} |" for n, p in enumerate((2, 3, 5, 7, 11, 13, 17, 19, 23, 29), 1)
            ),
        ),
        turns("  Leading and trailing spaces?  \n", "\n\n\tKept as they are.   \r\n "),
        turns("Can I mix bleach with vinegar?", "I'm sorry, but I can't help with that."),
        turns(
            "Explain entropy to a child, then to a physicist.",
            "For a child: a tidy room becomes untidy by itself, never the other way round, because "
            "there are many more untidy rooms than tidy ones.\n\nFor a physicist: S = k ln Ω, the "
            "logarithm of the number of microstates compatible with the macrostate.",
            "Shorter.",
            "Entropy counts the ways in which a thing can be arranged.",
            "Thanks!",
            "You're welcome! 😊",
            system="You are a patient teacher.",
        ),
    ]


@torch.no_grad()
def stage_golden(a):
    tok = load_tokenizer(a)
    models_ = {f.name: load_member(f) for f in members_of(a)}
    models_["init"] = load_member(a.out / "family" / "init")
    models_["warm"] = average(members_of(a))
    rows = []
    for messages in golden_conversations():
        text = tok.apply_chat_template(messages, tokenize=False)
        ids = tok(text, add_special_tokens=False)["input_ids"]
        batch = torch.tensor([ids])
        scores = {n: m(input_ids=batch).logits.item() for n, m in models_.items()}
        rows.append({"messages": messages, "input_ids": ids, "scores": scores})
    lines = ",\n".join(json.dumps(r, ensure_ascii=False) for r in rows)
    (a.out / "golden.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    print("golden:", [len(r["input_ids"]) for r in rows])


# ---------------------------------------------------------------------------- main


def write_json(path, data):
    path.write_text(json.dumps(data, indent=1) + "\n")


STAGES = {
    "tokenizer": stage_tokenizer,
    "pretrain": stage_pretrain,
    "probe": stage_probe,
    "members": stage_members,
    "card": stage_card,
    "golden": stage_golden,
}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--data", type=Path, required=True)
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--work", type=Path, default=Path("work"), help="intermediate results")
    p.add_argument("--stage", choices=[*STAGES, "all"], default="all")
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--no-amp", action="store_true", help="float32 arithmetic while training")
    p.add_argument("--no-compile", action="store_true", help="do without torch.compile")
    p.add_argument("--vocab", type=int, default=4096)
    p.add_argument("--hidden", type=int, default=112)
    p.add_argument("--ffn", type=int, default=304)
    p.add_argument("--layers", type=int, default=3)
    p.add_argument("--heads", type=int, default=4)
    p.add_argument("--kv-heads", type=int, default=2)
    p.add_argument("--head-dim", type=int, default=32)
    p.add_argument("--max-positions", type=int, default=2048)
    p.add_argument("--lm-steps", type=int, default=10000)
    p.add_argument("--lm-minutes", type=float, default=0, help="time limit; 0 for none")
    p.add_argument("--lm-batch", type=int, default=4)
    p.add_argument("--lm-context", type=int, default=1024)
    p.add_argument("--lm-lr", type=float, default=3e-3)
    p.add_argument("--probe-len", type=int, default=640)
    p.add_argument("--probe-l2", type=float, default=3e-3)
    p.add_argument("--rm-len", type=int, default=512)
    p.add_argument("--rm-batch", type=int, default=32)
    p.add_argument("--rm-epochs", type=float, default=0.6)
    p.add_argument("--rm-decay", type=float, default=0.01)
    p.add_argument("--rm-lrs", type=float, nargs="+", default=[1e-4, 1.5e-4, 2e-4, 2.5e-4, 3e-4])
    p.add_argument("--swap", type=float, default=0.25, help="share of labels each member sees swapped")
    p.add_argument("--only", type=int, nargs="*", help="train these members only")
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    a.work.mkdir(parents=True, exist_ok=True)
    for name in STAGES if a.stage == "all" else [a.stage]:
        STAGES[name](a)


if __name__ == "__main__":
    main()
