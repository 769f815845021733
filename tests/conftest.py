"""What several test modules need: a tiny model with a real tokenizer, and where the real data lie."""

import os
import string
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: the tests run side by side

import pytest
import torch

if not torch.accelerator.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported: its kernels run on the CPU

from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

ROOT = Path(__file__).parent.parent
WORDS = ("the", "film", "is", "was", "a", "good", "bad", "great", "dull", "fine", "not", "plot", "and", "it", "i")


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory):
    """A folder with a random two-layer BERT and its WordPiece tokenizer, as ``save_pretrained`` writes it."""
    folder = tmp_path_factory.mktemp("tiny_bert")
    letters = [*string.ascii_lowercase, *string.digits]
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *string.punctuation, *letters]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys([*tokens, *(f"##{letter}" for letter in letters)]))}
    tokenizer = BertTokenizer(vocab=vocabulary, model_max_length=128)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=128,
    )
    torch.manual_seed(0)
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def shared_data():
    """The folder of real data, from INHIBITOR_DATA or beside the repository."""
    folder = Path(os.environ.get("INHIBITOR_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("no real data here: set INHIBITOR_DATA to its folder")
    return folder
