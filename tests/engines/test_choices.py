"""Several answers of one job, answers kept to a form, and the probabilities of their tokens."""

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jsonschema_rs
import pytest
import torch
import transformers
from marshmallow import ValidationError
from tokenizers import Tokenizer, decoders, models, normalizers

from engines.catalogue import JobType
from engines.contract import InvalidInput, JobCancelled, Text
from engines.schemas import RESULTS, load_params
from engines.text.answer import Answer
from engines.text.grammar import Grammars
from engines.text.sampling import Sampler, choose
from engines.text.vocabulary import Vocabulary

#: Batched, the same with a repetition penalty, and one by one.
FAMILIES = ["qwen2", "qwen3", "lfm2"]
SPECIAL = ["<|im_start|>", "<|endoftext|>"]
ANIMAL = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["fox", "dog", "狐狸"]},
        "legs": {"type": "integer", "minimum": 0, "maximum": 12},
        "name": {"type": ["string", "null"], "maxLength": 6},
        "tags": {"type": "array", "items": {"$ref": "#/$defs/tag"}, "maxItems": 2},
    },
    "required": ["kind", "legs", "name", "tags"],
    "additionalProperties": False,
    "$defs": {"tag": {"type": "object", "properties": {"on": {"type": "boolean"}}, "additionalProperties": False}},
}


def form(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}


# --- n


@pytest.mark.parametrize("family", ["qwen2", "lfm2"])
def test_the_answers_of_a_job_are_those_of_jobs_with_the_next_seeds(
    family: str, engine_of: Any, ask: Any, recorder: Any
) -> None:
    engine, heard = engine_of(family), recorder()
    options = {"temperature": 1.0, "max_tokens": 9}

    answer = ask(engine, "hello", heard, n=3, seed=5, **options)

    alone = [ask(engine, "hello", seed=seed, **options) for seed in (5, 6, 7)]
    texts = [event for event in heard.heard if isinstance(event, Text)]
    read = alone[0]["usage"]["prompt_tokens"]
    assert RESULTS[JobType.LLM].validate(answer) == {}
    assert [choice["response"] for choice in answer["choices"]] == [one["response"] for one in alone]
    assert ["".join(text.delta for text in texts if text.choice == number) for number in range(3)] == [
        one["response"] for one in alone
    ]
    assert answer["response"] == alone[0]["response"]
    assert answer["usage"] == {"prompt_tokens": read, "completion_tokens": 27, "total_tokens": read + 27}
    assert heard.steps == sorted(heard.steps)
    assert heard.steps[-1] == 27
    assert "choices" not in alone[0]


def test_more_answers_than_rows_wait_for_room_and_without_a_seed_they_differ(
    engine_of: Any, ask: Any, generate: Any
) -> None:
    engine = engine_of("qwen2")

    with ThreadPoolExecutor(3) as pool:
        greedy = [pool.submit(ask, engine, "fox", n=8, max_tokens=20) for _ in range(2)]
        drawn = pool.submit(ask, engine, "fox", n=8, max_tokens=20, temperature=2.0)

    for job in greedy:
        assert {choice["response"] for choice in job.result()["choices"]} == {generate("qwen2", "fox", 20)[0]}
    assert len({choice["response"] for choice in drawn.result()["choices"]}) > 1


@pytest.mark.parametrize("family", ["qwen2", "lfm2"])
def test_a_cancelled_job_ends_all_its_answers(family: str, engine_of: Any, ask: Any, recorder: Any) -> None:
    engine, stopped = engine_of(family), recorder(JobCancelled(), at=6)

    with pytest.raises(JobCancelled):
        ask(engine, "hello", stopped, n=4, max_tokens=900)
    after = ask(engine, "hello", max_tokens=2)

    assert stopped.steps[-1] == 6
    assert after["usage"]["completion_tokens"] == 2


# --- logprobs


@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_are_the_model_s_own_before_penalty_temperature_and_form(
    family: str, engine_of: Any, ask: Any, checkpoint: Any
) -> None:
    network = transformers.AutoModelForCausalLM.from_pretrained(checkpoint(family), dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint(family))
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hello"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = network.generate(
        **inputs, max_new_tokens=8, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    tokens = output.sequences[0, inputs["input_ids"].shape[1] :]
    scores = torch.cat(output.logits).log_softmax(dim=-1)

    answer = ask(engine_of(family), "hello", max_tokens=8, logprobs=True, top_logprobs=3)

    (choice,) = answer["choices"]
    assert RESULTS[JobType.LLM].validate(answer) == {}
    told = torch.tensor([entry["logprob"] for entry in choice["logprobs"]])
    tops = torch.tensor([[top["logprob"] for top in entry["top_logprobs"]] for entry in choice["logprobs"]])
    assert torch.allclose(told, scores.gather(1, tokens[:, None])[:, 0], atol=1e-3)
    assert torch.allclose(tops, scores.topk(3, dim=-1).values, atol=1e-3)


def test_the_bytes_of_logprobs_are_the_text_even_where_characters_span_tokens(
    engine_of: Any, ask: Any, recorder: Any
) -> None:
    heard = recorder()

    answer = ask(engine_of("llama"), "你好", heard, temperature=1.5, seed=3, max_tokens=60, logprobs=True)

    (choice,) = answer["choices"]
    streamed = [entry for event in heard.heard if isinstance(event, Text) for entry in event.logprobs]
    spelled = b"".join(bytes(entry["bytes"]) for entry in streamed if entry["token"] not in SPECIAL)
    assert streamed == choice["logprobs"]
    assert spelled.decode(errors="replace") == answer["response"]
    assert any(entry["token"] == "\ufffd" for entry in streamed)


def test_tokens_of_a_stop_string_are_not_told(engine_of: Any, ask: Any, recorder: Any) -> None:
    engine, heard = engine_of("qwen2"), recorder()
    whole = ask(engine, "hello", max_tokens=60)["response"]

    answer = ask(engine, "hello", heard, max_tokens=60, stop=[whole[20:26]], logprobs=True)

    told = b"".join(bytes(entry["bytes"]) for entry in answer["choices"][0]["logprobs"]).decode(errors="replace")
    assert told.startswith(answer["response"])
    assert whole[20:26] not in told


# --- response_format


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_keep_to_their_schema_whatever_is_drawn(family: str, engine_of: Any, ask: Any, generate: Any) -> None:
    engine, valid = engine_of(family), jsonschema_rs.validator_for(ANIMAL)

    with ThreadPoolExecutor(2) as pool:
        beside = pool.submit(ask, engine, "fox", max_tokens=33)
        answer = ask(
            engine, "hi", n=4, seed=1, temperature=1.0, max_tokens=150, response_format=form(ANIMAL), logprobs=True
        )

    done = [choice for choice in answer["choices"] if choice["finish_reason"] == "stop"]
    assert len(done) >= 2
    for choice in done:
        valid.validate(json.loads(choice["response"]))
    assert beside.result()["response"] == generate(family, "fox", 33)[0]


def test_any_object_is_one_and_greedy_answers_keep_to_it_too(engine_of: Any, ask: Any) -> None:
    options = {"max_tokens": 300, "response_format": {"type": "json_object"}}
    answers = [ask(engine_of("qwen2"), "hi", **options), ask(engine_of("qwen2"), "hi", temperature=1.0, **options)]

    for answer in answers:
        assert answer["response"].startswith("{")
        assert answer["finish_reason"] == "length" or isinstance(json.loads(answer["response"]), dict)


def test_a_tokenizer_with_bytes_for_rare_characters_keeps_to_a_schema() -> None:
    pieces = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *'{}[]:,"', "▁{", '":', "fox", "legs"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    grammars, valid = Grammars(Vocabulary("tiny", tokenizer, {1})), jsonschema_rs.validator_for(ANIMAL)

    for seed in range(4):
        grammar, answer = grammars.grammar(form(ANIMAL)), Answer(tokenizer.backend_tokenizer, ())
        sampler, dice = Sampler(1.0, 1.0, seed), torch.Generator().manual_seed(seed)
        while not grammar.complete:
            # A few more than the tokenizer has, as models do.
            logits = torch.randn(1, len(pieces) + 8, generator=dice)
            grammar.restrict(logits[0])
            (token,) = choose(logits, [sampler])
            assert token is not None
            grammar.take(token)
            answer.add(token)
        answer.close()

        valid.validate(json.loads(answer.text))


@pytest.mark.parametrize(
    ("schema", "rule"),
    [
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"oneOf": [{"type": "string"}, {"minLength": 2}]}, "oneOf"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
        ({"type": "foo"}, "Invalid type: foo"),
        ({"$ref": "#/$defs/nowhere"}, "nowhere"),
        ({"enum": ["a"], "maxLength": 0}, "Unsatisfiable"),
        ({"type": "integer", "multipleOf": 10**9 + 7}, "fuel exhausted"),
        ({"allOf": [{"anyOf": [{"properties": {f"{a}{b}": {}}} for b in "abcd"]} for a in range(12)]}, "too large"),
        ({"type": "integer", "minimum": -(10**300)}, "minimum|number|integer"),
    ],
)
def test_a_schema_that_cannot_be_kept_to_is_refused_by_its_rule(
    schema: dict[str, Any], rule: str, engine_of: Any, ask: Any
) -> None:
    with pytest.raises(InvalidInput, match=rf"response_format\.json_schema\.schema: .*({rule})"):
        ask(engine_of("qwen2"), "hi", response_format=form(schema))


def nested(depth: int) -> dict[str, Any]:
    return {"items": nested(depth - 1)} if depth else {}


@pytest.mark.parametrize(
    ("params", "field", "rule"),
    [
        ({"n": 9}, "n", "less than or equal to 8"),
        ({"top_logprobs": 2}, "top_logprobs", "Only with logprobs"),
        ({"logprobs": True, "top_logprobs": 20, "max_tokens": 100_000}, "top_logprobs", "1000000"),
        ({"response_format": {"type": "xml"}}, "type", "json_object"),
        ({"response_format": {"type": "json_schema"}}, "json_schema", "Needed"),
        ({"response_format": {"type": "text", "json_schema": form({})["json_schema"]}}, "json_schema", "Only with"),
        ({"response_format": form({"$ref": "file:///etc/passwd"})}, "schema", "references within"),
        ({"response_format": form({"const": "x" * 65_536})}, "schema", "65536 bytes"),
        ({"response_format": form(nested(64))}, "schema", "64 objects"),
        ({"response_format": form({"const": float("nan")})}, "schema", "no JSON"),
        ({"response_format": form({"const": "\ud800"})}, "schema", "Unicode"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value,
)
def test_params_that_are_wrong_are_refused_by_field_and_rule(params: dict[str, Any], field: str, rule: str) -> None:
    with pytest.raises(ValidationError) as refused:
        load_params(JobType.LLM, {"messages": [{"role": "user", "content": "hi"}], **params})

    said = str(refused.value.messages)
    assert f"'{field}'" in said
    assert rule in said
