"""A tiny random causal LM with a byte-level tokenizer, a task on made-up documents, and a stage directory."""

import json
import random
from pathlib import Path

import pytest

WORDS = ["the", "a", "cat", "dog", "house", "river", "went", "saw", "took", "gave", "red", "small", "old", "and", "of"]


def make_texts(count: int, words: int = 60, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=words)) + "." for _ in range(count)]


@pytest.fixture(scope="session")
def tiny_lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3 of width 32 and 2 layers in Hugging Face format; its tokenizer is byte-level BPE."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    directory = tmp_path_factory.mktemp("tiny_lm")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(make_texts(50), trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(directory)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=0,
        initializer_range=0.5,
    )
    Qwen3ForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of width 32 and 3 layers that reads 48 word pieces."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    directory = tmp_path_factory.mktemp("tiny_bert")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", *sorted({word.lower() for word in WORDS})]
    (directory / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizerFast(str(directory / "vocab.txt"), model_max_length=48).save_pretrained(directory)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=48, initializer_range=0.3,
    )  # fmt: skip
    BertModel(config).save_pretrained(directory)
    return directory


@pytest.fixture
def task_file(tmp_path: Path) -> Path:
    """A task of 20 samples of 20 words, half given, on 40 documents."""
    documents = tmp_path / "documents.jsonl"
    documents.write_text("".join(json.dumps({"text": text}) + "\n" for text in make_texts(40)))
    task = tmp_path / "task.yaml"
    task.write_text(
        f"name: tiny\nsource: {documents}\nn: 20\nmin_tokens: 20\nmax_tokens: 20\nsplit_fraction: [0.5, 0.5]\n"
        "reference_tokenizer: null\n"
    )
    return task
