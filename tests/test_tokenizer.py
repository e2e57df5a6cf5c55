"""Tokenizers: lossless text, ids of published tokenizers, fingerprints that survive saving."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.train_tokenizer import train
from megatext.tokenizer import Tokenizer, load_tokenizer

TEXT = [
    "The quick brown fox jumps over the lazy dog.",
    "A permutation is computed for each index, and never stored.",
    "Rows hold 1024 tokens; the last 37 are padding!",
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train(TEXT * 20, 312)


@pytest.fixture(scope="module")
def qwen3(shared_data: Path) -> Tokenizer:
    return load_tokenizer(shared_data / "tokenizers" / "qwen3")


TEXTS = st.text(
    st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(" \n\t\r\0\u2581<>0xA_é")), max_size=40
)


@settings(max_examples=300)
@given(a=TEXTS, b=TEXTS)
def test_sentencepiece_is_lossless_and_concatenates(tokenizer: Tokenizer, a: str, b: str) -> None:
    assert tokenizer.decode(tokenizer.encode(a)) == a
    assert tokenizer.decode(tokenizer.encode(a) + tokenizer.encode(b)) == a + b
    assert tokenizer.encode_batch([a, b]) == [tokenizer.encode(a), tokenizer.encode(b)]


def test_sentencepiece_special_pieces(tokenizer: Tokenizer) -> None:
    assert (tokenizer.vocab_size, tokenizer.pad_id, tokenizer.eos_id) == (312, 0, 2)
    ids = tokenizer.encode("fox <eos> <pad>")
    assert not {0, 1, 2, 3} & set(ids), "text that spells a special piece is text"
    assert tokenizer.decode([1, *ids, 2, 0]) == "fox <eos> <pad>"
    newline = tokenizer.encode("\n")
    assert len(newline) == 1
    assert tokenizer.encode("\n\n") == newline * 2
    assert len(tokenizer.encode("1234")) == 4


def test_save_and_load(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.fingerprint() == tokenizer.fingerprint()
    assert again.encode(TEXT[0]) == tokenizer.encode(TEXT[0])
    assert train(TEXT * 20, 305).fingerprint() != tokenizer.fingerprint()


@pytest.fixture(scope="module")
def as_json(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("json")
    tokenizer.save_json(directory)
    return load_tokenizer(directory)


@settings(max_examples=300)
@given(text=TEXTS)
def test_tokenizer_json_gives_the_same_ids(tokenizer: Tokenizer, as_json: Tokenizer, text: str) -> None:
    """Of our SentencePiece models, for what reads tokenizer.json alone."""
    assert (as_json.eos_id, as_json.pad_id, as_json.vocab_size) == (2, 0, 312)
    text = text.replace("\u2581", "").replace("\0", "")  # which SentencePiece is told in bytes
    assert as_json.encode(text) == tokenizer.encode(text)
    assert as_json.decode(as_json.encode(text)) == text


def test_a_tokenizer_json_alone(qwen3: Tokenizer, shared_data: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((shared_data / "tokenizers" / "qwen3" / "tokenizer.json").read_bytes())
    alone = load_tokenizer(tmp_path)
    assert (alone.eos_id, alone.encode(TEXT[0])) == (qwen3.eos_id, qwen3.encode(TEXT[0]))


def test_missing_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no tokenizer.model"):
        load_tokenizer(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such tokenizer"):
        load_tokenizer(tmp_path / "absent")


def test_gpt2(shared_data: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(shared_data / "tokenizers" / "gpt2")
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (50_257, 50_256)
    ids = tokenizer.encode("Hello  world\n x .")
    assert ids == [15496, 220, 995, 198, 2124, 764]
    assert tokenizer.decode([*ids, tokenizer.eos_id]) == "Hello  world\n x ."
    tokenizer.save(tmp_path)
    assert load_tokenizer(tmp_path).fingerprint() == tokenizer.fingerprint()


def test_qwen3_ends_documents_as_in_pretraining(qwen3: Tokenizer) -> None:
    assert (qwen3.vocab_size, qwen3.eos_id) == (151_669, 151_643)
    assert qwen3.decode([*qwen3.encode("a <b>\n"), qwen3.eos_id]) == "a <b>\n"


def test_qwen3_ids_equal_the_published_ones(qwen3: Tokenizer, shared_data: Path) -> None:
    folder = shared_data / "tokenizers" / "llama_cpp_tests"
    texts = (folder / "ggml-vocab-qwen2.gguf.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    lines = (folder / "ggml-vocab-qwen2.gguf.out").read_text().splitlines()
    assert len(lines) > 20
    for text, line in zip(texts, lines, strict=False):  # a separator ends the last text too
        assert qwen3.encode(text) == [int(n) for n in line.split()], repr(text)


def test_a_text_that_names_special_tokens_holds_none(qwen3: Tokenizer) -> None:
    text = "GPT-2 ends a text with <|endoftext|>, a chat model a turn with <|im_end|>."
    ids = qwen3.encode(text)
    assert qwen3.eos_id not in ids and max(ids) < 151_643
    assert qwen3.decode([*ids, qwen3.eos_id]) == text


def test_training_gives_the_same_pieces_again(tokenizer: Tokenizer) -> None:
    assert train(TEXT * 20, 312).fingerprint() == tokenizer.fingerprint()


@settings(max_examples=300)
@given(text=TEXTS)
def test_ends_are_places_to_cut(tokenizer: Tokenizer, text: str) -> None:
    """What stands before an end has at most as many tokens as were counted up to there, and nothing is lost."""
    ids, ends = tokenizer.encode_with_ends(text)
    assert ids == tokenizer.encode(text) and len(ends) == len(ids)
    assert ends == sorted(ends) and all(0 <= end <= len(text) for end in ends)
    assert not text or ends[-1] == len(text)
    for count, end in enumerate(ends, 1):
        assert tokenizer.decode(ids[:count]).rstrip("\ufffd") == text[:end].rstrip("\ufffd")


def test_ends_in_the_text_as_given(qwen3: Tokenizer) -> None:
    """Qwen3 composes accents (NFC) before it encodes and spreads rare characters over several tokens: ends are places
    in the text all the same."""
    text = "A cafe\u0301 in \U0001f9d9\u200d\u2642\ufe0f land, \u65e5\u672c\u8a9e."
    ids, ends = qwen3.encode_with_ends(text)
    assert ids == qwen3.encode(text) and ends[-1] == len(text) and ends == sorted(ends)
    assert text.index("\u0301") not in ends  # a letter and its accent are one character to the tokenizer
    pieces = [text[a:b] for a, b in zip([0, *ends], ends, strict=False)]
    assert "".join(pieces) == text and pieces[:3] == ["A", " cafe\u0301", " in"]
