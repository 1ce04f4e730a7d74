"""The store of text embeddings: what was put in comes out, bit for bit, or a line says which file is wrong."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mirai_dist.config.error import FileError
from mirai_dist.data.embeddings import NEGATIVE, Contents, EmbeddingStore, Identity, establish, file_of, write_shard
from mirai_dist.data.prompts import PromptFile

DIM, LENGTH, SHARD = 8, 6, 3
PROMPTS = ["one", "two two", "three of them", "four", "five is the longest one", "six", "seven"]


def embedding(text: str, dim: int = DIM) -> Tensor:
    """[words, dim] bfloat16 that stands for an encoder's."""
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
    return torch.randn(len(text.split()), dim, generator=torch.Generator().manual_seed(seed)).bfloat16()


def identity_for(file: PromptFile, **changes: object) -> Identity:
    values = {
        "prompts": file.digest,
        "count": file.size,
        "encoder": "e" * 64,
        "dim": DIM,
        "length": LENGTH,
        "shard_size": SHARD,
        "negative": "n" * 64,
    }
    return Identity(**{**values, **changes})  # type: ignore[arg-type]


def fill(path: Path, identity: Identity, texts: Sequence[str], cut: Sequence[int] = ()) -> None:
    establish(path, identity)
    for shard in range(identity.shards):
        rows = [embedding(texts[number]) for number in identity.numbers(shard)]
        local = [number - identity.numbers(shard)[0] for number in cut if number in identity.numbers(shard)]
        write_shard(path, identity, Contents(f"shard-{shard:05d}", [len(row) for row in rows], local), rows)
    negative = embedding("no no")
    write_shard(path, identity, Contents(NEGATIVE, [len(negative)]), [negative])


@pytest.fixture
def prompts(tmp_path: Path) -> PromptFile:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    return PromptFile(tmp_path / "prompts.txt")


@pytest.fixture
def path(tmp_path: Path, prompts: PromptFile) -> Path:
    fill(tmp_path / "store", identity_for(prompts), PROMPTS)
    return tmp_path / "store"


def expected(texts: Sequence[str], length: int = LENGTH) -> Tensor:
    out = torch.zeros(len(texts), length, DIM, dtype=torch.bfloat16)
    for row, text in zip(out, texts, strict=True):
        row[: len(text.split())] = embedding(text)
    return out


def test_what_was_put_in_comes_out(path: Path, prompts: PromptFile):
    store = EmbeddingStore(path, LENGTH, prompts, DIM)
    assert (store.size, store.dim) == (7, DIM)
    assert store.captions([6, 0]) == ["seven", "one"]
    assert torch.equal(store.embed(range(7)), expected(PROMPTS))
    assert torch.equal(store.embed([4, 0, 4]), expected([PROMPTS[4], PROMPTS[0], PROMPTS[4]]))
    assert torch.equal(store.negative(), expected(["no no"]))
    assert store.embed([]).shape == (0, LENGTH, DIM)
    store.verify()


def test_another_length_pads_otherwise_and_nothing_else(path: Path, prompts: PromptFile):
    assert torch.equal(EmbeddingStore(path, 5, prompts).embed([4]), expected([PROMPTS[4]], 5))
    assert torch.equal(EmbeddingStore(path, 9, prompts).embed([4]), expected([PROMPTS[4]], 9))


def test_numbers_outside_are_index_errors(path: Path, prompts: PromptFile):
    store = EmbeddingStore(path, LENGTH, prompts)
    for number in (7, -1):
        with pytest.raises(IndexError, match=f"0 to 6, not {number}"):
            store.embed([number])


def test_a_shard_is_the_format_that_is_documented(path: Path):
    from safetensors.torch import load_file

    tensors = load_file(file_of(path, "shard-00001"))
    rows = [embedding(text) for text in PROMPTS[3:6]]
    assert list(tensors) and set(tensors) == {"tokens", "offsets", "digests"}
    assert torch.equal(tensors["tokens"], torch.cat(rows)) and tensors["offsets"].tolist() == [0, 1, 6, 7]
    digests = [hashlib.sha256(row.view(torch.uint8).numpy().tobytes()).digest() for row in rows]
    assert bytes(tensors["digests"].flatten().tolist()) == b"".join(digests)


def test_the_same_content_is_the_same_bytes(path: Path, prompts: PromptFile, tmp_path: Path):
    fill(tmp_path / "again", identity_for(prompts), PROMPTS)
    files = sorted(file.name for file in path.iterdir())
    assert files == ["negative.safetensors", *(f"shard-0000{i}.safetensors" for i in range(3)), "store.json"]
    for name in files:
        assert (path / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_opening_many_shards_maps_none_and_reading_all_keeps_few(tmp_path: Path):
    texts = [f"word{i} " * (1 + i % 3) for i in range(300)]
    (tmp_path / "p").write_text("\n".join(texts))
    prompts = PromptFile(tmp_path / "p")
    fill(tmp_path / "s", identity_for(prompts, shard_size=1), texts)
    begin = time.perf_counter()
    store = EmbeddingStore(tmp_path / "s", LENGTH, prompts)
    took = time.perf_counter() - begin
    assert not mapped(tmp_path / "s")
    assert torch.equal(store.embed(range(300)), expected(texts))
    assert 0 < mapped(tmp_path / "s") <= 64
    assert took < 0.5, f"opening 300 shards took {took:.2f} s"  # 0.03 s on two busy cores


def mapped(folder: Path) -> int:
    return len({line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if f"{folder}/" in line})


def test_a_flipped_byte_anywhere_is_found(tmp_path: Path):
    """Every byte of a shard, of the negative prompt and of store.json, one after the other."""
    (tmp_path / "p").write_text("one\ntwo two\n")
    prompts = PromptFile(tmp_path / "p")
    fill(tmp_path / "s", identity_for(prompts), ["one", "two two"])
    flips = 0
    for file in sorted((tmp_path / "s").iterdir()):
        whole = file.read_bytes()
        for at in range(len(whole)):
            file.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << at % 8)]) + whole[at + 1 :])
            flips += 1
            if json_of(file) is not None and json_of(file) == json.loads(whole):
                continue  # white space of store.json
            with pytest.raises(FileError) as refused:
                EmbeddingStore(tmp_path / "s", LENGTH, prompts).verify()
            assert "\n" not in str(refused.value) and str(file) in str(refused.value), at
        file.write_bytes(whole)
    EmbeddingStore(tmp_path / "s", LENGTH, prompts).verify()
    assert flips > 1400


def json_of(file: Path) -> object:
    if file.suffix != ".json":
        return None
    try:
        return json.loads(file.read_bytes())
    except ValueError:
        return None


def test_an_altered_entry_is_found_when_it_is_used_and_named(path: Path, prompts: PromptFile):
    file = file_of(path, "shard-00001")
    data = bytearray(file.read_bytes())
    data[-2 * DIM * 1 - 1] ^= 1  # the last byte of entry 1 of three
    file.write_bytes(data)
    store = EmbeddingStore(path, LENGTH, prompts)
    assert torch.equal(store.embed([0, 3, 5]), expected([PROMPTS[0], PROMPTS[3], PROMPTS[5]]))
    for use in (lambda: store.embed([4]), store.verify):
        with pytest.raises(FileError, match=r"shard-00001\.safetensors: entry 1 was altered"):
            use()


def edit(**changes: object) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        content = json.loads((path / "store.json").read_text())
        (path / "store.json").write_text(json.dumps({**content, **changes}))

    return change


def cut(name: str, keep: int) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        (path / name).write_bytes((path / name).read_bytes()[:keep])

    return change


def put(name: str, content: bytes) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        (path / name).write_bytes(content)

    return change


def other_store(path: Path) -> None:
    """A shard of the same prompts by another encoder."""
    other = path.with_name("other")
    fill(other, identity_for(PromptFile(path.with_name("prompts.txt")), encoder="f" * 64), PROMPTS)
    shutil.copy(file_of(other, "shard-00001"), path)


S0, S1 = "shard-00000.safetensors", "shard-00001.safetensors"
REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "no store": (lambda p: shutil.rmtree(p), "no such folder; make one: mirai data embed PROMPTS"),
    "a file": (lambda p: (shutil.rmtree(p), p.write_text("x")), "is a file; name the folder"),
    "an empty folder": (lambda p: (shutil.rmtree(p), p.mkdir()), r"holds no store\.json"),
    "no json": (put("store.json", b"{"), r"store\.json: cannot be read"),
    "json not UTF-8": (put("store.json", b"\xff{}"), "cannot be read"),
    "json empty": (put("store.json", b""), "cannot be read"),
    "json list": (put("store.json", b"[1]"), "is not of format 1"),
    "json of another thing": (put("store.json", b"{}"), "is not of format 1"),
    "json deep": (put("store.json", b"[" * 100_000), "cannot be read"),
    "later format": (edit(version=2), "is not of format 1"),
    "key too many": (edit(extra=1), "was altered"),
    "other count": (edit(count=8), "was altered after it was written"),
    "other width": (edit(dim=16), "was altered after it was written"),
    "count in words": (edit(count="seven"), "was altered after it was written"),
    "shard missing": (lambda p: (p / S1).unlink(), rf"{S1}: is missing.*mirai data embed .*--length 6 --shard-size 3"),
    "negative missing": (lambda p: (p / "negative.safetensors").unlink(), "negative.safetensors: is missing"),
    "shard a folder": (lambda p: ((p / S0).unlink(), (p / S0).mkdir()), f"{S0}: cannot be read: Is a directory"),
    "shard empty": (cut(S0, 0), f"{S0}: is damaged"),
    "shard cut in its length": (cut(S0, 5), f"{S0}: is damaged"),
    "shard cut in its head": (cut(S0, 100), f"{S0}: is damaged"),
    "shard cut in its tables": (cut(S1, 500), f"{S1}: is damaged"),
    "shard cut by a byte": (cut(S1, -1), f"{S1}: is cut short or too long"),
    "shard cut by a row": (cut(S1, -2 * DIM), f"{S1}: is cut short"),
    "negative cut": (cut("negative.safetensors", -1), "negative.safetensors: is cut short"),
    "shard grown": (lambda p: (p / S1).write_bytes((p / S1).read_bytes() + b"\0"), "is cut short or too long"),
    "shard of text": (put(S0, b"version https://git-lfs.github.com/spec/v1\n"), f"{S0}: is damaged"),
    "shard with a huge head": (put(S0, b"\xff" * 64), f"{S0}: is damaged"),
    "shard with a deep head": (put(S0, (90_000).to_bytes(8, "little") + b"[" * 90_000), f"{S0}: is damaged"),
    "shard of other tensors": (put(S0, b"\x02\0\0\0\0\0\0\0{}"), f"{S0}: is damaged"),
    "shards swapped": (lambda p: shutil.copy(p / S0, p / S1), f"{S1}: belongs to another store or another place"),
    "shard of another encoder": (other_store, f"{S1}: belongs to another store"),
    "negative as a shard": (lambda p: shutil.copy(p / "negative.safetensors", p / S0), f"{S0}: is damaged"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_damaged_store_is_one_line(path: Path, prompts: PromptFile, name: str):
    change, message = REFUSED[name]
    change(path)
    with pytest.raises(FileError, match=message) as refused:
        EmbeddingStore(path, LENGTH, prompts, DIM)
    assert "\n" not in str(refused.value)
    assert re.match(rf"{re.escape(str(path))}\S*: ", str(refused.value)), str(refused.value)


def test_what_does_not_belong_together_is_refused(path: Path, prompts: PromptFile, tmp_path: Path):
    other = tmp_path / "other.txt"
    other.write_text("\n".join(PROMPTS) + "\nand one more")
    with pytest.raises(FileError, match=r"holds the embeddings of another file than .*other\.txt, or it was edited"):
        EmbeddingStore(path, LENGTH, PromptFile(other))
    with pytest.raises(FileError, match=r"of width 8, text\.dim is 4096; set text\.dim=8"):
        EmbeddingStore(path, LENGTH, prompts, 4096)
    with pytest.raises(FileError, match=r"shard-00001.*holds a prompt of 5 tokens, text\.length is 4"):
        EmbeddingStore(path, 4, prompts)


def test_prompts_that_were_cut_forbid_a_greater_length(prompts: PromptFile, tmp_path: Path):
    fill(tmp_path / "s", identity_for(prompts), PROMPTS, cut=[4])
    EmbeddingStore(tmp_path / "s", LENGTH, prompts)
    with pytest.raises(FileError, match=r"shard-00001.*prompts cut to 6 tokens \(1 of them\), text\.length is 7"):
        EmbeddingStore(tmp_path / "s", LENGTH + 1, prompts)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": "0" * 64}, "another prompt file, or the file was edited"),
        ({"encoder": "0" * 64}, "another encoder"),
        ({"negative": "0" * 64}, "another negative prompt"),
        ({"length": 5}, r"cut at 6 tokens, asked for 5 \(--length\)"),
        ({"shard_size": 4}, r"hold 3 prompts, asked for 4 \(--shard-size\)"),
        ({"dim": 9}, "has dim 8, asked for 9"),
    ],
)
def test_a_store_is_not_taken_for_another(path: Path, prompts: PromptFile, changes: dict, message: str):
    before = (path / "store.json").read_bytes()
    with pytest.raises(FileError, match=rf"store\.json: belongs to something else: .*{message}.*--out"):
        establish(path, identity_for(prompts, **changes))
    assert (path / "store.json").read_bytes() == before
    establish(path, identity_for(prompts))


def test_a_failed_write_leaves_nothing_and_says_why(path: Path, prompts: PromptFile):
    identity = identity_for(prompts)
    before = sorted(path.iterdir())

    def full_disk():
        yield embedding("one")
        raise OSError(28, "No space left on device")

    contents = Contents("shard-00000", [1, 2, 3])
    with pytest.raises(FileError, match="shard-00000.safetensors: cannot be written: No space left on device"):
        write_shard(path, identity, contents, full_disk())
    for wrong in ([embedding("one")] * 3, [embedding("one").float()] * 3):
        with pytest.raises(ValueError, match="an embedding is"):
            write_shard(path, identity, contents, wrong)
    with pytest.raises(FileError, match="cannot be made: Not a directory|cannot be made: File exists"):
        establish(path / "store.json", identity)
    assert sorted(path.iterdir()) == before
    EmbeddingStore(path, LENGTH, prompts).verify()
