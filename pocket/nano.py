"""The embedded policy: a Qwen3-type text-to-SQL model of under a million parameters, trained from scratch in minutes.

`train_nano` is the whole recipe: a tokenizer made for copying identifiers, synthetic and hand-written schemas, a
curriculum of three levels and a last phase of disturbed wording, Muon for the matrices and AdamW for the rest, a cosine
schedule over the time given. The shipped checkpoint (`pocket.NANO_PATH`) was made by it; its folder holds
the recipe, the training log and the measurements. It has learned one phrasing family and is meant to be improved by
reinforcement learning.

The clock counts processor time, so a busy machine gives the same model later, not a worse one sooner; with a GPU it
counts wall-clock time. Examples and their order depend on the seed alone; how far training gets depends on the machine.
"""

from __future__ import annotations

import json
import math
import random
import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pocket.pretraining import Example, Examples
from sqlbench.errors import ModelError

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n ' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CONTEXT = 1024


@dataclass(frozen=True)
class Recipe:
    """All settings of the training."""

    vocabulary: int = 1024
    width: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    hidden: int = 384
    made_up: float = 0.7
    """Share of synthetic schemas; the rest are the hand-written ones."""
    rewrite: float = 0.15
    check: float = 0.08
    easy: float = 0.2
    """Share of the time on the easiest level (few tables, six constructs)."""
    medium: float = 0.2
    """Share of the time on the second level."""
    late: float = 0.7
    """Share of the time after which questions are disturbed more (operation words replaced); names come first."""
    muon_lr: float = 0.02
    adam_lr: float = 3e-3
    weight_decay: float = 0.05
    batch_tokens: int = 2048
    warmup: float = 0.04
    floor: float = 0.03
    """Learning rate at the end, as a share of the peak."""


# ---- tokenizer ------------------------------------------------------------------------------------------------------


def build_tokenizer(texts: list[str], vocabulary: int) -> Any:
    """Train a byte-level BPE in which a word has the same ids in a question, an identifier and a literal.

    Every word carries a leading space, so one is put after ``_``, ``(``, ``.``, an opening quote and ``%`` before a
    letter, and removed in decoding. A plural "s" and digits stand alone.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    put = normalizers.Replace
    core.normalizer = normalizers.Sequence(
        [
            put("_", "_ "),
            put("(", "( "),
            put(Regex(r"\.(?=[A-Za-z])"), ". "),
            put(Regex(r"(?<= )'(?=\S)"), "' "),
            put(Regex(r"%(?=[A-Za-z])"), "% "),
        ]
    )
    pattern = (
        r"<\|[a-z_]+\|>| ?T[123](?=\.|\s)| ?[A-Za-z]{2,}?(?=s(?![A-Za-z]))|s(?![A-Za-z])| ?[A-Za-z]+|\d|\n"
        r"| ?[^\sA-Za-z\d]|\s"
    )
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    undo = decoders.Replace
    core.decoder = decoders.Sequence(
        [
            decoders.ByteLevel(),
            decoders.Fuse(),
            undo("_ ", "_"),
            undo("( ", "("),
            # Also at the end: servers decode token by token, and what they have sent cannot be taken back.
            undo(Regex(r"\. (?=[A-Za-z]|$)"), "."),
            undo(Regex(r"(?<=[ (])' (?=\S|$)"), "'"),
            undo(Regex(r"% (?=[A-Za-z]|$)"), "%"),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, START, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[START],
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def word_pieces(tokenizer: Any) -> tuple[list[str], list[str]]:
    """Return the lower-case pieces that begin and that continue a word, for pseudo-words."""
    pieces = sorted(tokenizer.get_vocab())
    starts = [p[1:] for p in pieces if re.fullmatch("\u0120[a-z]{1,4}", p)]
    return starts, [p for p in pieces if re.fullmatch("[a-z]{1,4}", p)]


def prompt_text(example: Example) -> str:
    """Write the prompt of an example as the chat template does, generation prompt included."""
    body = "".join(f"{START}{m.role}\n {m.content}{END}\n" for m in example.messages)
    return f"{body}{START}assistant\n"


# ---- model ----------------------------------------------------------------------------------------------------------


def build_model(recipe: Recipe, tokenizer: Any) -> Any:
    """Build a freshly initialised model whose vocabulary is exactly the tokenizer's."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=recipe.width,
        intermediate_size=recipe.hidden,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        head_dim=recipe.width // recipe.heads,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.02,
        dtype="float32",
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    return Qwen3ForCausalLM(config)


def save_checkpoint(model: Any, tokenizer: Any, out: Path, note: dict[str, Any]) -> None:
    """Write a checkpoint folder in Hugging Face form, with a description in ``sqlbench.json``."""
    out.mkdir(parents=True, exist_ok=True)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.do_sample = True
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)
    path = out / "tokenizer_config.json"  # the class name that every version of transformers knows and keeps
    settings = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(settings, indent=1) + "\n")
    (out / "sqlbench.json").write_text(json.dumps({"family": "nano", **note}, indent=1, sort_keys=True) + "\n")


# ---- training -------------------------------------------------------------------------------------------------------


def _batches(examples: Examples, tokenizer: Any, level: int, tokens: int, rng: random.Random) -> list[list]:
    """Draw several hundred examples as batches of similar length."""
    drawn = [examples.draw(level) for _ in range(512)]
    prompts = tokenizer([prompt_text(e) for e in drawn], add_special_tokens=False)["input_ids"]
    answers = tokenizer([e.answer + END for e in drawn], add_special_tokens=False)["input_ids"]
    pairs = sorted(
        ((p, a) for p, a in zip(prompts, answers, strict=True) if len(p) + len(a) < CONTEXT),
        key=lambda pair: len(pair[0]) + len(pair[1]) + rng.random() * 4,
    )
    batches: list[list] = [[]]
    for pair in pairs:
        if batches[-1] and (len(pair[0]) + len(pair[1])) * (len(batches[-1]) + 1) > tokens:
            batches.append([])
        batches[-1].append(pair)
    rng.shuffle(batches)
    return batches


def _orthogonal(matrices: Any) -> Any:
    """Approximate the nearest semi-orthogonal matrices of a batch (five quintic Newton-Schulz steps, float32)."""
    wide = matrices if matrices.shape[-2] <= matrices.shape[-1] else matrices.mT
    x = wide / (wide.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    return x if wide is matrices else x.mT


class Muon:
    """Momentum orthogonalised matrix by matrix; matrices of one shape go together.

    `torch.optim.Muon` does the same in bfloat16, which took more than half of the training time on processors that
    emulate it.
    """

    def __init__(self, matrices: list[Any], lr: float, weight_decay: float, momentum: float = 0.95) -> None:
        import torch

        shapes = sorted({tuple(p.shape) for p in matrices})
        self.groups = [[p for p in matrices if tuple(p.shape) == shape] for shape in shapes]
        self.buffers = [torch.zeros(len(g), *g[0].shape, device=g[0].device) for g in self.groups]
        self.lr, self.weight_decay, self.momentum = lr, weight_decay, momentum

    def step(self) -> None:
        """Make one update and clear the gradients."""
        import torch

        with torch.no_grad():
            for group, buffer in zip(self.groups, self.buffers, strict=True):
                gradient = torch.stack([p.grad for p in group])
                buffer.lerp_(gradient, 1 - self.momentum)
                update = _orthogonal(gradient.lerp(buffer, self.momentum))
                scale = max(1.0, update.shape[-2] / update.shape[-1]) ** 0.5
                for p, u in zip(group, update, strict=True):
                    p.mul_(1 - self.lr * self.weight_decay).sub_(u, alpha=self.lr * scale)
                    p.grad = None


def answer_loss(model: Any, batch: list) -> Any:
    """Compute the mean cross-entropy of the answers' tokens."""
    import torch

    length = max(len(p) + len(a) for p, a in batch) - 1
    inputs = torch.zeros(len(batch), length, dtype=torch.long)
    targets = torch.full((len(batch), length), -100)
    for i, (prompt, answer) in enumerate(batch):
        row = torch.tensor(prompt + answer)
        inputs[i, : len(row) - 1] = row[:-1]
        targets[i, len(prompt) - 1 : len(row) - 1] = row[len(prompt) :]
    inputs, targets = inputs.to(model.device), targets.to(model.device)
    hidden = model.model(inputs, use_cache=False).last_hidden_state  # causal; padding is at the right end
    chosen = targets >= 0
    return torch.nn.functional.cross_entropy(model.lm_head(hidden[chosen]), targets[chosen])


def train_nano(
    out: Path,
    minutes: float = 10.0,
    seed: int = 0,
    threads: int = 2,
    recipe: Recipe | None = None,
    progress: bool = True,
    device: str = "cpu",
) -> dict[str, Any]:
    """Train a policy from scratch and write it to a folder; return the measurements.

    Args:
        out: checkpoint folder, which must not hold one already.
        minutes: time budget as if `threads` processors were free; processor time counts, on a GPU wall-clock time.
        seed: seed of examples, initial weights and tokenizer.
        threads: number of torch threads while training.
        device: ``cpu`` or ``cuda``.

    Raises:
        ModelError: the folder already holds a checkpoint, or the device does not exist.
    """
    import torch

    if (out / "config.json").exists():
        raise ModelError(f"Checkpoint already exists: {out}. Choose another folder, or delete it.")
    if device != "cpu" and not (device == "cuda" and torch.cuda.is_available()):
        raise ModelError(
            f"Cannot train on this device: {device}. Choose 'cpu', or 'cuda' on a machine with a CUDA GPU."
        )
    recipe = recipe or Recipe()
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return _train(out, minutes * 60, seed, recipe, threads, progress, device)
    finally:
        torch.set_num_threads(threads_before)


def _train(
    out: Path, budget: float, seed: int, recipe: Recipe, threads: int, progress: bool, device: str
) -> dict[str, Any]:
    import torch

    torch.manual_seed(seed)
    clock = time.process_time if device == "cpu" else time.perf_counter
    budget *= threads if device == "cpu" else 1
    started, cpu_started, begun = time.perf_counter(), time.process_time(), clock()
    source = Examples(seed + 1, made_up=0.5)
    texts = [prompt_text(e) + e.answer for e in (source.draw(2) for _ in range(6000))]
    tokenizer = build_tokenizer(texts, recipe.vocabulary)
    examples = Examples(
        seed, *word_pieces(tokenizer), made_up=recipe.made_up, rewrite=recipe.rewrite, check=recipe.check
    )
    model = build_model(recipe, tokenizer).to(device)
    model.train()
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    muon = Muon(matrices, recipe.muon_lr, recipe.weight_decay)
    adam = torch.optim.AdamW(others, lr=recipe.adam_lr, betas=(0.9, 0.98), weight_decay=0.0)
    rng = random.Random(seed)
    out.mkdir(parents=True, exist_ok=True)
    log = (out / "training_log.jsonl").open("w")
    step, seen, tokens, smooth, first = 0, 0, 0, None, None
    pool: list[list] = []
    while (used := clock() - begun) < budget:
        done = used / budget
        level = 0 if done < recipe.easy else 1 if done < recipe.easy + recipe.medium else 2
        level = 3 if done >= recipe.late else level
        pool = pool or _batches(examples, tokenizer, level, recipe.batch_tokens, rng)
        batch = pool.pop()
        cosine = recipe.floor + (1 - recipe.floor) * 0.5 * (1 + math.cos(math.pi * done))
        rate = cosine * min(1.0, done / recipe.warmup)
        muon.lr, adam.param_groups[0]["lr"] = recipe.muon_lr * rate, recipe.adam_lr * rate
        loss = answer_loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        muon.step()
        adam.step()
        adam.zero_grad()
        step, seen = step + 1, seen + len(batch)
        tokens += sum(len(p) + len(a) for p, a in batch)
        smooth = loss.item() if smooth is None else 0.97 * smooth + 0.03 * loss.item()
        first = first or smooth
        if step % 100 == 0:
            cpu_used = time.process_time() - cpu_started
            row = {
                "step": step, "level": level, "loss": round(smooth, 4), "examples": seen, "tokens": tokens,
                "cpu_seconds": round(cpu_used, 1), "seconds": round(time.perf_counter() - started, 1),
                "tokens_per_cpu_second": round(tokens / cpu_used),
            }  # fmt: skip
            log.write(json.dumps(row) + "\n")
            log.flush()
            if progress:
                print(
                    f"nano: {done:4.0%}  level {level}  step {step}  loss {smooth:.3f}  {tokens / used:.0f} tokens/s",
                    flush=True,
                )
    log.close()
    measured = {
        "steps": step, "examples": seen, "tokens": tokens, "first_loss": first, "last_loss": smooth,
        "parameters": sum(p.numel() for p in model.parameters()),
        "cpu_seconds": round(time.process_time() - cpu_started, 1), "seconds": round(time.perf_counter() - started, 1),
    }  # fmt: skip
    note = {"seed": seed, "threads": threads, "recipe": asdict(recipe), "measured": measured}
    save_checkpoint(model, tokenizer, out, note)
    return measured
