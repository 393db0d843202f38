import gc
import itertools
import json
import random
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from engines.catalogue import EMBEDDING, JobType, Model, Pooling, Sentence
from engines.contract import (
    Device,
    EngineBroken,
    EngineError,
    EngineLoadError,
    InvalidInput,
    JobCancelled,
    OutOfMemory,
    Progress,
)
from engines.embedding import sentences
from engines.embedding.engine import MICRO_BATCH_TOKENS, SHARE_TOKENS, Encoder, Engine, Texts, cut
from engines.grouped import Grouped
from engines.loading import load, resolve
from engines.schemas import RESULTS, load_params
from tests.engines import tiny_embedding

CPU = Device("cpu", dtype="float32")
LONGEST = tiny_embedding.LONGEST
QUERY, PASSAGE = "query: ", "passage: "
#: As the catalogue has them for E5, BGE-large-zh and BGE-M3.
KINDS = {
    "e5": ("bert", Sentence(Pooling.MEAN, LONGEST, QUERY, PASSAGE)),
    "bge": ("bert", Sentence(Pooling.CLS, LONGEST, "介绍：")),
    "m3": ("xlm_roberta", Sentence(Pooling.CLS, LONGEST)),
}


@pytest.fixture(scope="module", autouse=True)
def quick_collections() -> Iterator[None]:
    """Engines collect garbage when they close: a second each time for all that torch has imported."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a family's tiny encoder."""
    return cache(lambda family: getattr(tiny_embedding, family)(tmp_path_factory.mktemp("tiny") / family))


@pytest.fixture(scope="session")
def tiny(encoder: Callable[[str], Path]) -> Callable[[str], Model]:
    """A row of the catalogue for a tiny encoder that reads as E5, BGE or BGE-M3 do."""

    def row(kind: str) -> Model:
        family, sentence = KINDS[kind]
        return Model(f"tiny-{kind}", JobType.EMBEDDING, EMBEDDING, folder=str(encoder(family)), sentence=sentence)

    return row


@pytest.fixture(scope="module")
def engine(tiny: Callable[[str], Model]) -> Iterator[Callable[[str], Engine]]:
    """The engine of a kind, loaded once; tests that break or close one load their own."""
    loaded: dict[str, Engine] = {}

    def get(kind: str) -> Engine:
        if kind not in loaded:
            loaded[kind] = load(tiny(kind), CPU)  # type: ignore[assignment]
        return loaded[kind]

    yield get
    for each in loaded.values():
        each.close()


def ask(engine: Engine, texts: Sequence[str] | str, report: Any = lambda _: None, **options: Any) -> dict[str, Any]:
    return engine.run(load_params(JobType.EMBEDDING, {"input": texts, **options}), report)


@cache
def parts(folder: Path) -> tuple[Any, Any]:
    return transformers.AutoModel.from_pretrained(folder).eval(), transformers.AutoTokenizer.from_pretrained(folder)


def expected(folder: Path, pooling: str, texts: Sequence[str]) -> np.ndarray:
    """What transformers computes, one text at a time."""
    network, tokenizer = parts(folder)
    rows = []
    for text in texts:
        inputs = tokenizer(text, return_tensors="pt", truncation=True, max_length=LONGEST)
        with torch.inference_mode():
            hidden = network(**inputs).last_hidden_state[0].double()
        row = hidden[0] if pooling == "cls" else hidden.mean(dim=0)
        rows.append((row / row.norm()).numpy())
    return np.array(rows)


def token_count(folder: Path, texts: Sequence[str]) -> int:
    return sum(map(len, parts(folder)[1](list(texts))["input_ids"]))


def words(dice: random.Random, count: int, most: int = 30) -> list[str]:
    """Texts of one to `most` words."""
    return [" ".join(dice.choices(tiny_embedding.WORDS, k=dice.randint(1, most))) for _ in range(count)]


@contextmanager
def before_forward(act: Callable[[torch.Tensor], None]) -> Iterator[list[tuple[int, int]]]:
    """Call act with the tokens of every forward pass of a BERT, where a device would fail; the shapes that went on."""
    original = transformers.BertModel.forward
    shapes: list[tuple[int, int]] = []

    def forward(self: Any, **kwargs: Any) -> Any:
        act(kwargs["input_ids"])
        shapes.append(tuple(kwargs["input_ids"].shape))
        return original(self, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.BertModel, "forward", forward)
        yield shapes


def watch(_: torch.Tensor) -> None:
    """Only count."""


# --- the vectors


@pytest.mark.parametrize(("kind", "pooling"), [("e5", "mean"), ("bge", "cls"), ("m3", "cls")])
@pytest.mark.parametrize("input_type", ["query", "passage"])
def test_vectors_are_the_library_s_pooled_normalised_and_of_the_prefixed_text(
    kind: str, pooling: str, input_type: str, engine: Any, encoder: Any
) -> None:
    family, sentence = KINDS[kind]
    folder, texts = encoder(family), ["fox", *words(random.Random(0), 5), "今天 zebra, 你好"]
    prefix = sentence.query_prefix if input_type == "query" else sentence.passage_prefix
    prefixed = [prefix + text for text in texts]

    result = ask(engine(kind), texts, input_type=input_type)

    vectors = np.array(result["embeddings"])
    assert RESULTS[JobType.EMBEDDING].validate(result) == {}
    assert np.abs(vectors - expected(folder, pooling, prefixed)).max() < 1e-6
    assert np.abs(np.linalg.norm(vectors, axis=1) - 1).max() < 1e-6
    tokens = token_count(folder, prefixed)
    assert (result["dimensions"], result["model"]) == (32, f"tiny-{kind}")
    assert result["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}
    assert "warnings" not in result


def test_input_type_changes_the_vector_where_the_model_has_prefixes(engine: Any) -> None:
    query, passage = (ask(engine("e5"), "fox", input_type=kind)["embeddings"][0] for kind in ("query", "passage"))

    assert np.abs(np.array(query) - passage).max() > 0.01


def test_a_single_text_is_a_list_of_one(engine: Any) -> None:
    assert ask(engine("e5"), "fox") == ask(engine("e5"), ["fox"])


def test_many_jobs_at_once_get_their_own_vectors_in_the_order_of_their_texts(engine: Any, encoder: Any) -> None:
    dice = random.Random(1)
    jobs = [words(dice, 300, most=10), *(words(dice, dice.randint(1, 4), most=10) for _ in range(16))]
    # Their tokenising overlaps too: with and without cutting, which transformers' tokenizers cannot do at once.
    options = [{"truncate": bool(number % 2)} for number in range(len(jobs))]

    with ThreadPoolExecutor(len(jobs)) as pool:
        results = list(pool.map(lambda texts, more: ask(engine("m3"), texts, **more), jobs, options))

    for texts, result in zip(jobs, results, strict=True):
        assert np.abs(np.array(result["embeddings"]) - expected(encoder("xlm_roberta"), "cls", texts)).max() < 1e-5


# --- sharing


def test_small_jobs_end_before_a_large_one_that_came_first(tiny: Any) -> None:
    checkpoint = sentences.load(tiny("bge"), CPU)
    grouped: Grouped[Texts] = Grouped(Encoder(checkpoint, CPU), lambda: True)
    dice, ended = random.Random(2), []

    def job(name: str, count: int) -> Texts:
        ids = [checkpoint.tokenizer.encode(text).ids for text in words(dice, count)]
        return Texts(ids, 32, lambda event: ended.append(name) if event.done == count else None)

    large = job("large", 300)
    waiting = deque([large, *(job(f"small {number}", 1) for number in range(16))])
    passes = []
    with torch.inference_mode():
        while waiting:
            with before_forward(watch) as shapes:
                grouped.turn(waiting)
            passes.append(sum(rows * longest for rows, longest in shapes))

    assert ended[-1] == "large"
    assert len(set(ended)) == 17
    tokens = sum(map(len, large.ids))
    assert tokens / SHARE_TOKENS["cpu"] < len(passes) <= tokens / SHARE_TOKENS["cpu"] + 2
    assert all(most <= 2 * SHARE_TOKENS["cpu"] for most in passes)


def test_texts_are_padded_to_others_of_about_their_length_in_batches_of_bounded_size(engine: Any) -> None:
    dice = random.Random(3)
    texts = [*words(dice, 40, most=3), *words(dice, 2, most=90), *words(dice, 60, most=12)]

    with before_forward(watch) as shapes:
        usage = ask(engine("bge"), texts)["usage"]

    padded = sum(rows * longest for rows, longest in shapes)
    assert sum(rows for rows, _ in shapes) == len(texts)
    assert padded < 1.5 * usage["prompt_tokens"]
    assert all(rows * longest <= MICRO_BATCH_TOKENS["cpu"] for rows, longest in shapes)


def test_the_cut_costs_least_of_all_cuts() -> None:
    dice = random.Random(4)

    def cost(lengths: Sequence[int], parts: Sequence[range], most: int) -> float:
        each = [len(part) * lengths[part.stop - 1] for part in parts]
        fits = all(tokens <= most or len(part) == 1 for tokens, part in zip(each, parts, strict=True))
        return sum(each) + 16 * len(parts) if fits else np.inf

    for _ in range(60):
        lengths = sorted(dice.choices(range(3, 60), k=7))
        most = dice.choice([40, 100, 1000])
        cuts = itertools.chain.from_iterable(itertools.combinations(range(1, 7), count) for count in range(7))
        edges = [(0, *inner, 7) for inner in cuts]
        all_cuts = [[range(*pair) for pair in itertools.pairwise(edge)] for edge in edges]

        parts = cut(lengths, most, 16)

        assert [place for part in parts for place in part] == list(range(7))
        assert cost(lengths, parts, most) == min(cost(lengths, other, most) for other in all_cuts)


def test_progress_counts_the_texts_of_the_job_itself(engine: Any, recorder: Any) -> None:
    heard = recorder()

    ask(engine("bge"), words(random.Random(5), 200), heard)

    assert heard.steps == sorted(heard.steps)
    assert len(set(heard.steps)) > 4
    assert heard.heard[-1] == Progress(200, 200, "text")


# --- what is too long


def test_a_text_that_is_too_long_is_refused_with_its_place_and_both_numbers(engine: Any, encoder: Any) -> None:
    texts = ["fox", "dog", "fox dog", "fox " * 200]
    tokens = token_count(encoder("bert"), [PASSAGE + texts[3]])

    with pytest.raises(InvalidInput, match=rf"input\.3 has {tokens} tokens, and tiny-e5 reads {LONGEST}") as refused:
        ask(engine("e5"), texts)

    assert refused.value.code == "input_too_long"


@pytest.mark.parametrize("kind", KINDS)
def test_truncate_cuts_as_the_library_does_and_says_how_many_were_cut(kind: str, engine: Any, encoder: Any) -> None:
    family, sentence = KINDS[kind]
    texts = ["fox", "quick " * 300, "dog fox " * 70 + "你好"]

    result = ask(engine(kind), texts, truncate=True)

    vectors = expected(encoder(family), sentence.pooling, [sentence.passage_prefix + text for text in texts])
    assert np.abs(np.array(result["embeddings"]) - vectors).max() < 1e-6
    assert result["warnings"] == [f"2 of 3 texts were cut to the {LONGEST} tokens that are read."]
    assert 2 * LONGEST < result["usage"]["prompt_tokens"] < 2 * LONGEST + 10


@pytest.mark.parametrize(("kind", "word"), [("bge", "fox"), ("m3", "你好")])
def test_a_text_of_exactly_the_longest_length_is_read_whole(kind: str, word: str, engine: Any, encoder: Any) -> None:
    family = KINDS[kind][0]
    text = next(text for n in range(1, LONGEST) if token_count(encoder(family), [text := f"{word} " * n]) >= LONGEST)

    result = ask(engine(kind), text)

    assert result["usage"]["prompt_tokens"] == LONGEST
    assert np.abs(np.array(result["embeddings"]) - expected(encoder(family), "cls", [text])).max() < 1e-6


# --- stopping


def test_a_cancel_stops_a_large_job_before_the_next_micro_batch(engine: Any, recorder: Any) -> None:
    with before_forward(watch) as shapes:
        with pytest.raises(JobCancelled):
            ask(engine("bge"), words(random.Random(6), 300), recorder(JobCancelled(), at=1))
        # The engine thread is through with the large job when it answers the next one.
        ask(engine("bge"), "fox")

    assert len(shapes) == 2


def test_others_go_on_when_one_job_of_a_pass_is_cancelled(engine: Any, encoder: Any, recorder: Any) -> None:
    dice = random.Random(7)
    others = [words(dice, 20, most=20) for _ in range(3)]

    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(ask, engine("bge"), texts) for texts in others]
        with pytest.raises(JobCancelled):
            ask(engine("bge"), words(dice, 300), recorder(JobCancelled(), at=10))
        results = [future.result()["embeddings"] for future in futures]

    for texts, vectors in zip(others, results, strict=True):
        assert np.abs(np.array(vectors) - expected(encoder("bert"), "cls", texts)).max() < 1e-5


def test_the_texts_of_a_cancelled_job_are_left_out_of_the_rest_of_a_pass(tiny: Any, recorder: Any) -> None:
    checkpoint = sentences.load(tiny("bge"), CPU)
    grouped: Grouped[Texts] = Grouped(Encoder(checkpoint, CPU), lambda: True)
    ids = [checkpoint.tokenizer.encode("fox " * 20).ids] * 80
    waiting = deque([Texts(ids, 32, recorder(JobCancelled(), at=1)), Texts(ids, 32, lambda _: None)])

    with torch.inference_mode(), before_forward(watch) as shapes:
        grouped.turn(waiting)

    first = shapes[0][0]
    assert first < 80
    assert sum(rows for rows, _ in shapes) == first + 80


def test_a_job_can_be_cancelled_while_it_is_tokenised(engine: Any, recorder: Any) -> None:
    with before_forward(watch) as shapes, pytest.raises(JobCancelled):
        ask(engine("bge"), words(random.Random(8), 300), recorder(JobCancelled()))

    assert shapes == []


# --- when the device fails


def test_out_of_memory_makes_micro_batches_smaller_and_every_job_completes(tiny: Any, encoder: Any) -> None:
    def fail(ids: torch.Tensor) -> None:
        if ids.shape[0] > 3:
            raise torch.OutOfMemoryError("tried to allocate 2 GiB")

    dice = random.Random(9)
    jobs = [words(dice, 40, most=12), *(words(dice, 2, most=12) for _ in range(8))]
    engine = load(tiny("bge"), CPU)
    with before_forward(fail) as shapes, ThreadPoolExecutor(9) as pool:
        results = list(pool.map(lambda texts: ask(engine, texts)["embeddings"], jobs))  # type: ignore[arg-type]
    engine.close()

    assert 1 < max(rows for rows, _ in shapes) <= 3
    for texts, vectors in zip(jobs, results, strict=True):
        assert np.abs(np.array(vectors) - expected(encoder("bert"), "cls", texts)).max() < 1e-5


def test_a_text_that_does_not_fit_alone_fails_its_own_job_with_the_numbers(tiny: Any) -> None:
    def fail(ids: torch.Tensor) -> None:
        if ids.shape[1] > 50:
            raise torch.OutOfMemoryError("tried to allocate 2 GiB")

    engine: Any = load(tiny("bge"), CPU)
    with before_forward(fail), ThreadPoolExecutor(5) as pool:
        large = pool.submit(ask, engine, ["fox", "dog " * 60, "fox"])
        small = [pool.submit(ask, engine, ["fox " * number] * 3) for number in range(1, 5)]
        failed = large.exception()
        answered = [future.result()["usage"]["prompt_tokens"] for future in small]
    after = ask(engine, "dog " * 60)
    engine.close()

    assert isinstance(failed, OutOfMemory)
    assert "A text of 62 tokens of tiny-bge does not fit cpu even alone" in failed.message
    assert "GiB are free: tried to allocate 2 GiB. Send shorter texts." in failed.message
    assert answered == [9, 12, 15, 18]
    assert after["usage"]["prompt_tokens"] == 62


def test_a_dead_gpu_breaks_the_engine_for_all_and_for_good(tiny: Any) -> None:
    def fail(_: torch.Tensor) -> None:
        raise RuntimeError("CUDA error: device-side assert triggered")

    engine: Any = load(tiny("bge"), CPU)
    with before_forward(fail), ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(ask, engine, f"fox {number}") for number in range(4)]
        errors = [future.exception() for future in futures]

    assert [type(error) for error in errors] == [EngineBroken] * 4
    with pytest.raises(EngineBroken, match="device-side assert"):
        ask(engine, "fox")


def test_a_text_that_the_model_has_no_numbers_for_fails_its_own_job(tmp_path: Path) -> None:
    def break_fox(network: Any, tokenizer: Any) -> None:
        network.embeddings.word_embeddings.weight.data[tokenizer.convert_tokens_to_ids("fox")] = torch.inf

    folder = tiny_embedding.bert(tmp_path / "odd", break_fox)
    engine: Any = load(resolve(JobType.EMBEDDING, str(folder)), CPU)
    with ThreadPoolExecutor(2) as pool:
        bad, good = pool.submit(ask, engine, ["dog", "fox"]), pool.submit(ask, engine, ["dog", "lazy"])
        failed, answered = bad.exception(), good.result()
    engine.close()

    assert type(failed) is EngineError
    assert "no numbers (NaN or infinity) for input.1" in failed.message
    assert np.isfinite(answered["embeddings"]).all()


# --- local folders


def copy(source: Path, folder: Path, files: Mapping[str, Any]) -> Path:
    """A copy of a model with sentence-transformers' own files."""
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).symlink_to(file)
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    return folder


def modules(*kinds: str) -> list[dict[str, str]]:
    paths = {"Transformer": "", "Pooling": "1_Pooling"}
    return [{"type": f"sentence_transformers.models.{kind}", "path": paths.get(kind, f"2_{kind}")} for kind in kinds]


STANDARD = modules("Transformer", "Pooling", "Normalize")
FLAGS = {"word_embedding_dimension": 32, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": False}


@pytest.mark.parametrize(
    "pooling", [FLAGS | {"pooling_mode_cls_token": True}, {"embedding_dimension": 32, "pooling_mode": "cls"}]
)
def test_a_folder_s_sentence_transformers_files_say_how_it_reads(
    pooling: Mapping[str, Any], encoder: Any, tmp_path: Path
) -> None:
    files = {
        "modules.json": STANDARD,
        "1_Pooling/config.json": pooling,
        "sentence_bert_config.json": {"max_seq_length": 20, "do_lower_case": False},
        "config_sentence_transformers.json": {"prompts": {"query": QUERY, "document": "dog "}},
    }
    folder = copy(encoder("bert"), tmp_path / "mine", files)
    engine: Any = load(resolve(JobType.EMBEDDING, str(folder)), CPU)
    query, passage = (ask(engine, "fox", input_type=kind)["embeddings"] for kind in ("query", "passage"))
    with pytest.raises(InvalidInput, match="reads 20,"):
        ask(engine, "fox " * 30)
    engine.close()

    assert np.abs(np.array(query) - expected(folder, "cls", [QUERY + "fox"])).max() < 1e-6
    assert np.abs(np.array(passage) - expected(folder, "cls", ["dog fox"])).max() < 1e-6


def test_a_folder_without_them_is_pooled_by_the_mean_and_read_as_far_as_its_positions_go(
    encoder: Any,
) -> None:
    folder = encoder("xlm_roberta")
    engine: Any = load(resolve(JobType.EMBEDDING, str(folder)), CPU)
    vectors = ask(engine, ["fox 你好", "dog"], input_type="query")["embeddings"]
    with pytest.raises(InvalidInput, match=f"reads {LONGEST},"):
        ask(engine, "你好 " * LONGEST)
    engine.close()

    assert np.abs(np.array(vectors) - expected(folder, "mean", ["fox 你好", "dog"])).max() < 1e-6


def test_a_folder_that_wants_lower_case_gets_it(tmp_path: Path) -> None:
    def keep_case(_: Any, tokenizer: Any) -> None:
        tokenizer.backend_tokenizer.normalizer = tiny_embedding.normalizers.BertNormalizer(lowercase=False)

    source = tiny_embedding.bert(tmp_path / "cased", keep_case)
    files = {"modules.json": STANDARD, "sentence_bert_config.json": {"max_seq_length": 64, "do_lower_case": True}}
    folder = copy(source, tmp_path / "lower", files)
    engine: Any = load(resolve(JobType.EMBEDDING, str(folder)), CPU)
    upper, lower = ask(engine, ["FOX", "fox"])["embeddings"]
    engine.close()

    assert upper == lower


# --- what cannot be loaded


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"modules.json": modules("Transformer", "Pooling", "Dense", "Normalize")}, "Transformer, Pooling, Dense"),
        ({"modules.json": STANDARD, "1_Pooling/config.json": FLAGS | {"pooling_mode_max_tokens": True}}, "_max_tokens"),
        ({"modules.json": STANDARD, "1_Pooling/config.json": {"pooling_mode": ["cls", "mean"]}}, "cls, mean"),
        ({"modules.json": STANDARD, "1_Pooling/config.json": {"include_prompt": False}}, "prompts out of the pooling"),
        ({"modules.json": {"odd": 1}}, "cannot be understood"),
    ],
)
def test_a_folder_that_asks_for_more_than_is_computed_is_refused(
    files: Mapping[str, Any], said: str, encoder: Any, tmp_path: Path
) -> None:
    folder = copy(encoder("bert"), tmp_path / "mine", files)

    with pytest.raises(EngineLoadError, match=said):
        load(resolve(JobType.EMBEDDING, str(folder)), CPU)


def test_a_model_that_is_no_encoder_is_refused_with_those_that_are(checkpoint: Any) -> None:
    with pytest.raises(EngineLoadError, match=r"is a qwen2 model, and vectors are made by encoders: .*xlm-roberta"):
        load(resolve(JobType.EMBEDDING, str(checkpoint("qwen2"))), CPU)


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("tokenizer.json", "has no tokenizer.json"),
        ("config.json", r"must hold .*config\.json, \*\.safetensors and tokenizer\.json"),
        ("model.safetensors", r"must hold .*config\.json, \*\.safetensors and tokenizer\.json"),
    ],
)
def test_a_folder_that_lacks_a_file_is_refused(missing: str, said: str, encoder: Any, tmp_path: Path) -> None:
    folder = copy(encoder("bert"), tmp_path / "mine", {})
    (folder / missing).unlink()

    with pytest.raises(EngineLoadError, match=said):
        load(resolve(JobType.EMBEDDING, str(folder)), CPU)


def test_a_row_whose_folder_is_gone_says_so(tmp_path: Path) -> None:
    row = Model("gone", JobType.EMBEDDING, EMBEDDING, folder=str(tmp_path / "gone"), sentence=KINDS["bge"][1])

    with pytest.raises(EngineLoadError, match=r"gone cannot be loaded: there is no folder .*gone"):
        load(row, CPU)


def test_weights_that_are_not_all_there_are_refused_and_not_made_up(encoder: Any, tmp_path: Path) -> None:
    deeper = tiny_embedding.bert(tmp_path / "deeper", num_hidden_layers=3)
    folder = copy(encoder("bert"), tmp_path / "mine", {})
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to(deeper / "config.json")

    with pytest.raises(EngineLoadError, match=r"lacks 16 of its encoder's weights, among them encoder\.layer\.2"):
        load(resolve(JobType.EMBEDDING, str(folder)), CPU)


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = tiny_embedding.bert(tmp_path / "small", vocab_size=10)

    with pytest.raises(EngineLoadError, match=r"has \d+ tokens and its encoder knows 10"):
        load(resolve(JobType.EMBEDDING, str(folder)), CPU)


def test_a_hub_that_cannot_be_reached_names_the_ways_out() -> None:
    with pytest.raises(EngineLoadError, match=r"BAAI/bge-m3 cannot be loaded from .*HF_ENDPOINT.*local folder"):
        load(resolve(JobType.EMBEDDING, "BAAI/bge-m3"), CPU)


# --- memory


def test_a_model_that_does_not_fit_shows_the_arithmetic(tiny: Any) -> None:
    with pytest.raises(EngineLoadError, match=r"weights 0\.00 GiB \+ activations of 1024 tokens 0\.00 GiB.*free: "):
        load(tiny("bge"), Device("cpu", dtype="float32", max_memory_gib=0.0001))


def test_what_does_not_fit_a_gpu_is_loaded_on_the_cpu_only_if_offloading_is_allowed(
    tiny: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # A GPU with 24 GiB of which nothing is free.
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (0, 24 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 0)

    with pytest.raises(EngineLoadError, match="enable offloading"):
        load(tiny("bge"), Device("cuda:0", dtype="float32"))
    engine: Any = load(tiny("bge"), Device("cuda:0", dtype="float32", offload=True))
    answered = ask(engine, "fox")
    engine.close()

    assert "It is loaded on the CPU." in caplog.text
    assert len(answered["embeddings"][0]) == 32
