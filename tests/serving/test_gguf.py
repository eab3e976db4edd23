"""GGUF files that hold a scaling."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoConfig, PreTrainedModel

from scaled_rope.checkpoint import DEFAULT_MODEL
from scaled_rope.errors import ConfigError
from scaled_rope.scaling.frequencies import compute_rope
from scaled_rope.scaling.record import RopeScaling
from scaled_rope.serving.gguf import GgufRope, add_rope, interleave, read_gguf_rope, write_checkpoint
from tests.helpers.exports import command_line


def deinterleave(weight: Any, heads: int) -> Any:
    """The inverse of `interleave`."""
    order = interleave(np.arange(len(weight))[:, None], heads)[:, 0]
    return weight[np.argsort(order)]


def test_interleaving_turns_the_same_pairs() -> None:
    """q and k in llama.cpp's order, turned in neighbouring pairs, have the products of q and k turned in halves."""
    generator = np.random.default_rng(0)
    q, k = generator.normal(size=(2, 3, 8))  # three heads of eight dimensions
    angles = generator.uniform(0, 6, size=(2, 4))

    def turn(x: np.ndarray, angle: np.ndarray, first: Any, second: Any) -> np.ndarray:
        y, a, b = x.copy(), x[:, first], x[:, second]
        y[:, first], y[:, second] = a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)
        return y

    half, rest, even, odd = slice(0, 4), slice(4, 8), slice(0, 8, 2), slice(1, 8, 2)
    theirs = [interleave(x.reshape(24, 1), 3).reshape(3, 8) for x in (q, k)]
    ours = turn(q, angles[0], half, rest) @ turn(k, angles[1], half, rest).T
    again = turn(theirs[0], angles[0], even, odd) @ turn(theirs[1], angles[1], even, odd).T
    np.testing.assert_allclose(again, ours)
    assert not np.array_equal(theirs[0], q)
    np.testing.assert_array_equal(deinterleave(interleave(q.reshape(24, 1), 3), 3), q.reshape(24, 1))


@pytest.fixture(scope="module")
def plain_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("gguf")
    path = tmp_path_factory.mktemp("gguf") / "plain.gguf"
    write_checkpoint(DEFAULT_MODEL, path, GgufRope({"llama.rope.scaling.type": "none"}))
    return path


def test_a_checkpoint_written_as_gguf_reads_back(plain_gguf: Path) -> None:
    gguf = pytest.importorskip("gguf")
    from safetensors.torch import load_file

    weights = load_file(DEFAULT_MODEL / "model.safetensors")
    reader = gguf.GGUFReader(plain_gguf)
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    config = AutoConfig.from_pretrained(DEFAULT_MODEL)
    assert len(tensors) == len(weights)
    for layer in range(config.num_hidden_layers):
        for name, heads in (("q", config.num_attention_heads), ("k", config.num_key_value_heads)):
            ours = weights[f"model.layers.{layer}.self_attn.{name}_proj.weight"].float().numpy()
            theirs = tensors[f"blk.{layer}.attn_{name}.weight"]
            assert not np.array_equal(theirs, ours)
            np.testing.assert_array_equal(deinterleave(theirs, heads), ours)
    np.testing.assert_array_equal(tensors["token_embd.weight"], weights["model.embed_tokens.weight"].float().numpy())
    fields = {name: entry.contents() for name, entry in reader.fields.items()}
    assert fields["llama.block_count"] == config.num_hidden_layers
    assert fields["llama.rope.freq_base"] == 10000.0
    assert len(fields["tokenizer.ggml.tokens"]) == config.vocab_size
    assert read_gguf_rope(plain_gguf).metadata["llama.rope.scaling.type"] == "none"
    assert read_gguf_rope(plain_gguf).divisors is None


def test_a_copy_of_a_gguf_holds_the_scaling_and_all_else_unchanged(plain_gguf: Path, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    arguments = ["--for", "llama.cpp", "--scaling", "yarn:8,ramp=rotations"]
    _, run = command_line(str(DEFAULT_MODEL), *arguments, "--gguf", str(plain_gguf), "--output", str(tmp_path))
    assert run() == 0
    copied = read_gguf_rope(tmp_path / "plain.gguf")
    scaling = RopeScaling("yarn", 8.0, 256, ramp="rotations")
    ours, factor = compute_rope(scaling, 64)
    own, _ = compute_rope(RopeScaling("default"), 64)
    assert copied.divisors is not None
    np.testing.assert_allclose(own.numpy() / np.array(copied.divisors), ours, rtol=1e-6)
    assert copied.metadata["llama.rope.scaling.attn_factor"] == pytest.approx(factor)
    before, after = gguf.GGUFReader(plain_gguf), gguf.GGUFReader(tmp_path / "plain.gguf")
    kept = {tensor.name: tensor for tensor in after.tensors}
    for tensor in before.tensors:
        assert kept[tensor.name].tensor_type == tensor.tensor_type
        np.testing.assert_array_equal(kept[tensor.name].data, tensor.data)
    for name, entry in before.fields.items():
        if ".rope." not in name and not name.startswith("GGUF."):
            assert after.fields[name].contents() == entry.contents()


def test_gguf_refusals(plain_gguf: Path, tmp_path: Path, tiny_model: Callable[..., PreTrainedModel]) -> None:
    with pytest.raises(ConfigError, match="overwrite"):
        add_rope(plain_gguf, plain_gguf, GgufRope())
    with pytest.raises(ConfigError, match="architecture 'llama', but the scaling says qwen2.rope"):
        add_rope(plain_gguf, tmp_path / "a.gguf", GgufRope({"qwen2.rope.freq_base": 1e4}))
    (tmp_path / "text.gguf").write_text("no GGUF")
    with pytest.raises(ConfigError, match="cannot be read"):
        add_rope(tmp_path / "text.gguf", tmp_path / "a.gguf", GgufRope())
    with pytest.raises(ConfigError, match="does not exist"):
        add_rope(tmp_path / "none.gguf", tmp_path / "a.gguf", GgufRope())
    tiny_model().save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match="no tokenizer.json"):
        write_checkpoint(tmp_path / "model", tmp_path / "a.gguf", GgufRope())
    assert not list(tmp_path.glob("*.tmp")) and not (tmp_path / "a.gguf").exists()


def written(path: Path, said: dict[str, Any], tensors: tuple[str, ...] = ("output.weight",), **how: Any) -> Path:
    """A GGUF of the Llama architecture with heads of 8 dimensions, one row of numbers per tensor."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(str(path), "llama", **how)
    if "general.alignment" in said:
        writer.add_custom_alignment(said["general.alignment"])
    for name, value in ({"llama.rope.dimension_count": 8} | said).items():
        kind = gguf.GGUFValueType.UINT16 if name.startswith("split.") else gguf.GGUFValueType.get_type(value)
        if name != "general.alignment":
            writer.add_key_value(name, value, kind)
    for number, name in enumerate(tensors):
        writer.add_tensor(name, np.arange(4, dtype=np.float32) + 10 * number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


FOUR = GgufRope({"llama.rope.freq_base": 1e4}, (1.0, 2.0, 3.0, 4.0))


def test_one_part_of_a_split_gguf_is_refused(tmp_path: Path) -> None:
    written(tmp_path / "m.gguf", {}, ("a.weight", "b.weight", "c.weight"), split_max_tensors=2)
    parts = sorted(tmp_path.glob("m-*.gguf"))
    assert [part.name for part in parts] == ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"]
    said = r"m-00001-of-00002.gguf' is one of 2 parts \(split.count\).*llama-gguf-split --merge"
    with pytest.raises(ConfigError, match=said):
        read_gguf_rope(parts[0])
    arguments = ["--for", "llama.cpp", "--scaling", "yarn:8,ramp=rotations", "--gguf", str(parts[0])]
    _, run = command_line(str(DEFAULT_MODEL), *arguments, "--output", str(tmp_path / "out"))
    with pytest.raises(ConfigError, match=said):
        run()
    assert not (tmp_path / "out").exists()
    for count in (0, 1):  # merged, and never more than one
        whole = written(tmp_path / f"{count}.gguf", {"split.count": count, "split.no": 0})
        add_rope(whole, tmp_path / "copy.gguf", FOUR)
        assert read_gguf_rope(tmp_path / "copy.gguf").divisors == FOUR.divisors


def test_a_gguf_that_is_no_model_here_is_refused(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    big = {"endianess": gguf.GGUFEndian.BIG}
    for name, path, said in (
        ("adapter", written(tmp_path / "a.gguf", {"general.type": "adapter"}), "general.type 'adapter': must be 'mod"),
        ("projector", written(tmp_path / "p.gguf", {"general.type": "mmproj"}), "general.type 'mmproj': must be 'mode"),
        ("big-endian", written(tmp_path / "b.gguf", {}, **big), "b.gguf' is in big-endian byte order"),
        ("vocabulary", written(tmp_path / "v.gguf", {}, ()), "v.gguf' holds no weights"),
        ("other heads", written(tmp_path / "h.gguf", {"llama.rope.dimension_count": 16}), "rotates 16 dimensions of a"),
    ):
        with pytest.raises(ConfigError, match=said):
            add_rope(path, tmp_path / "out.gguf", FOUR)
        assert not (tmp_path / "out.gguf").exists(), name


def test_a_copy_holds_nothing_of_the_scaling_that_the_source_had(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    own = {"llama.rope.scaling.type": "longrope", "llama.rope.scaling.attn_factor": 1.2, "llama.rope.freq_base": 5e5}
    tensors = ("output.weight", "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
    source = written(tmp_path / "a.gguf", own, tensors)
    add_rope(source, tmp_path / "b.gguf", FOUR)
    assert read_gguf_rope(tmp_path / "b.gguf") == GgufRope(
        {"llama.rope.dimension_count": 8, "llama.rope.freq_base": 1e4}, FOUR.divisors
    )
    assert [one.name for one in gguf.GGUFReader(tmp_path / "b.gguf").tensors] == ["output.weight", "rope_freqs.weight"]
    add_rope(tmp_path / "b.gguf", tmp_path / "c.gguf", GgufRope({"llama.rope.scaling.type": "none"}))
    assert read_gguf_rope(tmp_path / "c.gguf").divisors is None


def test_a_copy_keeps_the_alignment_of_its_source(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    source = written(tmp_path / "a.gguf", {"general.alignment": 256}, ("a.weight", "b.weight"))
    add_rope(source, tmp_path / "b.gguf", FOUR)
    found = {tensor.name: tensor.data.tolist() for tensor in gguf.GGUFReader(tmp_path / "b.gguf").tensors}
    assert found == {"a.weight": [0, 1, 2, 3], "b.weight": [10, 11, 12, 13], "rope_freqs.weight": [1, 2, 3, 4]}


def header(*keys: bytes, tensors: int = 0, count: int | None = None) -> bytes:
    """The bytes of a GGUF, version 3, of keys alone."""
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, len(keys) if count is None else count) + b"".join(keys)


def key(name: str, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", kind) + value


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (header(key("a", 9, struct.pack("<IQ", 4, 2**60))), "key 'a' is said to have 1152921504606846976 items"),
        (header(key("a", 9, struct.pack("<IQ", 8, 2**26))), "key 'a' is said to have 67108864 items"),
        (header(key("a", 8, struct.pack("<Q", 2**40))), "key 'a' is said to have 1099511627776 items"),
        (header(key("a", 9, struct.pack("<IQ", 9, 1) + struct.pack("<IQ", 4, 2**60))), "key 'a' has items of type 9"),
        (header(key("a", 77, b"")), "key 'a' has type 77"),
        (header(count=2**50), "the header's keys are said to be 1125899906842624"),
        (header(tensors=2**50), "the header's tensors are said to be 1125899906842624"),
        (header(key("a", 4, b"\x01")), "the file ends 1 bytes later"),
        (header(key("general.name", 8, text("x"))), "does not say its architecture"),
        (b"GGUF" + b"\x03", "cannot be read: the file ends within"),
        (b"", "cannot be read"),
        (b"no GGUF", "it does not begin with GGUF"),
    ],
)
def test_what_a_header_says_has_to_be_in_the_file(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "a.gguf").write_bytes(content)
    with pytest.raises(ConfigError, match=re.escape(said)):
        add_rope(tmp_path / "a.gguf", tmp_path / "out.gguf", GgufRope({}))
    assert not (tmp_path / "out.gguf").exists()
