"""`PYTHON -P bench/tiny_model.py DIRECTORY`: a small tokenizer and a config, for programs that will not run without a model's files.

Run by an interpreter that has tokenizers and transformers, which meshserve has not. Trained on the standard library's sources, so that
nothing is fetched. Written as a Llama, whose layout every program knows.
"""

import importlib
import json
import sys
import sysconfig
from pathlib import Path
from typing import Any

_VOCABULARY = 2048
_TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}assistant:"


def make(directory: Path) -> None:
    """Write the files."""
    tokenizers: Any = importlib.import_module("tokenizers")
    transformers: Any = importlib.import_module("transformers")
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=_VOCABULARY, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    trained.train([str(path) for path in sources], trainer)
    whole = transformers.PreTrainedTokenizerFast(tokenizer_object=trained, bos_token="<s>", eos_token="</s>")
    whole.chat_template = _TEMPLATE
    whole.save_pretrained(directory)
    (directory / "config.json").write_text(json.dumps(_config()))


def _config() -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": _VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 131_072,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "torch_dtype": "float32",
    }


if __name__ == "__main__":
    make(Path(sys.argv[1]))
