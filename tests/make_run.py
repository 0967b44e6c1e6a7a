"""A made-up run directory, for the tests of the report and its notebook:
every number and sound in it is invented."""

from pathlib import Path

import numpy as np
import torch

from dlpo_nb.audio import write_audio
from dlpo_nb.core import RunDir
from dlpo_nb.heldout import compare, write_rows

TEXTS = [
    "The kettle is on.",
    "Six grey geese crossed the road & stopped.",
    "Rain, <at last>.",
    "Nobody had seen the blue door before.",
]


def hum(seed, noise, seconds=0.7, rate=22050):
    "A vowel-like hum (N,) with a falling pitch and white noise of the given amplitude."
    draw = np.random.default_rng(seed)
    time = np.arange(int(seconds * rate)) / rate
    phase = 2 * np.pi * np.cumsum(180 - 50 * time / seconds + 10 * np.sin(9 * time)) / rate
    voice = sum(np.sin(k * phase) / k ** (1 + 0.2 * draw.random()) for k in range(1, 25))
    envelope = np.clip(np.sin(2 * np.pi * time / seconds * 2.5), 0, 1) ** 0.5
    return torch.tensor(0.15 * envelope * voice + noise * draw.normal(size=len(time)), dtype=torch.float32)


def invented_rows(texts, effect, seed):
    "Rows of base and tuned model: scores of a reward that moves by `effect`, and of a judge that does not."
    draw, base, tuned = np.random.default_rng(seed), [], []
    for text in texts:
        easy, level = np.random.default_rng(sum(map(ord, text))).normal(0, 0.15, 2)
        row = dict(
            text=text,
            seconds=1.4 + level,
            rms_db=-22 + level,
            noise_floor_db=-58 + easy,
            clipped_share=0.0,
            dnsmos=2.9 + easy,
            nisqa=2.4 + 2 * easy,
        )
        base.append(row)
        tuned.append(
            dict(
                row,
                noise_floor_db=row["noise_floor_db"] - 40 * effect + draw.normal(0, 0.4),
                rms_db=row["rms_db"] + draw.normal(0, 0.1),
                dnsmos=row["dnsmos"] + effect + draw.normal(0, 0.08),
                nisqa=row["nisqa"] + draw.normal(0, 0.2),
            )
        )
    return base, tuned


def invented_metrics(episode, effect, episodes, draw):
    "One line of metrics.jsonl."
    place = episode / max(1, episodes - 1)
    return {
        "episode": episode,
        "reward/mean": 2.9 + 1.2 * effect * place + 0.03 * draw.normal(),
        "reward/std": 0.14 + 0.01 * draw.normal(),
        "loss": 0.002 * draw.normal(),
        "diffusion_loss": 0.21 + 0.004 * draw.normal(),
        "kl": 4e-4 * place**1.5,
        "ratio/mean": 1.0,
        "ratio/clipfrac": 0.3 * place,
        "grad_norm": 0.013 + 0.002 * draw.random(),
        "seconds": 12 + draw.random(),
        "audio_seconds": 38.0,
        "advantage/std": 1.0,
        "x0/clipped": 0.001,
    }


def make_run(
    path,
    method="dlpo",
    control="none",
    seed=0,
    episodes=24,
    effect=0.05,
    heldout=64,
    samples=4,
    finished=True,
):
    "Writes the run to `path`; an unfinished one stops half way, in the middle of a line. Returns the path."
    run, luck = RunDir(path), 2 * seed + (control != "none")  # a run and its control are different runs
    draw = np.random.default_rng(luck)
    chosen = dict(method=method, reward="dnsmos", control=control, seed=seed, episodes=episodes)
    run.write_json("config.json", dict(chosen, preset="tiny", learning_rate=1e-4, batch_size=32))
    run.write_json(
        "environment.json",
        dict(python="3.11", torch="2.13", cpu_count=2, threads=2, gpus=[], git_commit=None),
    )
    for episode in range(episodes if finished else episodes // 2):
        run.append_metrics(invented_metrics(episode, effect, episodes, draw))
    (run.path / "samples" / "texts.txt").write_text(
        "\n".join(TEXTS[i % len(TEXTS)] for i in range(samples)) + "\n", encoding="utf-8"
    )
    for i in range(samples):
        write_audio(run.path / "samples" / f"base_{i:03d}.wav", hum(i, 0.01))
        if finished:
            write_audio(run.path / "samples" / f"tuned_{i:03d}.wav", hum(i, 0.01 * 10 ** (-6 * effect)))
    if not finished:
        with open(run.path / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write('{"episode": 12, "rew')
        return Path(path)
    texts = (TEXTS + [f"Made-up text number {i}." for i in range(heldout)])[:heldout]
    base, tuned = invented_rows(texts, effect, luck)
    write_rows(run.path / "evaluation.csv", {"base": base, "tuned": tuned})
    evaluation = compare(base, tuned) | {"log_mel_distance": dict(mean=0.031, low=0.029, high=0.034)}
    run.write_json("summary.json", dict(chosen, evaluation=evaluation, minutes=6.4, heldout_texts=len(texts)))
    return Path(path)
