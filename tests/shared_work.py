"""What test_distributed runs in one process and, under torchrun, in two:
gradients and updates of every method. python shared_work.py OUT"""

import sys

import torch
from small_gradtts import make_gradtts
from small_policy import TEXTS, TINY, ConvPolicy, gradients_of, make_corpus, make_model, make_tuner, spoken
from toy_mel import make_toy_mel

from dlpo_nb.checkpoints import heldout_reward
from dlpo_nb.diagnostics import drift
from dlpo_nb.distributed import join, leave, rank
from dlpo_nb.heldout import synthesise_all
from dlpo_nb.objectives import OBJECTIVES
from dlpo_nb.rollouts import collect, make_advantages, score_audio
from dlpo_nb.rewards.base import Reward
from dlpo_nb.rewards.formula import CombinedReward

MORE = [*TEXTS, "It is late.", "We walked along the river.", "Yes."]


class Loud(Reward):
    name, min_seconds = "loud", 0.0

    def score_clips(self, clips, sample_rate, texts):
        return [float(clip.abs().mean()) for clip in clips]

    def with_gradient(self, audio, lengths, sample_rate, texts):
        return torch.stack([clip[:n].clamp(-1, 1).abs().mean() for clip, n in zip(audio, lengths.tolist())])


class Long(Reward):
    name, min_seconds = "long", 0.0

    def score_clips(self, clips, sample_rate, texts):
        return [len(clip) / sample_rate for clip in clips]

    def with_gradient(self, audio, lengths, sample_rate, texts):
        return lengths / sample_rate


def reward():
    return CombinedReward(
        {"loud": 1.0, "long": -0.5, "watching": 0.0},
        {"loud": Loud(), "long": Long(), "watching": Long()},
        normalise="z",
        warmup=8,
    )


VOICES = {
    True: ConvPolicy,  # float64
    False: lambda: spoken(make_model(config=TINY)),
    "toy": lambda: make_toy_mel(kind=torch.float64),
    "gradtts": make_gradtts,
}


def tuner_of(method, exact):
    model = VOICES[exact]()
    options = (
        dict(batch_size=6, micro_batch=4, advantage="buffer", buffer_min_count=3, buffer_size=6)
        if method in ("ddpo", "klinr")
        else dict(batch_size=6, micro_batch=4)
    )
    tuner = make_tuner(
        model,
        reward(),
        MORE,
        make_corpus(round(model.sample_rate / model.frame_rate)),
        method=method,
        denoising_steps=2,
        learning_rate=1e-3,
        **options,
    )
    with torch.no_grad():  # off the reference, so that the penalties have gradients
        for p in tuner.parameters:
            p += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(5)).to(p)
    return tuner


def look(method, exact):
    tuner = tuner_of(method, exact)
    trajectories = collect(tuner, 0)
    gradients = gradients_of(
        tuner, trajectories, make_advantages(tuner, score_audio(tuner, trajectories), 0)
    )[0]
    found = {f"gradient/{part}": gradients.part(part) for part in ("policy", "penalty")}
    tuner = tuner_of(method, exact)
    found["log"] = [{k: v for k, v in tuner.episode().items() if "seconds" not in k} for _ in range(3)]
    found["weights"] = torch.cat([p.detach().flatten() for p in tuner.parameters])
    found["heldout"] = heldout_reward(tuner, MORE)
    found["heldout of one"] = heldout_reward(tuner, MORE[:1])  # the second process has none
    return found


if __name__ == "__main__":
    join("cpu")
    found = {(method, exact): look(method, exact) for method in OBJECTIVES.names() for exact in (True, False)}
    # a state that is not a waveform
    for kind, methods in {"toy": ("dlpo", "klinr", "rwr", "awm"), "gradtts": ("dlpo",)}.items():
        found |= {(method, kind): look(method, kind) for method in methods}
    tuner = tuner_of("dlpo", True)
    found["spoken"] = synthesise_all(make_model(), MORE, tuner.schedule, 0, batch_size=2, shared=True)
    found["drift"] = [drift(tuner, MORE[:count]) for count in (3, 1)]  # parts that are unequal, and none
    if rank() == 0:
        torch.save(found, sys.argv[1])
    leave()
