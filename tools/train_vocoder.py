"""Trains the vocoder of the small voice (notebook 11ea) on a corpus that hibari spoke.

hibari's network ends in what our vocoder has to say: a pitch, a filter of pulses and a free part for each
frame. So it teaches directly. Every utterance but the held-out ones is spoken again (OUT/frames: the 256
numbers from which its last layer makes a frame, and the pitch; 41 KB a second of speech), its sound is made
from that, and the vocoder learns to say of the sound's mel what the teacher said. The last part of the
training also compares the sounds: their mels, and their spectra at three resolutions.

Restartable: --resume goes on from OUT/state.pt. The averaged weights are in OUT/vocos_small.safetensors.

  python tools/train_vocoder.py --corpus data/hibari --out runs/vocoder --minutes 30
"""

import copy
import json
import math
import time
import warnings
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from torch.nn import functional as F
from tqdm import tqdm

from dlpo_nb.audio import SoundWarning
from dlpo_nb.core import RunDir, UserError, plain, read_jsonl, run_main, save_tensors
from dlpo_nb.corpus import load_corpus
from dlpo_nb.hibari import DURATIONS, EARLY, RATE, Voice, join_silences, to_arpabet, with_output
from dlpo_nb.optimisers import ema_decay, update_ema
from dlpo_nb.distributed import write_environment
from dlpo_nb.rewards import get_reward
from dlpo_nb.vocoder import SMALL_MEL, log_mel
from dlpo_nb.vocos import BINS, HOP, VOICED, Filters, Generator, Vocos, sound, spectrum_of_pulses
from dlpo_nb.weights import write_weights

HIDDEN = "/dec_norm/LayerNormalization_output_0"  # what hibari's last layer, a linear one, sees
PARTS = ("lh", "theta", "lr", "phi")  # its names of gain, turn, free, angle; its noise, ln, is left out
QUIET = -5.0  # ln of a magnitude in a spectrum of 1200 points: below it nothing is heard
WEIGHT = dict(gain=1.0, free=1.0, turn=1.0, angle=1.0, raw=0.3, f0=0.05, voiced=0.5)
SIZES = (300, 800, 2048)  # of the windows in which sounds are compared


@dataclass
class Settings:
    corpus: Path  # folder of dlpo_nb.data --voice hibari --sample-rate 24000
    out: Path  # folder of the run
    minutes: float = 30.0  # of this process's own computing
    seed: int = 0
    threads: int = 1
    held_out: int = 64  # first utterances of the corpus, never trained on
    batch_size: int = 16
    frames: int = 96  # of an item of a batch, 12.5 ms each
    lr: float = 1.5e-3
    sounds_from: float = 0.6  # share of the time after which sounds are compared too
    log_every: int = 50
    save_every: int = 500
    score_every: int = 2000  # steps between judgements of held-out copies
    scored: int = 16  # held-out utterances that are judged then; all of them at the end
    resume: bool = False


# --- the teacher


class Teacher(Voice):
    "hibari without its last layer."

    def __init__(self):
        super().__init__()
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        model = with_output(with_output(Path(self.hibari.model_path).read_bytes(), HIDDEN), DURATIONS)
        self.session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def run(self, phonemes, *names):  # -> arrays without the batch axis, frames first
        "Tensors of its graph for one sentence."
        feeds = {"ids": np.array([self.hibari.ids(phonemes)], np.int64), "speed": np.ones(1, np.float32)}
        return [value[0] if value.ndim > 1 else value for value in self.session.run(names, feeds)]

    def frames(self, row):  # -> (T, 256), (T,)
        "Frames of an utterance of the corpus, aligned with its recording, which begins EARLY samples later."
        parts, phones, steps = [], [], []
        for sentence in self.phonemes(row["text"]):
            *part, counts = self.run(sentence, HIDDEN, "f0", DURATIONS)
            names, counts = to_arpabet(sentence, counts.tolist())
            parts.append(part)
            phones += names
            steps += counts
        hidden, pitch = (np.concatenate(part) for part in zip(*parts))
        first = 2 * join_silences(phones, steps)[0][1] - EARLY // HOP
        rows = np.arange(first, first + row["samples"] // HOP).clip(0, len(pitch) - 1)
        return hidden[rows], pitch[rows]

    def last_layer(self, texts):  # -> (257, 4 * BINS)
        "The last layer by least squares: its own weights are 8-bit integers."
        inputs, outputs = [], []
        for text in texts:
            for sentence in self.phonemes(text):
                hidden, *parts = self.run(sentence, HIDDEN, *PARTS)
                inputs.append(hidden)
                outputs.append(np.concatenate(parts).T)
        inputs, outputs = np.concatenate(inputs), np.concatenate(outputs)
        centre, mean = inputs.mean(0), outputs.mean(0)
        # what it sees comes from a layer norm: one direction is constant and must get no weight
        weight = np.linalg.lstsq(inputs - centre, outputs - mean, rcond=1e-3)[0]
        return np.concatenate([weight, [mean - centre @ weight]])


def speak_again(config):
    "Writes what is missing in OUT/frames: hidden.f16, pitch.f32, utterances.jsonl and last_layer.npy."
    folder = config.out / "frames"
    folder.mkdir(parents=True, exist_ok=True)
    rows = read_jsonl(config.corpus / "manifest.jsonl")[config.held_out :]
    done = read_jsonl(folder / "utterances.jsonl") if (folder / "utterances.jsonl").exists() else []
    if len(done) == len(rows):
        return
    teacher, total = Teacher(), sum(row["frames"] for row in done)
    if not done:
        np.save(folder / "last_layer.npy", teacher.last_layer([row["text"] for row in rows[:40]]))
    with (
        open(folder / "hidden.f16", "ab") as hiddens,
        open(folder / "pitch.f32", "ab") as pitches,
        open(folder / "utterances.jsonl", "a") as index,
    ):
        hiddens.truncate(512 * total)  # what was written without its line of the index
        pitches.truncate(4 * total)
        for row in tqdm(rows[len(done) :], unit="utterance", mininterval=2):
            hidden, pitch = teacher.frames(row)
            hiddens.write(hidden.astype(np.float16).tobytes())
            pitches.write(pitch.astype(np.float32).tobytes())
            for file in (hiddens, pitches):
                file.flush()
            index.write(json.dumps(dict(id=row["id"], frames=len(pitch))) + "\n")
            index.flush()


class Speech:
    "Batches of what the teacher says, and the sounds it makes of that."

    def __init__(self, config):
        folder, self.config = config.out / "frames", config
        sizes = [row["frames"] for row in read_jsonl(folder / "utterances.jsonl")]
        ends = np.cumsum(sizes)
        self.starts = [(end - n, n) for end, n in zip(ends, sizes) if n >= config.frames]
        self.hidden = np.memmap(folder / "hidden.f16", np.float16, "r").reshape(-1, 256)
        self.pitch = np.memmap(folder / "pitch.f32", np.float32, "r")
        layer = torch.from_numpy(np.load(folder / "last_layer.npy")).float()
        self.weight, self.bias = layer[:-1].bfloat16(), layer[-1]
        self.mean = torch.from_numpy(self.hidden[:10000].astype(np.float32).mean(0)) @ layer[:-1] + self.bias

    def batch(self, step):  # -> Filters, source (B, T, BINS) complex, sound (B, N), mel (B, bands, T)
        "Random pieces at random levels, up to 4.3 dB softer or louder."
        config = self.config
        draw = np.random.default_rng((config.seed, step))
        places = [self.starts[i] for i in draw.integers(len(self.starts), size=config.batch_size)]
        firsts = [first + draw.integers(n - config.frames + 1) for first, n in places]
        cut = lambda table: torch.from_numpy(np.stack([table[i : i + config.frames] for i in firsts]))
        parts = ((cut(self.hidden).bfloat16() @ self.weight).float() + self.bias).split(BINS, -1)
        level = torch.from_numpy(draw.uniform(-0.5, 0.5, (config.batch_size, 1, 1))).float()
        filters = Filters(parts[0] + level, parts[1], parts[2] + level, parts[3], cut(self.pitch))
        source = spectrum_of_pulses(filters.f0)
        audio = sound(filters, source)
        return filters, source, audio, log_mel(audio, SMALL_MEL)


# --- the losses


def mean_by(values, weight):
    return (values * weight).sum() / weight.sum()


def loudness_error(said, told):  # logarithms of magnitudes; how far below what is heard does not count
    return torch.where(told > QUIET, (said - told).abs(), (said - QUIET).clamp(min=0))


def filter_losses(heads, told):
    "Distances of what the network says to what the teacher said; angles count as much as they are heard."
    gain, turn, free, angle, pitch, voiced = heads
    on = (told.f0 > VOICED).float()
    loud = (told.gain.clamp(QUIET, 3) - QUIET) * on[..., None]
    loud_free = told.free.clamp(QUIET, 3) - QUIET
    turned = math.pi * (turn.tanh() - told.turn.tanh())
    return dict(
        gain=mean_by(loudness_error(gain, told.gain).mean(-1), on),
        free=loudness_error(free, told.free).mean(),
        turn=mean_by(1 - turned.cos(), loud),
        angle=mean_by(1 - (angle - told.angle).cos(), loud_free),
        raw=mean_by(F.smooth_l1_loss(angle, told.angle, reduction="none"), loud_free)
        + mean_by(F.smooth_l1_loss(turn, told.turn, reduction="none"), loud),
        f0=mean_by((pitch - told.f0).abs(), on),
        voiced=F.binary_cross_entropy_with_logits(voiced, on),
    )


def log_magnitude(audio, size):
    window = torch.hann_window(size)
    spectrum = torch.stft(audio, size, size // 4, window=window, center=False, return_complex=True)
    return (spectrum.abs() + 1e-3 * size / 4).log()


def sound_losses(said, told, mel):
    "Distances of the log-mels and of log-magnitudes at three resolutions."
    losses = dict(mel=(log_mel(said, SMALL_MEL) - mel).abs().mean())
    for size in SIZES:
        losses[f"spectrum_{size}"] = (log_magnitude(said, size) - log_magnitude(told, size)).abs().mean()
    return losses


# --- the training


class Training:
    "What changes while the vocoder learns."

    def __init__(self, config):
        torch.set_num_threads(config.threads)
        torch.manual_seed(config.seed)
        self.config, self.step, self.seconds = config, 0, 0.0
        self.folder, self.speech = RunDir(config.out), Speech(config)
        self.network = Generator()
        with torch.no_grad():
            self.network.head.bias[: 4 * BINS] = self.speech.mean
            self.network.head.weight *= 0.3
        self.ema = copy.deepcopy(self.network)
        self.optimiser = torch.optim.AdamW(self.network.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
        self.held_out = load_corpus(config.corpus, RATE)[: config.held_out].items
        if (config.out / "state.pt").exists():
            self.restore()

    @property
    def progress(self):
        return min(1.0, self.seconds / (60 * self.config.minutes))

    def state(self):
        modules = dict(network=self.network, ema=self.ema, optimiser=self.optimiser)
        return dict(step=self.step, seconds=self.seconds) | {k: m.state_dict() for k, m in modules.items()}

    def restore(self):
        state = torch.load(self.config.out / "state.pt", weights_only=True)
        self.step, self.seconds = state["step"], state["seconds"]
        for name in ("network", "ema", "optimiser"):
            getattr(self, name).load_state_dict(state[name])

    def save(self):
        save_tensors(self.state(), self.config.out / "state.pt")
        sizes = dict(bands=SMALL_MEL.bands, channels=192, dilations=[1, 2, 3, 1])
        made = dict(step=self.step, minutes=round(self.seconds / 60, 2))
        path = self.config.out / "vocos_small.safetensors"
        write_weights(path, self.ema.state_dict(), dict(vocos=sizes, training=made), half=True)

    def update(self):
        "One step; returns its losses by name."
        config, progress = self.config, self.progress
        warm, end = min(1.0, (self.step + 1) / 100), 0.03
        for group in self.optimiser.param_groups:
            group["lr"] = config.lr * warm * (end + (1 - end) * (1 + math.cos(math.pi * progress)) / 2)
        with torch.no_grad():
            told, source, audio, mel = self.speech.batch(self.step)
        with torch.autocast("cpu", torch.bfloat16):
            heads = self.network.heads(mel)
        losses = filter_losses(heads, told)
        total = sum(WEIGHT[name] * value for name, value in losses.items())
        if progress >= config.sounds_from:
            some = slice(config.batch_size // 2)
            said = sound(Filters(*(head[some] for head in heads[:4]), told.f0[some]), source[some])
            losses |= (compared := sound_losses(said, audio[some], mel[some]))
            total = total + 0.25 * sum(compared.values())
        self.optimiser.zero_grad()
        total.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), 5.0)
        if not norm.isfinite():
            raise UserError(f"step {self.step}: the gradient is not finite; --resume with a smaller --lr")
        self.optimiser.step()
        self.step += 1
        update_ema(self.ema, self.network, ema_decay(self.step))
        return {name: value.item() for name, value in losses.items()}

    @torch.no_grad()
    def judge(self, count):
        "Mean scores of held-out recordings that went through the averaged network."
        self.save()
        recordings = [torch.from_numpy(i.audio.astype(np.float32) / 32767) for i in self.held_out[:count]]
        clips = Vocos(weights=self.config.out / "vocos_small.safetensors").copy(recordings)
        pairs = [[log_mel(one[None], SMALL_MEL) for one in pair] for pair in zip(clips, recordings)]
        distances = [(copy - mel).abs().mean().item() for copy, mel in pairs]
        lengths = torch.tensor([len(clip) for clip in clips])
        heard = torch.nn.utils.rnn.pad_sequence(clips, batch_first=True), lengths, RATE
        texts = [item.text for item in self.held_out[:count]]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SoundWarning)
            scores = {
                name: get_reward(name)(*heard, texts).mean().item() for name in ("distillmos", "dnsmos")
            }
        return dict(utterances=count, mel_distance=float(np.mean(distances))) | scores


def train(run):
    config, sums, began = run.config, defaultdict(list), time.process_time() - run.seconds
    bar = tqdm(initial=run.step, unit="step", mininterval=2)
    while run.progress < 1:
        for name, value in run.update().items():
            sums[name].append(value)
        run.seconds = time.process_time() - began
        bar.update()
        ended = run.progress >= 1
        if run.step % config.log_every == 0 or ended:
            row = dict(step=run.step, minutes=run.seconds / 60)
            row |= {name: float(np.mean(values)) for name, values in sums.items()}
            if run.step % config.score_every == 0 or ended:
                row["held_out"] = run.judge(len(run.held_out) if ended else config.scored)
                began = time.process_time() - run.seconds  # judging is no training
                bar.write(f"step {run.step}: {row['held_out']}")
            run.folder.append_metrics(row)
            bar.set_postfix(angle=row["angle"], minutes=round(row["minutes"], 1))
            sums.clear()
        if run.step % config.save_every == 0 or ended:
            run.save()
    bar.close()


def main():
    config = tyro.cli(Settings, description=__doc__)
    if (config.out / "state.pt").exists() and not config.resume:
        raise UserError(f"{config.out} holds a run; add --resume to go on with it, or give another --out")
    speak_again(config)
    run = Training(config)
    run.folder.trim_metrics(run.step + 1, "step")
    write_environment(run.folder, run.step == 0, step=run.step)
    run.folder.write_json("config.json", plain(config))
    train(run)


if __name__ == "__main__":
    run_main(main)
