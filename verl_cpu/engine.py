"""A batched token-in, token-out engine for one Hugging Face checkpoint, in this process.

Guarantees: the tokens returned are the tokens sampled, with their log-probability under the distribution they were
sampled from (temperature and filters applied; at temperature 0 the plain softmax). A request with a seed gives the
same tokens in any batch, up to the rounding of floating-point sums. A prompt is never cut. Batches
are static: each distinct prompt is computed once, and so are shared prefixes; finished rows leave
the batch. A frozen engine keeps keys and values from batch to batch too (`verl_cpu.frozen`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import sdpa_mask

from verl_cpu.decoder import Decoder
from verl_cpu.frozen import PromptCache, common_start, half_precision, pack

_COMPACT_BELOW = 0.75
"""Share of unfinished rows below which finished rows are taken out of the key-value cache (a copy of the cache)."""
_PREFILL_TOKENS = 4096
"""Maximum number of prompt tokens (padding included) per forward pass; bounds the memory of long prompts."""


@dataclass(frozen=True)
class GenerationRequest:
    """One prompt to continue."""

    prompt_ids: tuple[int, ...]
    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    """Number of candidate tokens; 0 or negative means no limit."""
    seed: int | None = None
    on_token: Callable[[int, int], object] | None = None
    """Function called in the engine's thread with the number and the id of each token as it is sampled."""


@dataclass(frozen=True)
class Generation:
    """Tokens sampled for one request."""

    token_ids: list[int]
    """Sampled tokens, end-of-sequence token included."""
    logprobs: list[float]
    finish_reason: str
    """``stop`` or ``length``."""


class EngineError(ValueError):
    """A checkpoint that cannot be loaded, a prompt that does not fit, a weight that does not belong to the model."""


def shared_prefixes(prompts: list[tuple[int, ...]]) -> list[int]:
    """Return for each sorted prompt the number of first tokens to compute together with those of its neighbours.

    Neighbours form a group while they share at least half of a prompt; one token is always left to each prompt.
    """
    shares: list[int] = []
    start, shared = 0, 0
    for i, prompt in enumerate(prompts):
        common = common_start(prompts[start][:shared], prompt[:-1]) if i > start else 0
        if i > start and 2 * common >= len(prompt):
            shared = common
        else:
            start, shared = i, len(prompt) - 1
        shares[start:] = [shared] * (i + 1 - start)
    return shares


class LocalEngine:
    """A model and its tokenizer, ready to continue batches of prompts.

    Not thread-safe: one call at a time (`verl_cpu.batching.BatchedEngine` serialises calls).

    Args:
        path: the checkpoint folder.
        device: device of the model.
        dtype: precision of the weights.
        threads: number of torch threads; 0 leaves torch's own number.
        max_model_len: maximum number of tokens of a prompt and its answer.
        frozen: true if the weights never change. They are packed in bfloat16 where this CPU computes in it, and the
            keys and values of earlier prompts are kept. A frozen engine loads no new weights.

    Raises:
        EngineError: the checkpoint cannot be loaded.
    """

    def __init__(
        self,
        path: str | Path,
        device: str = "cpu",
        dtype: str = "float32",
        threads: int = 1,
        max_model_len: int = 1024,
        frozen: bool = False,
    ) -> None:
        if device == "cpu" and threads:
            torch.set_num_threads(threads)
        packed = frozen and device == "cpu" and half_precision()
        dtype = "bfloat16" if packed else dtype
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(path)
            self.model = AutoModelForCausalLM.from_pretrained(
                path, dtype=getattr(torch, dtype), attn_implementation=_ATTENTION
            ).to(device)
        except Exception as error:
            why = f"{type(error).__name__}: {error}".rstrip(".")
            raise EngineError(f"Cannot load the checkpoint {path}: {why}. Check its files.") from error
        self.model.eval()
        self._checksum = ""
        if packed:
            self._checksum = self.checksum()  # packed weights cannot be read any more
            pack(self.model)
        self._kept = PromptCache() if frozen else None
        self._decoder: Decoder | None = None
        self.device = torch.device(device)
        self.max_model_len = min(
            max_model_len, int(getattr(self.model.config, "max_position_embeddings", max_model_len))
        )
        eos = self.model.generation_config.eos_token_id
        self.stop_ids = {
            i for i in (*(eos if isinstance(eos, list) else [eos]), self.tokenizer.eos_token_id) if i is not None
        }

    def generate(self, requests: list[GenerationRequest]) -> list[Generation]:
        """Continue all prompts in one static batch; answers come in the order of the requests.

        Raises:
            EngineError: a prompt leaves no room for a single token.
        """
        if not requests:
            return []
        for request in requests:
            if not 0 < len(request.prompt_ids) < self.max_model_len:
                raise EngineError(
                    f"Prompt does not fit: {len(request.prompt_ids)} tokens, and the model takes 1 to "
                    f"{self.max_model_len - 1}."
                )
        with torch.inference_mode():
            self._decoder = self._decoder or Decoder.of(self.model)
            return self._generate(requests)

    def _generate(self, requests: list[GenerationRequest]) -> list[Generation]:
        count = len(requests)
        limit = np.array([min(r.max_tokens, self.max_model_len - len(r.prompt_ids)) for r in requests])
        uniform = np.stack([np.random.default_rng(r.seed).random(int(limit.max())) for r in requests])
        temperature = torch.tensor([r.temperature for r in requests], device=self.device)
        tokens = np.zeros((count, int(limit.max())), dtype=np.int64)
        logprobs = np.zeros(tokens.shape)
        length = np.zeros(count, dtype=np.int64)
        stopped = np.zeros(count, dtype=bool)
        heard = [i for i, r in enumerate(requests) if r.on_token]

        logits, cache, mask = self._prefill([r.prompt_ids for r in requests], int(limit.max()))
        rows = np.arange(count)  # row of the batch -> request
        width = mask.shape[1] - int(limit.max())
        position = mask[:, :width].sum(1, keepdim=True)
        step = 0
        while True:
            draw = torch.as_tensor(uniform[rows, step], device=self.device)
            chosen, logp = _sample(logits, temperature, draw, [requests[i] for i in rows])
            ids = chosen.cpu().numpy()
            active = ~stopped[rows] & (length[rows] < limit[rows])
            live = rows[active]
            tokens[live, step], logprobs[live, step] = ids[active], logp.cpu().numpy()[active]
            length[live] += 1
            stopped[live] = np.isin(ids[active], list(self.stop_ids))
            for i in heard:
                if length[i] == step + 1 and (on_token := requests[i].on_token):
                    on_token(step, int(tokens[i, step]))
            step += 1
            active &= ~stopped[rows] & (length[rows] < limit[rows])
            if not active.any():
                break
            if active.mean() < _COMPACT_BELOW:
                keep = torch.as_tensor(np.flatnonzero(active), device=self.device)
                cache.batch_select_indices(keep)
                chosen, mask, position, temperature = chosen[keep], mask[keep], position[keep], temperature[keep]
                rows = rows[active]
            mask[:, width + step - 1] = 1
            visible = mask[:, : width + step]
            if self._decoder is not None:
                logits = self._decoder.step(chosen, position, visible, cache.layers)
            else:
                out = self.model(chosen.unsqueeze(1), visible, position, cache, logits_to_keep=1)
                logits = out.logits[:, -1].float()
            position = position + 1
        return [
            Generation(
                tokens[i, : length[i]].tolist(), logprobs[i, : length[i]].tolist(), "stop" if stopped[i] else "length"
            )
            for i in range(count)
        ]

    def _prefill(self, prompts: list[tuple[int, ...]], room: int) -> tuple[Any, Any, Any]:
        """Compute next-token logits, key-value cache and attention mask of the prompts, with `room` free mask columns.

        Each distinct prompt is computed once, and so is the prefix that neighbours in alphabetical order share.
        """
        distinct = sorted(set(prompts))
        shares = shared_prefixes(distinct)
        if self._kept is not None:
            logits, layers, mask = self._continue(distinct, self._kept)
        elif min(shares) == 0:
            logits, layers, mask = self._forward(distinct)
        else:
            heads = list(dict.fromkeys(p[:n] for p, n in zip(distinct, shares, strict=True)))
            head = torch.tensor([heads.index(p[:n]) for p, n in zip(distinct, shares, strict=True)], device=self.device)
            _, layers, mask = self._forward(heads)
            tails = [p[n:] for p, n in zip(distinct, shares, strict=True)]
            logits, layers, mask = self._forward(tails, layers, mask, head)
        index = {prompt: i for i, prompt in enumerate(distinct)}
        row = torch.tensor([index[p] for p in prompts], device=self.device)
        cache = DynamicCache(config=self.model.config)
        for number, (keys, values) in enumerate(layers):
            cache.layers[number] = _RoomyLayer(keys[row], values[row], room)
        return logits[row], cache, torch.cat([mask, mask.new_zeros(len(distinct), room)], 1)[row]

    def _continue(self, prompts: list[tuple[int, ...]], kept: PromptCache) -> tuple[Any, Any, Any]:
        """Compute each prompt, without the start that an earlier one had, one after the other, and pad the results."""
        logits, caches = [], []
        for prompt in prompts:
            shared, past = kept.find(prompt)
            row = torch.zeros(1, dtype=torch.long, device=self.device)
            before = torch.ones(1, shared, dtype=torch.long, device=self.device)
            out, layers, _ = self._forward([prompt[shared:]], past, before, row)
            kept.add(prompt, layers)
            logits.append(out)
            caches.append(layers)
        _, mask = self._padded(prompts)
        width, layers = mask.shape[1], []
        for same in zip(*caches, strict=True):
            padded = [[pad(t, (0, 0, width - t.shape[2], 0)) for t in pair] for pair in same]
            layers.append(tuple(torch.cat(tensors) for tensors in zip(*padded, strict=True)))
        return torch.cat(logits), layers, mask

    def _forward(
        self, pieces: list[tuple[int, ...]], layers: Any = None, past_mask: Any = None, past_row: Any = None
    ) -> tuple[Any, Any, Any]:
        """Run left-padded pieces of text, each after row `past_row` of the cache."""
        ids, mask = self._padded(pieces)
        width, position = ids.shape[1], mask.cumsum(1) - 1
        if layers is not None:
            position = position + past_mask[past_row].sum(1, keepdim=True)
            mask = torch.cat([past_mask[past_row], mask], 1)
        parts = []
        for rows in torch.arange(len(pieces), device=self.device).split(max(1, _PREFILL_TOKENS // width)):
            cache = DynamicCache(config=self.model.config)
            for number, (keys, values) in enumerate(layers or ()):
                cache.layers[number] = _RoomyLayer(keys[past_row[rows]], values[past_row[rows]], width)
            out = self.model(
                input_ids=ids[rows],
                attention_mask=mask[rows],
                position_ids=position[rows].clamp(min=0),
                past_key_values=cache,
                logits_to_keep=1,
            )
            parts.append((out.logits[:, -1].float(), [(layer.keys, layer.values) for layer in cache.layers]))
        logits = torch.cat([part[0] for part in parts])
        joined = [
            tuple(torch.cat([layer[i] for layer in same]) for i in (0, 1))
            for same in zip(*(part[1] for part in parts), strict=True)
        ]
        return logits, joined, mask

    def _padded(self, pieces: list[tuple[int, ...]]) -> tuple[Any, Any]:
        """Return the tokens, padded on the left to one length, and a mask of the real ones."""
        parts = [torch.tensor([piece, [1] * len(piece)]).T for piece in pieces]
        both = pad_sequence(parts, batch_first=True, padding_side="left").to(self.device)
        return both[..., 0], both[..., 1]

    def load(self, named: Iterable[tuple[str, Any]]) -> None:
        """Overwrite weights by name.

        Raises:
            EngineError: a name or shape that this model does not have.
        """
        state = self.model.state_dict()
        with torch.no_grad():
            for name, tensor in named:
                if name not in state or state[name].shape != tensor.shape:
                    raise EngineError(
                        f"Unknown weight: {name} of shape {tuple(tensor.shape)}. Load those of this model."
                    )
                state[name].copy_(tensor)
        self._decoder = None

    def checksum(self) -> str:
        """Hash all weights; equal checksums mean equal models."""
        if self._checksum:
            return self._checksum
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(name.encode() + tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]


def _sample(logits: Any, temperature: Any, draw: Any, requests: list[GenerationRequest]) -> tuple[Any, Any]:
    """Sample a token and its log-probability for every row, by inversion of the cumulative distribution."""
    greedy = temperature <= 0
    scaled = logits / torch.where(greedy, 1.0, temperature).unsqueeze(1)
    if any(r.top_k > 0 or r.top_p < 1 for r in requests):
        scaled = _filter(scaled, requests)
    logp = torch.log_softmax(scaled, -1)
    cumulative = logp.double().exp().cumsum(-1)
    target = (draw * cumulative[:, -1]).unsqueeze(1)
    chosen = torch.searchsorted(cumulative, target, right=True).squeeze(1).clamp(max=logits.shape[1] - 1)
    chosen = torch.where(greedy, logits.argmax(-1), chosen)
    return chosen, logp.gather(1, chosen.unsqueeze(1)).squeeze(1)


def _filter(logits: Any, requests: list[GenerationRequest]) -> Any:
    """Set the logits outside top-k and top-p to minus infinity, row by row."""
    size = logits.shape[1]
    top_k = torch.tensor([r.top_k if 0 < r.top_k < size else size for r in requests], device=logits.device)
    top_p = torch.tensor([r.top_p for r in requests], device=logits.device)
    ordered, order = logits.sort(dim=1, descending=True)
    before = ordered.softmax(1).cumsum(1) - ordered.softmax(1)
    rank = torch.arange(size, device=logits.device)
    drop = (rank >= top_k.unsqueeze(1)) | ((before >= top_p.unsqueeze(1)) & (rank > 0))
    return logits.masked_fill(torch.zeros_like(drop).scatter(1, order, drop), -torch.inf)


_ATTENTION = "verl_cpu_gqa"


def _attend(
    module: Any, query: Any, key: Any, value: Any, attention_mask: Any, scaling: Any = None, **_: Any
) -> tuple[Any, None]:
    """Attend with key-value heads shared in place.

    The stock ``sdpa`` copies them for every query head if a mask is given: three times slower on a CPU.
    """
    if query.shape[2] == 1 and query.dtype != torch.float32:
        # The heads of one group read the same keys, so they become rows of one query: ten times faster.
        grouped = query.view(query.shape[0], key.shape[1], -1, query.shape[3])
        if attention_mask is not None:
            attention_mask = attention_mask.expand(-1, -1, grouped.shape[2], -1)
        out = torch.nn.functional.scaled_dot_product_attention(
            grouped, key, value, attn_mask=attention_mask, scale=scaling
        )
        return out.reshape(query.shape).transpose(1, 2).contiguous(), None
    causal = query.shape[2] > 1 and attention_mask is None
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, scale=scaling, is_causal=causal, enable_gqa=True
    )
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(_ATTENTION, _attend)
AttentionMaskInterface.register(_ATTENTION, sdpa_mask)


class _RoomyLayer(DynamicLayer):
    """A key-value cache layer that holds `keys` and `values` and appends in place for `room` more tokens."""

    def __init__(self, keys: Any, values: Any, room: int) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.used = keys.shape[2]
        self.buffers = [torch.cat([t, t.new_zeros(*t.shape[:2], room, t.shape[3])], 2) for t in (keys, values)]
        self.keys, self.values = keys, values

    def update(self, key_states: Any, value_states: Any, *_: Any, **__: Any) -> tuple[Any, Any]:
        start, self.used = self.used, self.used + key_states.shape[2]
        self.buffers[0][:, :, start : self.used] = key_states
        self.buffers[1][:, :, start : self.used] = value_states
        self.keys, self.values = (b[:, :, : self.used] for b in self.buffers)
        return self.keys, self.values

    def batch_select_indices(self, indices: Any) -> None:
        self.buffers = [b[indices] for b in self.buffers]
        self.keys, self.values = (b[:, :, : self.used] for b in self.buffers)
