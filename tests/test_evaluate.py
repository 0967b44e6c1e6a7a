"""What the evaluation must keep to beyond its notebook: invariance, odd inputs, and the formats on disk."""
from types import SimpleNamespace

import pytest
import torch

from dlpo_nb.audio import log_mel
from dlpo_nb.core import UserError
from dlpo_nb.diffusion import NoiseSchedule
from dlpo_nb.evaluate import (bootstrap_interval, compare, format_table, measure, ordered, read_rows, role, speaker_log_mels,
                              synthesise_all, verdict, write_rows)
from dlpo_nb.text import prompts

TEXTS = ["Good morning.", "The kettle is on.", "Six grey geese crossed the wide road.", "Rain."]


class Toy(torch.nn.Module):
    "A policy that is exact a sample at a time, so that batching must not change a bit; `slow` frames a symbol."
    hop = 300

    def __init__(self, slow=2, gain=0.5):
        super().__init__()
        self.slow, self.gain = slow, torch.nn.Parameter(torch.tensor(gain))

    def condition(self, ids, lengths):
        frames = lengths * self.slow
        return SimpleNamespace(hidden=torch.zeros(len(ids), 1, int(frames.max())), frames=frames)

    def predict_noise(self, x, hidden, level, frames=None):
        assert not self.training and frames is not None
        return self.gain * x * level


@pytest.fixture(scope="module")
def schedule():
    return NoiseSchedule.linear().respaced(4)


def test_batching_changes_nothing(schedule):
    whole = synthesise_all(Toy(), TEXTS, schedule, seed=3)
    for batch_size in (1, 2, 3):
        assert all(map(torch.equal, whole, synthesise_all(Toy(), TEXTS, schedule, seed=3, batch_size=batch_size)))
    assert all(x.min() >= -1 and x.max() <= 1 - 2**-10 and x.dtype == torch.float32 and not x.requires_grad for x in whole)


def test_models_share_their_noise(schedule):
    base, tuned = (synthesise_all(Toy(gain=g), TEXTS, schedule, seed=0) for g in (0.5, 0.5001))
    assert all(0 < (a - b).abs().max() < 0.01 for a, b in zip(base, tuned))
    # a slower model needs more noise a step, so only its start is shared
    slower = synthesise_all(Toy(slow=3), TEXTS, schedule, seed=0)
    assert all(len(b) > len(a) for a, b in zip(base, slower))


def test_mode_is_kept_and_nothing_to_say_is_an_error(schedule):
    for training in (True, False):
        model = Toy().train(training)
        synthesise_all(model, TEXTS[:1], schedule, seed=0)
        assert model.training == training
    assert synthesise_all(Toy(), [], schedule, seed=0) == []
    with pytest.raises(UserError):
        synthesise_all(Toy(), ["Good morning.", "???"], schedule, seed=0)


def judge(audio, lengths, sample_rate, texts):
    "Sum of the samples an utterance really has: padding would show."
    assert sample_rate == 22050 and len(texts) == len(audio) <= 16
    return torch.stack([row[:n].sum() for row, n in zip(audio, lengths)])


def test_measure():
    audio = [torch.full((1000 + 7 * i,), 0.25) for i in range(40)]
    audio[3] = torch.ones(1000)
    rows = measure(audio, [f"text {i}" for i in range(40)], {"judge": judge})
    assert [row["judge"] for row in rows] == [float(x.sum()) for x in audio]
    assert rows[3]["clipped_share"] == 1 and rows[4]["clipped_share"] == 0
    assert rows[0]["seconds"] == 1000 / 22050 and abs(rows[0]["rms_db"] + 12.04) < 0.01
    with pytest.raises(ValueError):
        measure(audio, ["one text"], {})


def test_reference_of_another_length():
    audio = [torch.sin(torch.arange(22050) * 0.1)]
    reference = [log_mel(torch.sin(torch.arange(30000) * 0.1))[0]]
    row = measure(audio, ["a"], {}, reference)[0]
    assert 0 <= row["log_mel_to_reference"] < 0.2  # only the frames at the cut differ


def rows(scores, **more):
    return [dict(text=f"text {i}", seconds=1.0, rms_db=-20.0, noise_floor_db=-60.0, clipped_share=0.0, dnsmos=s, **more) for i, s in enumerate(scores)]


def summary(base, tuned, reward="dnsmos", control="none"):
    return dict(evaluation=compare(base, tuned), method="dlpo", reward=reward, control=control, seed=0, episodes=24, minutes=1.0)


def test_intervals():
    assert bootstrap_interval([2.0]) == (2.0, 2.0, 2.0)
    x = torch.randn(64, generator=torch.Generator().manual_seed(0)).numpy()
    mean, low, high = bootstrap_interval(x)
    assert bootstrap_interval(x) == (mean, low, high) and low < mean < high
    # the normal theory's interval, to 15 %
    assert abs((high - low) / (2 * 1.96 * x.std() / 8) - 1) < 0.15
    assert bootstrap_interval(x, level=0.5)[1] > low
    for wrong in ([], [[1.0, 2.0]]):
        with pytest.raises(UserError):
            bootstrap_interval(wrong)


def test_compare():
    base, tuned = rows([3.0, 3.2, 2.8]), rows([3.1, 3.3, 2.9])
    tuned[0]["seconds"] = 1.3
    result = compare(base, tuned)
    metric = result["metrics"]["dnsmos"]
    assert result["n"] == 3 and abs(metric["difference"] - 0.1) < 1e-9 and abs(metric["low"] - 0.1) < 1e-9
    assert abs(result["duration_ratio"] - 1.1) < 1e-9 and "log_mel_distance" not in result
    # recordings of different lengths are compared on the frames both have
    audio = [torch.randn(5000, generator=torch.Generator().manual_seed(i)) * 0.1 for i in range(3)]
    assert compare(base, tuned, audio, [x[:4000] for x in audio])["log_mel_distance"]["mean"] < 0.1
    for wrong in ([], rows([1.0]), rows([1.0, 2.0, 3.0])[::-1]):
        with pytest.raises(UserError):
            compare(base, wrong)
    with pytest.raises(UserError):
        compare([], [])


def test_verdict():
    base, draw = rows([3.0 + 0.01 * i for i in range(20)]), torch.Generator().manual_seed(0)
    move = lambda by: rows([r["dnsmos"] + by + 0.1 * float(torch.randn(1, generator=draw)) for r in base])
    for by, word in ((0.3, " rose: "), (-0.3, " fell: "), (0.0, " did not clearly change: ")):
        assert word in verdict(summary(base, move(by)))
    assert "not measured" in verdict(summary(base, base, reward="utmos"))


def test_table():
    mixed = "0.8*dnsmos - 0.2*a_judge_with_a_very_long_name_indeed"
    base = rows([3.0, 3.1], **{mixed: 1.0, "nisqa": 2.0, "a_judge_with_a_very_long_name_indeed": 100.0})
    table = format_table(summary(base, base, reward=mixed))
    assert max(map(len, table.splitlines())) <= 100 and "2 held-out texts" in table
    assert "nisqa (not the reward)" in table and "shuffle-advantages" in table
    assert "drift" not in format_table(summary(base, base, reward=mixed, control="shuffle-advantages"))
    assert [role(name, mixed) for name in (mixed, "dnsmos", "nisqa", "mos")] == ["the reward", "part of the reward", "not the reward", "not the reward"]
    assert ordered({"seconds": 0, "nisqa": 0, "dnsmos": 0, mixed: 0}, mixed) == [mixed, "dnsmos", "nisqa", "seconds"]


def test_rows_on_disk(tmp_path):
    base = rows([3.0, 3.1])
    base[0]["text"] = 'He said: "1, 2;\n3", and left.'
    tuned = [dict(row, only_here=1.5) for row in base]
    write_rows(tmp_path / "e.csv", {"base": base, "tuned": tuned})
    assert read_rows(tmp_path / "e.csv") == {"base": base, "tuned": tuned}
    for damage in ("", "system,index,text,dnsmos\nbase,0,Hello,loud\n", "a,b\n1,2\n"):
        (tmp_path / "d.csv").write_text(damage)
        if damage:
            with pytest.raises(UserError, match="d.csv"):
                read_rows(tmp_path / "d.csv")
    with pytest.raises(UserError, match="nothing.csv"):
        read_rows(tmp_path / "nothing.csv")


def test_the_speakers_own_reading():
    texts = prompts("heldout")[:64]
    mels = speaker_log_mels(texts[::-1])
    assert len(mels) == 64 and all(mel.shape[0] == 80 and mel.dtype == torch.float32 and -6 <= mel.min() < mel.max() < 3 for mel in mels)
    assert torch.equal(mels[0], speaker_log_mels(texts)[-1]) and speaker_log_mels(texts + ["Something else."]) is None
