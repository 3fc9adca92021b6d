"""Each kind of tokenizer against the implementation that it must agree with."""

import json
import multiprocessing
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from emkum.data.tokenizers import (
    BertTokenizer,
    ClipTokenizer,
    Gpt2Tokenizer,
    SentencePieceTokenizer,
    SpecialTokens,
    Tokenizer,
    copy_tokenizer,
    encode,
    load_tokenizer,
)
from emkum.errors import UserError
from emkum.prepare.tokenizer import train_sentencepiece

SENTENCES = [f"a {size} {color} dog runs over the grass" for size in ("big", "small") for color in ("red", "tan")] * 5
NASTY = (
    "",
    " ",
    "Hello world!",
    "  spaces, CAPITALS  and números — naïve 日本 🙂 ",
    "tabs\tand\nlines\r\n\r\nof   text \u00a0\u2003 end ",
    "e\u0301 combining, ﬁ ligature, Straße, ΣΑΣ, İstanbul, \u017fir it'\u017f",
    "👩‍👩‍👧‍👦 family, 🇩🇪 flag, 👍🏽 skin",
    "中文字符，日本語テキスト、한국어 텍스트 ภาษาไทย हिन्दी العربية",
    "control \x00\x01\x1b[31m\x7f\x85 characters \u200b\ufeff\ufffd",
    "&amp; &lt;b&gt; &amp;amp; &eacute; &#39; AT&T & co",
    "âœ” mojibake schÃ¶n â€œquotedâ€\x9d",
    "it's they're I'VE we'll he'D don't ' '' 's",
    "!!! ?! ... --- $1,234.56 50% #tag @user http://a.b/c?d=e_f",
    "un" + "believ" * 60 + "able " + "x" * 5000,
    "word " * 3000,
)


@pytest.fixture(scope="module")
def captions(shared_data: Path) -> list[str]:
    lines = (shared_data / "flickr8k" / "captions.txt").read_text(encoding="utf-8").split("\n")[1:5001]
    return [line.partition(",")[2] for line in lines]


def default_model(path: Path, **options: object) -> Path:
    """A SentencePiece model with its own ids: <unk> 0, <s> 1, </s> 2."""
    with open(path, "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(SENTENCES),
            model_writer=file,
            **{"vocab_size": 60, "hard_vocab_limit": False, "minloglevel": 2} | options,
        )
    return path


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_sentencepiece(iter(SENTENCES), path, 60)
    return path


@pytest.fixture(scope="module")
def gpt2(shared_data: Path) -> Gpt2Tokenizer:
    return load_tokenizer(shared_data / "tokenizers")


@pytest.fixture(scope="module")
def bert(shared_data: Path) -> BertTokenizer:
    return load_tokenizer(shared_data / "tokenizers" / "bert-base-uncased-vocab.txt")


@pytest.fixture(scope="module")
def clip_file() -> Path:
    return Path(pytest.importorskip("open_clip").__file__).parent / ClipTokenizer.ARCHIVE


@pytest.fixture(scope="module")
def clip(clip_file: Path) -> ClipTokenizer:
    return load_tokenizer(clip_file)


@pytest.fixture(params=["sentencepiece", "bert", "gpt2", "clip"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    if request.param == "sentencepiece":
        return load_tokenizer(request.getfixturevalue("model_file"))
    return request.getfixturevalue(request.param)


def starts(tokenizer: Tokenizer, text: str) -> list[int]:
    """Which pieces of a text begin a word, as 0 and 1."""
    return tokenizer.word_starts(tokenizer.pieces(text)).astype(int).tolist()


# ----------------------------------------------------------------------------------------------------------------------
# All kinds
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_tokens", [2, 3, 64, 77])
def test_truncation_keeps_the_end_token(tokenizer: Tokenizer, max_tokens: int) -> None:
    bos, eos = tokenizer.special.bos, tokenizer.special.eos
    pieces = tokenizer.pieces("a dog runs " * 50)
    assert encode(tokenizer, "a dog runs " * 50, max_tokens) == [bos, *pieces[: max_tokens - 2], eos]
    assert encode(tokenizer, "", max_tokens) == [bos, eos]
    with pytest.raises(UserError, match="at least 2"):
        encode(tokenizer, "a", 1)


def test_the_text_of_special_tokens_is_no_special_token(tokenizer: Tokenizer) -> None:
    special = tokenizer.special
    text = "<s> <pad> </s> <unk> <mask> [CLS] [SEP] [PAD] [MASK] <start_of_text> <|endoftext|> <end_of_text>"
    assert not {special.bos, special.eos, special.mask} & set(tokenizer.pieces(text))


def test_ids_are_below_the_vocabulary_size_and_words_begin_somewhere(tokenizer: Tokenizer) -> None:
    for text in NASTY:
        pieces = tokenizer.pieces(text)
        begins = tokenizer.word_starts(np.array(pieces, dtype=np.int32))
        assert all(type(piece) is int and 0 <= piece < tokenizer.vocab_size for piece in pieces)
        assert begins.shape == (len(pieces),) and begins.dtype == bool and begins[:1].all()
    assert max(i for i in tokenizer.special.ids) < tokenizer.vocab_size


def test_pieces_read_as_the_words_that_they_are_of(tokenizer: Tokenizer) -> None:
    text = "a small tan dog runs over the red grass"
    read = tokenizer.texts(tokenizer.pieces(text))
    assert len(read) == len(tokenizer.pieces(text))
    # SentencePiece may have a piece for the space alone.
    assert " ".join(read).replace(" ##", "").replace("▁", "").split() == text.split()


def test_broken_escapes_do_not_stop_a_run(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.pieces("a dog \ud83d runs")) > 3


def test_copies_and_pickles_are_equal(tokenizer: Tokenizer, tmp_path: Path) -> None:
    copy_tokenizer(tokenizer, tmp_path / "run" / "tokenizer")
    copy_tokenizer(load_tokenizer(tmp_path / "run" / "tokenizer"), tmp_path / "run" / "tokenizer")
    assert sorted(path.name for path in (tmp_path / "run" / "tokenizer").iterdir()) == sorted(tokenizer.files)
    for other in (load_tokenizer(tmp_path / "run" / "tokenizer"), pickle.loads(pickle.dumps(tokenizer))):
        assert type(other) is type(tokenizer)
        assert (other.special, other.vocab_size) == (tokenizer.special, tokenizer.vocab_size)
        assert [other.pieces(text) for text in NASTY] == [tokenizer.pieces(text) for text in NASTY]
    assert len(pickle.dumps(tokenizer)) < 1000


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_give_the_same_ids(gpt2: Gpt2Tokenizer, bert: BertTokenizer, model_file: Path, method: str) -> None:
    # In use before the workers start.
    expected = [[kind.pieces(text) for text in NASTY] for kind in (gpt2, bert, load_tokenizer(model_file))]
    with multiprocessing.get_context(method).Pool(1) as pool:
        kinds = (gpt2, bert, load_tokenizer(model_file))
        assert [pool.map_async(kind.pieces, NASTY).get(60) for kind in kinds] == expected


# ----------------------------------------------------------------------------------------------------------------------
# SentencePiece
# ----------------------------------------------------------------------------------------------------------------------


def test_sentencepiece_round_trip(model_file: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(model_file)
    pieces = tokenizer.pieces("a small red dog runs")
    assert tokenizer.processor.decode(pieces) == "a small red dog runs"
    assert min(pieces) > 4 and max(pieces) < tokenizer.vocab_size
    assert encode(tokenizer, "a small red dog runs", 64) == [0, *pieces, 2]
    assert tokenizer.special == SpecialTokens(bos=0, pad=1, eos=2, unk=3, mask=4)
    assert tokenizer.special.ids == (0, 1, 2, 3, 4)
    renamed = tmp_path / "mine.spm"
    renamed.write_bytes(model_file.read_bytes())
    for other in (renamed, tmp_path, model_file.parent):
        assert load_tokenizer(other).pieces("a tan dog") == tokenizer.pieces("a tan dog")


def test_fairseq_layout_with_a_mask_piece(tmp_path: Path) -> None:
    ids = {"bos_id": 0, "pad_id": 1, "eos_id": 2, "unk_id": 3}
    tokenizer = load_tokenizer(default_model(tmp_path / "a.model", control_symbols=["<mask>"], **ids))
    assert tokenizer.special.mask == tokenizer.processor.piece_to_id("<mask>") == 4
    assert tokenizer.vocab_size == len(tokenizer.processor)


def test_own_layout_becomes_that_of_xlm_r(tmp_path: Path) -> None:
    path = default_model(tmp_path / "sentencepiece.bpe.model")
    naive = sentencepiece.SentencePieceProcessor(model_file=str(path))
    tokenizer = load_tokenizer(path)
    assert tokenizer.vocab_size == len(naive) + 2
    assert tokenizer.special == SpecialTokens(bos=0, pad=1, eos=2, unk=3, mask=len(naive) + 1)
    texts = [*SENTENCES[:4], *NASTY]
    for text in texts:
        assert tokenizer.pieces(text) == [{0: 3}.get(piece, piece + 1) for piece in naive.encode(text)]
    assert 3 in tokenizer.pieces("a 日 dog"), "the unknown piece should be among them"

    transformers = pytest.importorskip("transformers")
    reference = transformers.XLMRobertaTokenizer.from_pretrained(tmp_path)
    assert (len(reference), reference.mask_token_id) == (tokenizer.vocab_size, tokenizer.special.mask)
    for text in SENTENCES[:4] + ["a gloss", "the small tan dog sees grass over there"]:
        assert encode(tokenizer, text, 512) == reference(text)["input_ids"]


def test_sentencepiece_words_begin_at_spaces(model_file: Path, tmp_path: Path) -> None:
    for path in (model_file, default_model(tmp_path / "own.model")):
        tokenizer = load_tokenizer(path)
        shift = 0 if path == model_file else 1
        pieces = tokenizer.pieces("a grossed dog, 日")
        spelled = [tokenizer.processor.id_to_piece(piece - shift) for piece in pieces]
        assert sum(starts(tokenizer, "a grossed dog, 日")) == 4
        assert [piece.startswith("▁") for piece in spelled] == tokenizer.word_starts(pieces).tolist()
        assert starts(tokenizer, "a grossed")[0] == 1 and tokenizer.word_starts(pieces[2:])[0]


def test_other_special_ids_are_refused(tmp_path: Path) -> None:
    path = default_model(tmp_path / "t5.model", pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
    with pytest.raises(UserError, match=r"are \(-1, 0, 1, 2\); supported are \(0, 1, 2, 3\) .* and \(1, -1, 2, 0\)"):
        load_tokenizer(path)


@pytest.mark.parametrize("content", [b"no model", b""])
def test_no_sentencepiece_model(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.model").write_bytes(content)
    with pytest.raises(UserError, match="bad.model is not a SentencePiece model") as caught:
        load_tokenizer(tmp_path / "bad.model")
    assert "\n" not in str(caught.value)


# ----------------------------------------------------------------------------------------------------------------------
# BERT
# ----------------------------------------------------------------------------------------------------------------------


def test_bert_against_transformers(bert: BertTokenizer, captions: list[str], shared_data: Path) -> None:
    transformers = pytest.importorskip("transformers")
    reference = transformers.BertTokenizer(vocab=str(shared_data / "tokenizers" / "bert-base-uncased-vocab.txt"))
    for text in [*captions, *NASTY]:
        assert encode(bert, text, 20_000) == reference(text)["input_ids"], text[:100]
    special = (getattr(reference, f"{name}_token_id") for name in ("cls", "pad", "sep", "unk", "mask"))
    assert bert.special == SpecialTokens(*special)
    assert bert.vocab_size == len(reference) == 30_522


def test_bert_words_begin_without_number_signs(bert: BertTokenizer) -> None:
    # a, puppy, ##ish, dog, -, like, cat, .
    assert starts(bert, "A puppyish dog-like cat.") == [1, 1, 0, 1, 1, 1, 1, 1]
    assert bert.word_starts(bert.pieces("puppyish")[1:]).tolist() == [True]


def write_vocabulary(path: Path, *pieces: str) -> Path:
    path.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[unused0]", *pieces]) + "\n", "utf-8")
    return path


def test_case_is_kept_where_the_vocabulary_has_capitals(tmp_path: Path) -> None:
    uncased = load_tokenizer(write_vocabulary(tmp_path / "a-vocab.txt", "dog", "ne", "ℝ"))
    assert not uncased.cased and uncased.pieces("DOG né ℝ") == [6, 7, 8]
    cased = load_tokenizer(write_vocabulary(tmp_path / "b-vocab.txt", "dog", "né", "Dog"))
    assert cased.cased and cased.pieces("dog né Dog DOG") == [6, 7, 8, 1]
    assert cased.vocab_size == 9


def test_no_bert_vocabulary(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n\ndog\n")
    with pytest.raises(UserError, match=r"vocab.txt is no BERT vocabulary: it lacks \[SEP\], \[MASK\]"):
        load_tokenizer(tmp_path)


# ----------------------------------------------------------------------------------------------------------------------
# GPT-2
# ----------------------------------------------------------------------------------------------------------------------


def test_gpt2_gives_the_ids_of_roberta(gpt2: Gpt2Tokenizer, shared_data: Path) -> None:
    from fairseq.data import Dictionary

    assert encode(gpt2, "Hello world!", 64) == [0, 31414, 232, 328, 2]
    dictionary = Dictionary.load(str(shared_data / "tokenizers" / "dict.txt"))
    mask = dictionary.add_symbol("<mask>")
    assert gpt2.special == SpecialTokens(
        dictionary.bos(), dictionary.pad(), dictionary.eos(), dictionary.unk(), mask=mask
    )
    assert gpt2.vocab_size == len(dictionary) == mask + 1


def test_gpt2_against_fairseq(gpt2: Gpt2Tokenizer, captions: list[str], shared_data: Path) -> None:
    from fairseq.data import Dictionary
    from fairseq.data.encoders.gpt2_bpe import GPT2BPE, GPT2BPEConfig

    folder = shared_data / "tokenizers"
    bpe = GPT2BPE(
        GPT2BPEConfig(gpt2_encoder_json=str(folder / "encoder.json"), gpt2_vocab_bpe=str(folder / "vocab.bpe"))
    )
    dictionary = Dictionary.load(str(folder / "dict.txt"))
    for text in [*captions[::10], *NASTY]:
        line = dictionary.encode_line(bpe.encode(text), append_eos=True, add_if_not_exist=False)
        assert encode(gpt2, text, 50_000) == [dictionary.bos(), *line.tolist()], text[:100]
        begins = [bpe.is_beginning_of_word(dictionary[piece]) for piece in line[:-1].tolist()]
        assert gpt2.word_starts(line[:-1].numpy()).tolist() == [True, *begins[1:]][: len(begins)]


def test_gpt2_against_transformers(gpt2: Gpt2Tokenizer, captions: list[str], shared_data: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = shared_data / "tokenizers"
    reference = transformers.GPT2Tokenizer(vocab=str(folder / "encoder.json"), merges=str(folder / "vocab.bpe"))
    lines = (folder / "dict.txt").read_text().splitlines()
    row = {line.split()[0]: number for number, line in enumerate(lines, start=4)}
    for text in [*captions, *NASTY]:
        assert gpt2.pieces(text) == [row[str(piece)] for piece in reference(text)["input_ids"]], text[:100]


@pytest.mark.parametrize("line", ["13", "5 7\n5 8", "<s> 3", "5 x"])
def test_malformed_dictionary(gpt2: Gpt2Tokenizer, tmp_path: Path, line: str) -> None:
    copy_tokenizer(gpt2, tmp_path)
    (tmp_path / "dict.txt").write_text(line + "\n")
    with pytest.raises(UserError, match="dict.txt, line [12]: want a piece"):
        load_tokenizer(tmp_path)


def test_pieces_missing_in_the_dictionary_are_unknown(gpt2: Gpt2Tokenizer, tmp_path: Path) -> None:
    copy_tokenizer(gpt2, tmp_path)
    (tmp_path / "dict.txt").write_text("15496 1\n<mask> 0\n")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.pieces("Hello world") == [4, 3]
    assert (tokenizer.special.mask, tokenizer.vocab_size) == (5, 6)


# ----------------------------------------------------------------------------------------------------------------------
# CLIP
# ----------------------------------------------------------------------------------------------------------------------


def test_clip_against_open_clip(clip: ClipTokenizer, captions: list[str]) -> None:
    open_clip = pytest.importorskip("open_clip")
    reference = open_clip.tokenizer.SimpleTokenizer()
    for text in [*captions, *NASTY]:
        assert clip.pieces(text) == reference.encode(text), text[:100]
    # The reference's own truncation and padding.
    for text in [*captions[:100], *NASTY]:
        tokens = encode(clip, text, 77)
        assert reference(text)[0].tolist() == tokens + [clip.special.pad] * (77 - len(tokens))
    assert clip.special == SpecialTokens(bos=49_406, pad=0, eos=49_407, unk=None, mask=None)
    assert clip.vocab_size == reference.vocab_size == 49_408


def test_clip_cleans_text_as_open_clip(clip: ClipTokenizer) -> None:
    open_clip = pytest.importorskip("open_clip")
    reference = open_clip.tokenizer.SimpleTokenizer()
    rng = random.Random(0)
    pools = [[chr(i) for i in numbers] for numbers in (range(32, 127), range(128), range(256))]
    pools.append([*"aB '&;#39\u2019\ufb01Ã©ſ\n", "\x1b[31m", "&lt;", "&amp;"])
    for number in range(2000):
        text = "".join(rng.choices(pools[number % 4], k=30))
        assert clip.pieces(text) == reference.encode(text), text


def test_clip_from_the_files_of_hugging_face(clip: ClipTokenizer, clip_file: Path, tmp_path: Path) -> None:
    open_clip = pytest.importorskip("open_clip")
    encoder = open_clip.tokenizer.SimpleTokenizer().encoder
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    (tmp_path / "vocab.json").write_text(json.dumps({names.get(piece, piece): i for piece, i in encoder.items()}))
    merges = open_clip.tokenizer.SimpleTokenizer().bpe_ranks
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges), ""]), encoding="utf-8")
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.special, tokenizer.vocab_size) == (clip.special, clip.vocab_size)
    assert [tokenizer.pieces(text) for text in NASTY] == [clip.pieces(text) for text in NASTY]
    copy_tokenizer(tokenizer, tmp_path / "copy")
    assert load_tokenizer(tmp_path / "copy").pieces(NASTY[3]) == clip.pieces(NASTY[3])
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    with pytest.raises(UserError, match="vocab.json is not CLIP's: it lacks"):
        load_tokenizer(tmp_path)


def test_clip_words_end_with_a_mark(clip: ClipTokenizer) -> None:
    # a</w>, puppy, ish</w>, dog</w>, -</w>, like</w>, !</w>
    assert starts(clip, "A puppyish dog-like!") == [1, 1, 0, 1, 1, 1, 1]
    assert starts(clip, "") == []


# ----------------------------------------------------------------------------------------------------------------------
# Files
# ----------------------------------------------------------------------------------------------------------------------


def test_names_tell_the_kind(shared_data: Path, model_file: Path, tmp_path: Path) -> None:
    folder = shared_data / "tokenizers"
    assert type(load_tokenizer(folder)) is Gpt2Tokenizer, "it holds a BERT vocabulary too"
    assert type(load_tokenizer(str(folder / "bert-base-uncased-vocab.txt"))) is BertTokenizer
    write_vocabulary(tmp_path / "bert-vocab.txt", "dog")
    assert type(load_tokenizer(tmp_path)) is BertTokenizer
    for name in ("other.spm", "tokenizer.model"):
        (tmp_path / name).write_bytes(model_file.read_bytes())
        assert type(load_tokenizer(tmp_path)) is SentencePieceTokenizer


def test_no_tokenizer_there(tmp_path: Path) -> None:
    for name in ("encoder.json", "merges.txt", "notes.txt"):
        (tmp_path / name).write_text("{}")
    for path in (tmp_path, tmp_path / "absent", tmp_path / "notes.txt"):
        with pytest.raises(UserError, match="no tokenizer at .*: give ") as caught:
            load_tokenizer(path)
        for form in (
            "*.model, *.spm",
            "*vocab.txt",
            "16e6.txt.gz",
            "encoder.json, vocab.bpe and dict.txt",
            "merges.txt",
        ):
            assert form in str(caught.value)


def test_several_tokenizers_there(tmp_path: Path) -> None:
    for name in ("a.spm", "b.model"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match="holds several tokenizers: give one of a.spm, b.model"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.txt.gz", b"no gzip", r"cannot read .*x.txt.gz: Not a gzipped file"),
        ("vocab.txt", b"[CLS]\n\xff\n", "vocab.txt is not UTF-8 text"),
    ],
)
def test_unreadable_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        load_tokenizer(tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("encoder.json", "[1", "encoder.json is not JSON"),
        ("encoder.json", '{"a": 0, "b": 2}', "encoder.json does not give each piece its number"),
        ("vocab.bpe", "#version\na b\nc\n", "vocab.bpe holds no merges of byte-level BPE: line 3"),
        ("vocab.bpe", "#version\nq zzzzz\n", "vocab.bpe does not go with its vocabulary"),
    ],
)
def test_malformed_bpe(gpt2: Gpt2Tokenizer, tmp_path: Path, name: str, content: str, message: str) -> None:
    copy_tokenizer(gpt2, tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_copy_does_not_hide_behind_another_kind(gpt2: Gpt2Tokenizer, model_file: Path, tmp_path: Path) -> None:
    copy_tokenizer(load_tokenizer(model_file), tmp_path)
    with pytest.raises(UserError, match=r"holds another tokenizer \(tokenizer.model\): remove it"):
        copy_tokenizer(gpt2, tmp_path)
