"""The embedded policy: its tokenizer, its shipped checkpoint, and that its recipe learns."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from pocket import NANO_PATH
from pocket.domains import fill, read_domains
from pocket.nano import END, Recipe, prompt_text, train_nano
from pocket.pretraining import Example, Examples, connect, schema_of
from sqlbench.agent.prompts import CORRECT, INCORRECT, prompts_for
from sqlbench.database.engine import open_database
from sqlbench.database.schema import introspect, schema_text
from sqlbench.errors import ModelError
from sqlbench.models.local import encode_chat
from verl_cpu.engine import GenerationRequest, LocalEngine


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    source = Examples(11)
    return [source.draw(2) for _ in range(300)]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(NANO_PATH)


def test_every_way_of_loading_the_tokenizer_gives_the_same_ids(examples: list[Example]) -> None:
    raw = Tokenizer.from_file(str(NANO_PATH / "tokenizer.json"))
    auto, fast = (c.from_pretrained(NANO_PATH) for c in (AutoTokenizer, PreTrainedTokenizerFast))
    for e in examples:
        text = prompt_text(e) + e.answer + END
        ids = raw.encode(text, add_special_tokens=False).ids
        assert auto(text)["input_ids"] == ids
        assert fast(text)["input_ids"] == ids


def test_verl_loads_the_same_tokenizer(examples: list[Example], tokenizer: PreTrainedTokenizerFast) -> None:
    hf_tokenizer = pytest.importorskip("verl.utils", reason="the training extra is not installed").hf_tokenizer
    verl_tokenizer = hf_tokenizer(str(NANO_PATH))
    for e in examples:
        assert verl_tokenizer(prompt_text(e))["input_ids"] == tokenizer(prompt_text(e))["input_ids"]
    assert verl_tokenizer.eos_token_id == tokenizer.eos_token_id
    assert verl_tokenizer.pad_token_id == tokenizer.pad_token_id


def test_the_chat_template_gives_the_prompts_of_pretraining(
    examples: list[Example], tokenizer: PreTrainedTokenizerFast
) -> None:
    for e in examples:
        messages = [m.model_dump() for m in e.messages]
        assert encode_chat(tokenizer, messages) == tokenizer(prompt_text(e))["input_ids"]


def test_answers_survive_a_round_trip_through_ids(examples: list[Example], tokenizer: PreTrainedTokenizerFast) -> None:
    odd = ["SELECT name FROM t WHERE name = 'Zoë O''Hara' AND d > '2019-05-01'", "SELECT a.b, (x), 'q' FROM t -- _ %"]
    for answer in [e.answer for e in examples] + odd:
        assert tokenizer.decode(tokenizer(answer + END)["input_ids"], skip_special_tokens=True) == answer


def test_a_word_has_the_same_ids_in_question_identifier_and_literal(tokenizer: PreTrainedTokenizerFast) -> None:
    word = tokenizer(" vessel", add_special_tokens=False)["input_ids"]
    for text in (" the vessel name", " vessel_name", " T1.vessel", " count(vessel)", " 'vessel'", " ship_vessel"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert any(ids[i : i + len(word)] == word for i in range(len(ids))), text


def test_the_checkpoint_is_small_and_its_vocabulary_is_the_tokenizers(tokenizer: PreTrainedTokenizerFast) -> None:
    model = AutoModelForCausalLM.from_pretrained(NANO_PATH)
    assert model.config.vocab_size == model.get_input_embeddings().num_embeddings == len(tokenizer)
    assert (NANO_PATH / "model.safetensors").stat().st_size <= 4_000_000
    assert model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids(END)
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id


def test_the_checkpoint_says_how_it_was_made() -> None:
    note = json.loads((NANO_PATH / "sqlbench.json").read_text())
    log = [json.loads(line) for line in (NANO_PATH / "training_log.jsonl").read_text().splitlines()]
    assert note["family"] == "nano"
    assert {"seed", "recipe", "measured"} <= set(note)
    assert note["measured"]["cpu_seconds"] < 20 * 60 + 5  # ten minutes of two cores, and the step that ends them
    assert log[-1]["loss"] < log[0]["loss"] / 3


def test_pretraining_prompts_are_those_of_the_agent(tmp_path: Path) -> None:
    domain = fill(read_domains("seen")[0], Examples(0).rng)
    connect(domain, str(tmp_path / "concert.sqlite")).close()
    database = open_database(tmp_path / "concert.sqlite")
    ours, theirs = schema_of(domain), introspect(database)
    database.close()
    assert {t.name for t in ours.tables} == {t.name for t in theirs.tables}
    lines = [sorted(schema_text(s, "compact").splitlines()) for s in (ours, theirs)]
    assert lines[0] == lines[1]


def test_examples_are_the_same_for_a_seed_and_of_all_three_kinds(examples: list[Example]) -> None:
    again = Examples(11)
    assert [again.draw(2) for _ in range(300)] == examples
    assert {e.agent for e in examples} == {"write", "rewrite", "check"}
    assert {e.answer for e in examples if e.agent == "check"} == {CORRECT, INCORRECT}


def test_the_shipped_policy_answers_a_simple_question(tokenizer: PreTrainedTokenizerFast) -> None:
    engine = LocalEngine(NANO_PATH)
    messages = prompts_for("nano").write("How many singers are there?", " singer: singer_id, name, age", "sqlite")
    prompt = encode_chat(tokenizer, [m.model_dump() for m in messages])
    answer = engine.generate([GenerationRequest(tuple(prompt), 64)])[0]
    assert tokenizer.decode(answer.token_ids, skip_special_tokens=True) == "SELECT count(*) FROM singer"


def test_a_short_training_learns_and_refuses_to_overwrite(tmp_path: Path) -> None:
    measured = train_nano(tmp_path / "nano", minutes=0.35, threads=1, recipe=Recipe(easy=1.0, late=1.0), progress=False)
    assert measured["first_loss"] == pytest.approx(math.log(1024), abs=0.3)
    assert measured["last_loss"] < measured["first_loss"] - 1  # how far it gets depends on the machine
    assert LocalEngine(tmp_path / "nano").generate([GenerationRequest((1, 5, 6), 4)])[0].token_ids
    with pytest.raises(ModelError, match="Checkpoint already exists"):
        train_nano(tmp_path / "nano", minutes=0.1, progress=False)
