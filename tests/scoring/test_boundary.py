"""Beginnings of options and cuts of texts: at characters, for every family of tokenizers."""

import functools
import unicodedata

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from helpers import synthetic, tiny
from jaguar.tasks import COPA, SST2, Encoder, MultipleChoice, Question, TextClassification, WinoGrande
from jaguar.tasks.rows import Row

SMILE, FAMILY, ACCENT = "\U0001f600", "\U0001f468\u200d\U0001f469\u200d\U0001f467", "e\u0301"
WORDS = ["gloomy", "radiant", "terrible", "great", "film", "unhappy"]


@functools.cache
def family(name):
    """A trained tokenizer: "byte", "byte trimmed", "metaspace", "llama", "unigram", "wordpiece", "closing"."""
    if name == "wordpiece":
        return tiny.tokenizer_of("bert")
    special = ["<unk>", "<pad>", "<s>", "</s>", "<mask>"]
    if name in ("metaspace", "llama", "unigram"):
        bytes_ = [f"<0x{i:02X}>" for i in range(256)]
        if name == "unigram":
            base = Tokenizer(models.Unigram())
            trainer = trainers.UnigramTrainer(
                vocab_size=200, special_tokens=special, unk_token="<unk>", show_progress=False
            )
        else:
            base = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
            trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special + bytes_, show_progress=False)
        if name == "llama":  # as Llama 2 has it: no pre-tokenizer, blanks are letters
            base.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
            base.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # for the training only
        else:
            base.pre_tokenizer = pre_tokenizers.Metaspace()
        base.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    else:
        base = Tokenizer(models.BPE())
        base.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        base.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=500, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        )
    said = [f"a {word} It was {word} un{word}" for word in WORDS] * 50
    base.train_from_iterator([*synthetic.texts(), *said], trainer)
    if name == "llama":
        base.pre_tokenizer = None
    around = "<s> $A </s>" if name in ("closing", "byte trimmed", "unigram") else "<s> $A"
    steps = [processors.ByteLevel(trim_offsets=True)] if name == "byte trimmed" else []
    ends = [(token, base.token_to_id(token)) for token in ("<s>", "</s>")]
    base.post_processor = processors.Sequence(
        [*steps, processors.TemplateProcessing(single=around, special_tokens=[e for e in ends if e[0] in around])]
    )
    names = {"unk_token": "<unk>", "pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=base, mask_token="<mask>", **names)


FAMILIES = ["byte", "byte trimmed", "closing", "metaspace", "llama", "unigram", "wordpiece"]


def pieces(tokenizer, ids):
    """What each token stands for, as bytes: read from its name, not from offsets."""
    table = dict(zip(_byte_letters(), range(256), strict=True))
    found = []
    for token in tokenizer.convert_ids_to_tokens(list(ids)):
        if token in tokenizer.all_special_tokens:
            found.append(b"")
        elif token.startswith("<0x"):
            found.append(bytes([int(token[3:5], 16)]))
        elif "▁" in tokenizer.get_vocab():
            found.append(token.replace("▁", " ").encode())
        else:
            found.append(bytes(table[letter] for letter in token))
    return found


def _byte_letters():
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(b) if b in plain else chr(next(others)) for b in range(256)]


CASES = [  # prompt, option, suffix
    ("a warm film It was", " gloomy", ""),
    ("a warm film It was ", "gloomy", ""),
    ("a warm film It was ", "great", ""),
    ("a warm film It was ", "terrible", " , they said"),
    ("a film It was  ", "great", ""),
    ("a film It was\n", "great", ""),
    ("a film It was un", "happy", " indeed"),
    ("a film It was (", "gloomy", ")"),
    ("a film: ", SMILE, ""),
    (f"{SMILE} is ", f"{SMILE}{SMILE}", "!"),
    ("la caf", "\u00e9", " noir"),
]


@pytest.mark.parametrize("name", [f for f in FAMILIES if f != "wordpiece"])
@pytest.mark.parametrize(("prompt", "option", "suffix"), CASES)
def test_a_token_with_a_character_of_the_option_is_the_options(name, prompt, option, suffix):
    tokenizer = family(name)
    full = [i for i in tokenizer(prompt + option + suffix).input_ids if i != tokenizer.eos_token_id]
    if tokenizer.unk_token_id in full:
        pytest.skip("a letter that was never seen")
    ends, parts = [], pieces(tokenizer, full)
    behind = len(b"".join(parts)) - len((option + suffix).encode())  # a blank may stand before everything
    for part in parts:
        ends.append((ends[-1] if ends else 0) + len(part))
    first = next(i for i, end in enumerate(ends) if end > behind)
    asked = Question(prompt, (option, option + "x"), 0, "row 1", suffix)
    (example,) = Encoder(tokenizer, "causal", 128)([asked])
    choice = example.choices[0]
    assert list(choice.ids) == full[:-1] and list(choice.targets) == full[first:]
    assert list(choice.positions) == list(range(first - 1, len(full) - 1))
    assert b"".join(parts[first:]).decode(errors="ignore").endswith(option + suffix)


def test_word_pieces_begin_with_words():
    tokenizer = family("wordpiece")
    for prompt, option, words in (
        ("a film It was ", "great", ["great"]),
        ("a film It was", " great", ["great"]),
        ("a film It was ", "Great terrible", ["great", "terrible"]),
    ):
        (example,) = Encoder(tokenizer, "causal", 128)([Question(prompt, (option, option + "x"), 0, "row 1")])
        assert tokenizer.convert_ids_to_tokens(example.choices[0].targets) == words
    whole = tokenizer.convert_ids_to_tokens(tokenizer("it was unhappy").input_ids)
    (example,) = Encoder(tokenizer, "causal", 128)([Question("it was un", ("happy", "happily"), 0, "row 1")])
    assert whole[-2 - len(example.choices[0].targets) + 1 : -1] == tokenizer.convert_ids_to_tokens(
        example.choices[0].targets
    )


@pytest.mark.parametrize("name", [*FAMILIES, *tiny.ARCHITECTURES])
@pytest.mark.parametrize("task", ["sst2", "copa", "winogrande"])
def test_the_benchmarks_tokens_are_as_they_were(task, name):
    """Their options begin with a blank: counting tokens, as the benchmark does, finds the same place."""
    tokenizer = tiny.tokenizer_of(name) if name in tiny.ARCHITECTURES else family(name)
    kind = {"sst2": SST2, "copa": COPA, "winogrande": WinoGrande}[task]()
    rows = [
        Row({k: str(v).strip() for k, v in row.items()}, f"row {i}")
        for i, row in enumerate(synthetic.ROWS[task](20, 3))
    ]
    closing = {tokenizer.eos_token_id, tokenizer.sep_token_id}
    for asked in (kind.question(row, masked=False) for row in rows):
        (example,) = Encoder(tokenizer, "causal", 128)([asked])
        for choice, option in zip(example.choices, asked.options, strict=True):
            prompt, full = (
                ids[:-1] if ids[-1] in closing else ids
                for ids in (tokenizer(t).input_ids for t in (asked.prompt, asked.prompt + option + asked.suffix))
            )
            assert list(choice.ids) == full[:-1] and list(choice.targets) == full[len(prompt) :]
            assert list(choice.positions) == list(range(len(prompt) - 1, len(full) - 1))
    if tokenizer.mask_token_id is None:
        return
    for asked in (kind.question(row, masked=True) for row in rows):
        (example,) = Encoder(tokenizer, "masked", 128)([asked])
        for choice, option in zip(example.choices, asked.options, strict=True):
            assert list(choice.targets) == tokenizer(option, add_special_tokens=False).input_ids


def test_a_masked_lm_is_asked_for_the_token_that_takes_the_prompts_blank():
    for name in ("byte", "metaspace", "llama", "wordpiece"):
        encode = Encoder(family(name), "masked", 128)
        one, other = (
            encode([Question(prompt, options, 0, "row 1", " .")])[0]
            for prompt, options in (("It was", (" great", " terrible")), ("It was ", ("great", "terrible")))
        )
        assert [c.targets for c in one.choices] == [c.targets for c in other.choices]
    (example,) = Encoder(family("metaspace"), "masked", 128)([Question("It was (", ("great", "film"), 0, "row 1")])
    assert "▁great" not in family("metaspace").convert_ids_to_tokens(example.choices[0].targets)


class Slow:
    """A tokenizer that does not say where its tokens stand."""

    is_fast = False

    def __init__(self, fast):
        self.fast = fast

    def __getattr__(self, name):
        return getattr(self.fast, name)

    def __call__(self, text, add_special_tokens=True):
        return self.fast(text, add_special_tokens=add_special_tokens)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_slow_tokenizer_is_right_or_refused(name):
    said = []
    for prompt, option, suffix in CASES:
        asked = Question(prompt, (option, option + "x"), 0, "row 1", suffix)
        if family(name).unk_token_id in family(name)(prompt + option).input_ids:
            continue
        try:
            found = Encoder(Slow(family(name)), "causal", 128)([asked])
        except ValueError as error:
            said.append(str(error))
            assert "row 1: a Slow joins the prompt's end" in said[-1] and "use a fast tokenizer" in said[-1]
            continue
        assert found == Encoder(family(name), "causal", 128)([asked])
    assert len(said) < 4


# -- cuts --------------------------------------------------------------------------------------------------------------


TEXTS = [
    SMILE * 12,
    "x" + SMILE * 12,
    "a film " * 24,
    ACCENT * 20,
    FAMILY * 4,
    "e" + "\u0301" * 99,
    "\u4e2d\u6587" * 12,
    " \u00a0 " * 9,
]


@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize("name", ["byte", "byte trimmed", "metaspace", "llama", "wordpiece"])
def test_a_cut_falls_between_characters(name, slow):
    tokenizer = family(name)
    encode = Encoder(Slow(tokenizer) if slow else tokenizer, "causal", 400, max_length=40)
    task = TextClassification("It was: {text}\nIt was", ("0", "1"), (" terrible", " great"))
    for text in TEXTS:
        asked = task.question(Row({"text": text, "label": "1"}, "row 1"), masked=False)
        (example,) = encode([asked])
        assert example.length <= 40
        said = tokenizer.decode(example.choices[1].ids).removeprefix("<s>").lstrip(" ")
        assert "\ufffd" not in said
        if tokenizer.unk_token_id in example.choices[1].ids or name == "wordpiece":
            continue
        left = said.removeprefix("It was: ").split("\nIt")[0]
        assert text.startswith(left) and left, (text, left)
        rest = text[len(left) :]
        assert (
            left == "e" + "\u0301" * (len(left) - 1)
            or not rest
            or (unicodedata.category(rest[0])[0] != "M" and "\u200d" not in (rest[0], left[-1]))
        )
        if not slow and text == "a film " * 24:  # no more is lost than must be
            assert example.length > 37


def test_a_cut_keeps_what_was_written():
    """Decoding tokens would have made other words: a WordPiece tokenizer parts marks from words."""
    tokenizer = family("wordpiece")
    asked = TextClassification("{text} It was", ("0", "1"), (" terrible", " great")).question(
        Row({"text": "Ann's film isn't great, it's " + "music " * 40, "label": "1"}, "row 1"), masked=False
    )
    (example,) = Encoder(tokenizer, "causal", 128, max_length=40)([asked])
    whole = tokenizer(asked.prompt).input_ids
    assert example.length == 40 and list(example.choices[0].ids[:30]) == whole[:30]


def test_a_text_that_stands_twice_is_cut_in_both_places():
    tokenizer = family("byte")
    task = TextClassification("film: {text}. Again: {text}. It was", ("0", "1"), (" terrible", " great"))
    asked = task.question(Row({"text": "film music and story " * 9, "label": "1"}, "row 1"), masked=False)
    (example,) = Encoder(tokenizer, "causal", 400, max_length=60)([asked])
    said = tokenizer.decode(example.choices[0].ids, skip_special_tokens=True)
    one, other = said.removeprefix("film: ").removesuffix(". It was").split(". Again: ")
    assert one == other and asked.text.startswith(one) and 50 < example.length <= 60
    masked = TextClassification("It was {mask} : {text}", ("0", "1"), (" terrible", " great"))
    asked = masked.question(Row({"text": "film music and story " * 9, "label": "1"}, "row 1"), masked=True)
    (example,) = Encoder(tokenizer, "masked", 400, max_length=30)([asked])
    assert 20 < example.length <= 30


def test_a_cut_takes_from_the_text_and_not_from_a_word_of_the_template():
    tokenizer = family("byte")
    asked = TextClassification("a film: {text}!", ("0", "1"), (" terrible", " great")).question(
        Row({"text": "film music", "label": "1"}, "row 1"), masked=False
    )
    whole = len(tokenizer(asked.prompt).input_ids)
    with pytest.raises(ValueError, match=r"row 1: the prompt has .* is too short for the rest of the prompt"):
        Encoder(tokenizer, "causal", 400, max_length=whole - 4)([asked])
    (example,) = Encoder(tokenizer, "causal", 400, max_length=whole - 1)([asked])
    said = tokenizer.decode(example.choices[0].ids, skip_special_tokens=True)
    assert said.startswith("a film: ") and said.endswith("!")


def test_choices_are_never_cut():
    task = MultipleChoice("{text} Answer:", ("a", "b"))
    fields = {"text": "film " * 30, "choice 0": "music " * 9, "choice 1": "story " * 9, "label": "0"}
    (example,) = Encoder(family("byte"), "causal", 400, max_length=80)([task.question(Row(fields, "row 1"), False)])
    assert family("byte").decode(example.choices[0].targets) == " " + "music " * 9
