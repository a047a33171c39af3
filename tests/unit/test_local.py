"""The local engine against a plain forward pass of the same model, on a small random checkpoint."""

from __future__ import annotations

import asyncio
import json
import random
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from pocket import NANO_PATH
from sqlbench.agent.trajectory import Completion, Message
from sqlbench.cli import main
from sqlbench.data.tasks import DataSet
from sqlbench.errors import ModelError, PromptTooLongError
from sqlbench.evaluation import evaluate
from sqlbench.models.local import LocalChatModel, TextPieces, encode_chat
from sqlbench.runs import read_trajectories
from verl_cpu import engine as engine_module
from verl_cpu.batching import BatchedEngine
from verl_cpu.engine import EngineError, Generation, GenerationRequest, LocalEngine, shared_prefixes
from verl_cpu.frozen import PromptCache, half_precision

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n {{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random llama with grouped key-value heads and a word tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("checkpoint")
    words = ["<pad>", "<|im_start|>", "<|im_end|>", "<unk>", "user", "assistant", *(f"w{i}" for i in range(58))]
    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=TEMPLATE,
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "sqlbench.json").write_text(json.dumps({"family": "nano"}))
    return folder


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> LocalEngine:
    return LocalEngine(checkpoint, max_model_len=128)


def prompts() -> list[tuple[int, ...]]:
    """Prompts of many lengths, some equal, some that share a long start, one that begins another."""
    draw = random.Random(0)
    starts = [tuple(draw.randrange(3, 64) for _ in range(draw.randint(20, 60))) for _ in range(4)]
    longer = [s + tuple(draw.randrange(3, 64) for _ in range(draw.randint(1, 9))) for s in starts for _ in range(3)]
    return [*longer, *longer[:3], starts[0], starts[0][:10], (5,), (5, 6)]


def requests(temperature: float, max_tokens: int = 20) -> list[GenerationRequest]:
    return [GenerationRequest(p, max_tokens, temperature, seed=i) for i, p in enumerate(prompts())]


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_logprobs_are_those_of_a_plain_forward_pass(engine: LocalEngine, temperature: float) -> None:
    for request, answer in zip(requests(temperature), engine.generate(requests(temperature)), strict=True):
        ids = torch.tensor([[*request.prompt_ids, *answer.token_ids]])
        with torch.inference_mode():
            logits = engine.model(ids).logits[0, len(request.prompt_ids) - 1 : -1]
        logp = (logits / (temperature or 1.0)).log_softmax(-1)
        expected = logp.gather(1, torch.tensor(answer.token_ids).unsqueeze(1)).squeeze(1)
        assert torch.allclose(expected, torch.tensor(answer.logprobs, dtype=torch.float32), atol=1e-4)
        if temperature == 0:
            assert logits.argmax(-1).tolist() == answer.token_ids


@pytest.mark.parametrize("family", ["Qwen2", "Qwen3", "Phi3"])
def test_other_families_agree_with_a_plain_forward_pass_too(checkpoint: Path, tmp_path: Path, family: str) -> None:
    """Qwen2 has biases, Qwen3 norms of queries and keys; Phi3 is not known to the decoder and takes the general way."""
    import transformers

    from verl_cpu.decoder import Decoder

    shutil.copytree(checkpoint, tmp_path / "m")
    torch.manual_seed(1)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(tmp_path / "m")
    engine = LocalEngine(tmp_path / "m", max_model_len=128)
    test_logprobs_are_those_of_a_plain_forward_pass(engine, 1.0)
    assert (Decoder.of(engine.model) is None) == (family == "Phi3")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_agrees_with_a_plain_forward_pass_as_far_as_it_goes(checkpoint: Path, dtype: str) -> None:
    engine = LocalEngine(checkpoint, dtype=dtype, max_model_len=128)
    for request, answer in zip(requests(1.0), engine.generate(requests(1.0)), strict=True):
        ids = torch.tensor([[*request.prompt_ids, *answer.token_ids]])
        with torch.inference_mode():
            logp = engine.model(ids).logits[0, len(request.prompt_ids) - 1 : -1].float().log_softmax(-1)
        expected = logp.gather(1, torch.tensor(answer.token_ids).unsqueeze(1)).squeeze(1)
        assert torch.allclose(expected, torch.tensor(answer.logprobs, dtype=torch.float32), atol=0.1)


needs_bfloat16 = pytest.mark.skipif(not half_precision(), reason="this CPU does not compute in bfloat16")


def conversation() -> list[GenerationRequest]:
    """Prompts as one database brings them: a start for each agent, and ends of many lengths, some prompts again."""
    start = tuple(range(3, 60))
    prompts = [start + tuple(range(9, 9 + n)) for n in (4, 1, 30, 4)] + [start, start[:20], (7, *start), (5,), (5, 6)]
    return [GenerationRequest(prompt, 12, seed=i) for i, prompt in enumerate(prompts)]


@pytest.mark.parametrize("limit", [2**29, 100_000])  # the second holds a few prompts only
def test_what_earlier_prompts_left_changes_no_token_and_no_log_probability(
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    limit: int,
) -> None:
    monkeypatch.setattr(engine_module, "half_precision", lambda: False)
    plain, frozen = LocalEngine(checkpoint, max_model_len=128), LocalEngine(checkpoint, max_model_len=128, frozen=True)
    frozen._kept = PromptCache(limit)
    batches = [[request] for request in conversation()] + [conversation(), requests(0.0), requests(1.0)]
    computed = []
    forward = frozen._forward
    monkeypatch.setattr(frozen, "_forward", lambda p, *a: computed.extend(map(len, p)) or forward(p, *a))
    for batch in batches:
        for ours, theirs in zip(frozen.generate(batch), plain.generate(batch), strict=True):
            assert ours.token_ids == theirs.token_ids
            assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-5)
    asked = sum(len(prompt) for batch in batches for prompt in {request.prompt_ids for request in batch})
    assert sum(computed) < asked / 2
    assert sum(t.nbytes for kept in frozen._kept._kept.values() for pair in kept for t in pair) <= limit


@needs_bfloat16
def test_packed_weights_give_the_log_probabilities_of_bfloat16_ones(checkpoint: Path) -> None:
    plain = LocalEngine(checkpoint, dtype="bfloat16", max_model_len=128)
    packed = LocalEngine(checkpoint, max_model_len=128, frozen=True)
    assert packed.checksum() == plain.checksum() != ""
    for _ in range(2):
        for request, answer in zip(requests(1.0), packed.generate(requests(1.0)), strict=True):
            ids = torch.tensor([[*request.prompt_ids, *answer.token_ids]])
            with torch.inference_mode():
                logp = plain.model(ids).logits[0, len(request.prompt_ids) - 1 : -1].float().log_softmax(-1)
            expected = logp.gather(1, torch.tensor(answer.token_ids).unsqueeze(1)).squeeze(1)
            assert torch.allclose(expected, torch.tensor(answer.logprobs, dtype=torch.float32), atol=0.1)


def test_the_embedded_policy_stays_exact_and_others_are_frozen(checkpoint: Path, tmp_path: Path) -> None:
    exact = LocalChatModel(checkpoint).batched.engine
    assert exact.model.dtype == torch.float32 and exact._kept is None
    shutil.copytree(checkpoint, tmp_path / "chat")
    (tmp_path / "chat/sqlbench.json").unlink()
    frozen = LocalChatModel(tmp_path / "chat").batched.engine
    assert frozen._kept is not None
    assert frozen.model.dtype == (torch.bfloat16 if half_precision() else torch.float32)


def test_a_seeded_request_gives_the_same_tokens_in_any_batch(engine: LocalEngine) -> None:
    batch = requests(1.0)
    together = engine.generate(batch)
    assert [engine.generate([r])[0].token_ids for r in batch] == [a.token_ids for a in together]
    assert [a.token_ids for a in engine.generate(batch[::-1])[::-1]] == [a.token_ids for a in together]


def test_generation_ends_at_the_end_token_or_at_the_limit(engine: LocalEngine) -> None:
    answers = engine.generate(requests(1.0, 30))
    assert {a.finish_reason for a in answers} == {"stop", "length"}
    for answer in answers:
        assert (answer.token_ids[-1] == 2) == (answer.finish_reason == "stop")
        assert 2 not in answer.token_ids[:-1]
        assert len(answer.token_ids) == len(answer.logprobs) <= 30


def test_sampled_frequencies_follow_the_distribution(engine: LocalEngine) -> None:
    prompt = prompts()[0]
    draws = engine.generate([GenerationRequest(prompt, 1, 1.0, seed=i) for i in range(4000)])
    with torch.inference_mode():
        expected = engine.model(torch.tensor([prompt])).logits[0, -1].softmax(-1)
    counts = torch.bincount(torch.tensor([d.token_ids[0] for d in draws]), minlength=64) / 4000
    assert (counts - expected).abs().max() < 0.03


def test_top_k_and_top_p_leave_only_the_likeliest_tokens(engine: LocalEngine) -> None:
    prompt = prompts()[0]
    with torch.inference_mode():
        order = engine.model(torch.tensor([prompt])).logits[0, -1].argsort(descending=True).tolist()
    three = engine.generate([GenerationRequest(prompt, 1, 2.0, top_k=3, seed=i) for i in range(200)])
    assert {a.token_ids[0] for a in three} == set(order[:3])
    one = engine.generate([GenerationRequest(prompt, 1, 2.0, top_p=1e-6, seed=i) for i in range(20)])
    assert {a.token_ids[0] for a in one} == {order[0]} and one[0].logprobs == [0.0]


def test_a_prompt_is_never_cut(engine: LocalEngine) -> None:
    with pytest.raises(EngineError, match="Prompt does not fit: 128 tokens, and the model takes 1 to 127"):
        engine.generate([GenerationRequest((5,) * 128, 1)])
    nearly = engine.generate([GenerationRequest((5,) * 120, 50, 1.0, seed=3)])[0]
    assert len(nearly.token_ids) <= 8


def test_a_prompt_over_the_models_limit_is_told_from_other_errors(checkpoint: Path) -> None:
    model = LocalChatModel(checkpoint, max_model_len=8)
    with pytest.raises(PromptTooLongError, match=r"does not fit: 25 tokens, .* 1 to 7. Lower table_info_truncate"):
        asyncio.run(model.complete([Message(role="user", content="w1 " * 20)]))


def test_shared_prefixes_are_common_to_their_group_and_leave_a_token() -> None:
    distinct = sorted(set(prompts()))
    shares = shared_prefixes(distinct)
    heads = {p[:n] for p, n in zip(distinct, shares, strict=True)}
    assert all(n < len(p) for p, n in zip(distinct, shares, strict=True))
    assert len(heads) <= 8 < len(distinct)
    assert shared_prefixes([]) == []


def test_load_replaces_weights_and_changes_the_checksum(checkpoint: Path) -> None:
    engine = LocalEngine(checkpoint)
    before = engine.checksum()
    name = "model.layers.0.mlp.up_proj.weight"
    engine.load([(name, engine.model.state_dict()[name] + 1)])
    assert engine.checksum() != before == LocalEngine(checkpoint).checksum()
    with pytest.raises(EngineError, match="Unknown weight"):
        engine.load([("nonsense", torch.zeros(1))])


def test_concurrent_requests_share_batches_and_a_bad_one_fails_alone(engine: LocalEngine) -> None:
    sizes: list[int] = []

    class Counting:
        def generate(self, batch: list[GenerationRequest]) -> list[Generation]:
            sizes.append(len(batch))
            return engine.generate(batch)

    async def run() -> list[Generation | BaseException]:
        batched = BatchedEngine(Counting(), wait_ms=5)  # type: ignore[arg-type]
        good = [batched.generate(r) for r in requests(0.0, 4)]
        return await asyncio.gather(*good, batched.generate(GenerationRequest((), 4)), return_exceptions=True)

    expected = [answer.token_ids for answer in engine.generate(requests(0.0, 4))]
    for _ in range(2):  # a second event loop works as well
        sizes.clear()
        *answers, bad = asyncio.run(run())
        assert sizes[0] == len(answers) + 1
        assert isinstance(bad, EngineError)
        assert [answer.token_ids for answer in answers] == expected


def test_event_loops_of_two_threads_can_ask_at_the_same_time(engine: LocalEngine) -> None:
    """As where a page answers while prompts are evolved beside it."""
    batched = BatchedEngine(engine, wait_ms=1)

    async def ask() -> list[Generation]:
        return [await batched.generate(request) for request in requests(1.0, max_tokens=3)]

    expected = asyncio.run(ask())
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(asyncio.run, asyncio.wait_for(ask(), 60)) for _ in range(2)]
        assert [future.result() for future in both] == [expected, expected]


# Chat templates in the style of the families that refuse something.
TURNS = (
    "{% for m in rest %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "<|im_start|> {{ m['role'] }} {{ m['content'] | trim }} <|im_end|> {% endfor %}"
)
GEMMA = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% set rest = messages %}" + TURNS
)
MISTRAL_1 = "{% set rest = messages %}" + TURNS
MISTRAL_3 = (
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}<|im_start|> {{ messages[0]['content'] }} "
    "{% else %}{% set rest = messages %}{% endif %}" + TURNS
)
DROPS_SYSTEM = "{% for m in messages if m['role'] != 'system' %}<|im_start|> {{ m['content'] }} {% endfor %}"
NEEDS_SYSTEM = "{% if messages[0]['role'] != 'system' %}{{ raise_exception('no') }}{% endif %}" + TEMPLATE
SYSTEM, FIRST, SECOND = ({"role": r, "content": c} for r, c in (("system", "w1"), ("user", "w2"), ("user", "w3")))


def with_template(checkpoint: Path, folder: Path, template: str | None) -> Path:
    shutil.copytree(checkpoint, folder)
    for file in folder.glob("*.jinja"):
        file.unlink()
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


@pytest.mark.parametrize(
    ("template", "prompt", "longer"),
    [
        (TEMPLATE, "<|im_start|>system w1 <|im_end|> <|im_start|>user w2", None),
        (GEMMA, "<|im_start|> user w1 w2 <|im_end|>", "<|im_start|> user w1 w2 w3 <|im_end|>"),
        (MISTRAL_1, "<|im_start|> user w1 w2 <|im_end|>", "<|im_start|> user w1 w2 w3 <|im_end|>"),
        (
            MISTRAL_3,
            "<|im_start|> w1 <|im_start|> user w2 <|im_end|>",
            "<|im_start|> w1 <|im_start|> user w2 w3 <|im_end|>",
        ),
        (DROPS_SYSTEM, "<|im_start|> w1 w2", "<|im_start|> w1 w2 w3"),
        (NEEDS_SYSTEM, "<|im_start|>system w1 <|im_end|> <|im_start|>user w2", None),
    ],
)
def test_every_template_gets_the_messages_that_it_takes(
    checkpoint: Path, tmp_path: Path, template: str, prompt: str, longer: str | None
) -> None:
    model = LocalChatModel(with_template(checkpoint, tmp_path / "m", template), max_tokens=2)
    tokenizer = model.batched.engine.tokenizer

    def text(*messages: dict[str, str]) -> str:
        answer = asyncio.run(model.complete([Message(**m) for m in messages]))
        assert answer.prompt_ids == encode_chat(tokenizer, list(messages))
        return tokenizer.decode(answer.prompt_ids).replace("  ", " ")

    plain = tokenizer.decode(tokenizer(prompt)["input_ids"]).replace("  ", " ")
    assert text(SYSTEM, FIRST).startswith(plain)
    if longer is not None:
        assert text(SYSTEM, FIRST, SECOND).startswith(tokenizer.decode(tokenizer(longer)["input_ids"]))


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (None, "it has none. Choose a chat model"),
        ("{{ raise_exception('Only\n tools') }}", "Only tools"),
        ("{% for %}", "Expected an expression"),
        ("{{ messages[0].content + 1 }}", "can only concatenate"),
        ("{{ nothing.at.all }}", "undefined"),
        ("always the same", "it leaves out the question"),
    ],
)
def test_a_template_that_cannot_be_used_is_one_line_before_any_rollout(
    checkpoint: Path, tmp_path: Path, pocket: DataSet, capsys, template: str | None, why: str
) -> None:
    folder = with_template(checkpoint, tmp_path / "m", template)
    with pytest.raises(SystemExit) as ended:
        arguments = ["--model", str(folder), "--data", str(pocket.root), "--results", str(tmp_path)]
        main(["eval", "--run", "run", "--split", "dev_unseen_pretrain", *arguments])
    err = capsys.readouterr().err
    assert ended.value.code == 1 and f"error: Cannot use the chat template of {folder}: " in err and why in err
    assert len(err.splitlines()[-1]) < 400 and not (tmp_path / "laptop").exists()


def test_an_answer_cut_at_the_limit_is_counted_and_not_failed(
    checkpoint: Path, tmp_path: Path, pocket: DataSet
) -> None:
    """A policy in this process that says nothing is wrong, not failed."""
    model = LocalChatModel(checkpoint, max_tokens=1)
    options = {"results": tmp_path, "limit": 3, "max_turns": 1, "table_info_truncate": 50}
    summary = evaluate(pocket.root, "dev_unseen_pretrain", model, "run", **options)
    assert summary.failed == 0 and summary.score.n == 3
    assert summary.flaws == {"cut at the token limit": 3} and summary.sent == {}
    assert "0 unscorable; 3 answers cut at the token limit\n" in summary.text()

    class Silent:
        name, family = "silent", "nano"

        async def complete(self, messages: list[Message], on_text: object = None) -> Completion:
            return Completion(text="", response_ids=[2], logprobs=[-1.0])

    summary = evaluate(pocket.root, "dev_unseen_pretrain", Silent(), "silent", **options)
    assert (summary.failed, summary.score.correct, summary.flaws) == (0, 0, {"empty: no text": 3})


def test_samples_of_an_interrupted_evaluation_are_those_of_one_that_was_not(
    checkpoint: Path, tmp_path: Path, pocket: DataSet
) -> None:
    model = LocalChatModel(checkpoint, max_tokens=4, temperature=1.0, seed=5)

    def tokens(run: str, samples: int) -> dict[tuple[str, int], list[int]]:
        options = {"results": tmp_path, "limit": 3, "max_turns": 2, "table_info_truncate": 50, "samples": samples}
        evaluate(pocket.root, "dev_unseen_pretrain", model, run, **options)
        records = read_trajectories(tmp_path / "laptop" / run)
        return {(t.task_id, t.sample): [i for x in t.transitions for i in x.completion.response_ids] for t in records}

    whole = tokens("whole", 3)
    assert len(whole) == 9 and len({tuple(ids) for ids in whole.values()}) == 9
    folder = tmp_path / "laptop" / "whole"
    (folder / "summary.json").unlink()
    lines = (folder / "trajectories.jsonl").read_text().splitlines(keepends=True)
    (folder / "trajectories.jsonl").write_text("".join(lines[::2]))  # other samples are missing than the last ones
    assert tokens("whole", 3) == whole
    assert tokens("one", 1) == {key: ids for key, ids in whole.items() if key[1] == 0}


def test_chat_model_records_the_tokens_it_used(checkpoint: Path) -> None:
    model = LocalChatModel(checkpoint, max_tokens=5)
    messages = [Message(role="user", content="w1 w2")]
    answer = asyncio.run(model.complete(messages))
    tokenizer = model.batched.engine.tokenizer
    assert model.family == "nano"
    assert answer.prompt_ids == encode_chat(tokenizer, [messages[0].model_dump()])
    assert tokenizer.convert_ids_to_tokens(answer.prompt_ids)[:3] == ["<|im_start|>", "user", "w1"]
    assert answer.response_ids is not None and answer.logprobs is not None
    assert answer.response_tokens == len(answer.response_ids) == len(answer.logprobs)
    assert answer.text == tokenizer.decode(answer.response_ids, skip_special_tokens=True)


def test_one_prompt_sampled_again_gives_other_answers_and_the_same_ones_in_another_process(checkpoint: Path) -> None:
    """Whatever else is asked between, and in whichever order."""
    asked = [Message(role="user", content="w1 w2 w3")]

    async def ask(*others: str) -> list[Completion]:
        model, found = LocalChatModel(checkpoint, max_tokens=12), []
        for other in (*others, ""):
            await model.complete([Message(role="user", content=f"w4 {other}")], temperature=1.0)
            found.append(await model.complete(asked, temperature=None if len(found) == 0 else 2.0))
        return found

    first, again, more = asyncio.run(ask("w5", "w6")), asyncio.run(ask("w7", "w8")), asyncio.run(ask("w5"))
    assert [a.response_ids for a in first] == [a.response_ids for a in again]
    assert [a.response_ids for a in more] == [a.response_ids for a in first[:2]]
    assert len({tuple(a.response_ids or ()) for a in first}) == 3
    assert [a.temperature for a in first] == [None, 2.0, 2.0]


def test_a_streamed_answer_is_the_plain_answer_in_pieces(checkpoint: Path) -> None:
    async def ask(on_text: Callable[[str], None] | None) -> list[Completion]:
        model = LocalChatModel(checkpoint, max_tokens=12, seed=1, temperature=1.0)
        prompts = [[Message(role="user", content=f"w{i} w{i + 1}")] for i in range(5)]
        return await asyncio.gather(*(model.complete(p, on_text if i == 2 else None) for i, p in enumerate(prompts)))

    pieces: list[str] = []
    plain, streamed = asyncio.run(ask(None)), asyncio.run(ask(pieces.append))
    assert [a.response_ids for a in streamed] == [a.response_ids for a in plain]
    assert "".join(pieces) == streamed[2].text and len(pieces) > 3


def test_a_character_of_several_tokens_is_streamed_whole() -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    bytes_only = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    raw = Tokenizer(models.BPE(vocab=bytes_only, merges=[]))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw)
    text = "a \u00e9 \u20ac \U0001f600."
    ids = tokenizer.encode(text)
    assert len(ids) > len(text)

    async def stream(ids: list[int]) -> list[str]:
        pieces: list[str] = []
        stream = TextPieces(tokenizer, pieces.append)
        for number, token_id in enumerate(ids):
            stream.add(number, token_id)
        stream.emit(tokenizer.decode(ids))
        return pieces

    assert asyncio.run(stream(ids)) == list(text)
    cut = asyncio.run(stream(ids[:-2]))  # in the middle of the last character: shown at the end as the answer has it
    assert "".join(cut) == tokenizer.decode(ids[:-2])


@pytest.mark.parametrize("missing", ["", "config.json", "model.safetensors"])
def test_an_incomplete_checkpoint_is_refused_with_what_is_missing(
    checkpoint: Path, tmp_path: Path, missing: str
) -> None:
    folder = tmp_path / "folder"
    if missing:
        folder.mkdir()
        for file in checkpoint.iterdir():
            if file.name != missing:
                (folder / file.name).write_bytes(file.read_bytes())
    with pytest.raises(
        ModelError, match=r"No checkpoint folder" if not missing else r"Not a complete .*(config|safetensors)"
    ):
        LocalChatModel(folder)


def test_a_folder_with_nothing_but_an_adapter_is_refused_with_what_to_do(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(NANO_PATH), LoraConfig(target_modules="all-linear"))
    model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"^Only a LoRA adapter: .*\. Merge it into its model with peft"):
        LocalChatModel(tmp_path)
