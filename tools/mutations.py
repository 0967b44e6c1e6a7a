"""Break the mathematics on purpose, one place at a time, and see that the tests notice:
`python tools/mutations.py [WORD ...]`.

Each mutation changes one line of a copy of the package and runs the tests of the objectives, the loop and the
schedule on it. Exits with 1 where a mutation survives. WORDs choose mutations by their description.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = ("test_objectives.py", "test_diffusion.py", "test_finetune.py")
MUTATIONS = [  # what is broken, file, line part, what it becomes
    (
        "sign of the penalty: DLPO, direct part",
        "objectives/dlpo.py",
        "self.beta * replay.denoising.mean()",
        "-self.beta * replay.denoising.mean()",
    ),
    (
        "sign of the penalty inside the reward",
        "objectives/base.py",
        "-beta * replay.in_reward_penalty",
        "beta * replay.in_reward_penalty",
    ),
    (
        "sign of the penalty: DPOK",
        "objectives/dpok.py",
        "self.beta * replay.kl.mean()",
        "-self.beta * replay.kl.mean()",
    ),
    (
        "sign of the reward",
        "objectives/base.py",
        "Loss(-(pull * factor).mean()",
        "Loss((pull * factor).mean()",
    ),
    (
        "exp in the ratio",
        "objectives/base.py",
        "(log_prob - old_log_prob.detach()).exp()",
        "1 + (log_prob - old_log_prob.detach())",
    ),
    (
        "ratio without exp or one",
        "objectives/base.py",
        "(log_prob - old_log_prob.detach()).exp()",
        "(log_prob - old_log_prob.detach())",
    ),
    ("detach of the action", "diffusion.py", "x_prev.detach().double()", "x_prev.double()"),
    (
        "max in PPO",
        "objectives/base.py",
        "torch.maximum(-weight * ratio, -weight * edge) > -weight * ratio",
        "torch.minimum(-weight * ratio, -weight * edge) < -weight * ratio",
    ),
    (
        "mask in the mean: numerator",
        "diffusion.py",
        "torch.where(mask, values, 0).flatten(1).sum(1)",
        "values.flatten(1).sum(1)",
    ),
    (
        "mask in the mean: length",
        "diffusion.py",
        "total / mask.flatten(1).sum(1).clamp(min=1)",
        "total / mask.flatten(1).shape[1]",
    ),
    ("kappa_t in the KL", "objectives/base.py", 'if form == "exact":', 'if form == "never":'),
    ("sigma in the KL", "diffusion.py", "((mu - mu_ref) / sigma).square() / 2", "(mu - mu_ref).square() / 2"),
    ("reference frozen", "finetune.py", "copy.deepcopy(model).requires_grad_(False)", "model"),
    (
        "penalty of the wrong group",
        "finetune.py",
        "None if batch.penalty is None else batch.penalty[t.rows]",
        "None if batch.penalty is None else batch.penalty.flip(0)[t.rows]",
    ),
    (
        "advantage of the wrong rows",
        "finetune.py",
        "        batch.advantages[t.rows],\n",
        "        batch.advantages.flip(0)[t.rows],\n",
    ),
    (
        "weight of a micro-batch",
        "finetune.py",
        "c.rollout_steps) * len(t.x_0) / c.batch_size",
        "c.rollout_steps) / c.batch_size",
    ),
    ("log-ratio as a mean", "reference.py", 't.x_0_lengths if t.reduction == "mean" else 1', "1"),
    (
        "fresh action",
        "mdp.py",
        "t.x_prev[s], conditioning",
        "t.x_prev[s] + 0.1 * torch.randn_like(t.x_prev[s]), conditioning",
    ),
    ("weight of a random subset", "mdp.py", "(num_steps - 1) / int(count)", "1 / int(count)"),
    (
        "own sample in leave-one-out",
        "objectives/base.py",
        "centre(r, group_size) * n / (n - 1)",
        "centre(r, group_size)",
    ),
    (
        "reward in released",
        "objectives/released.py",
        "return rewards.new_zeros(len(rewards))",
        "return rewards",
    ),
    (
        "RWR ignores its weights",
        "objectives/rwr.py",
        "policy=(replay.advantage * replay.denoising).mean()",
        "policy=replay.denoising.mean()",
    ),
    (
        "NFT bends like AWM",
        "objectives/awm.py",
        "return replay.denoising - replay.denoising_shift",
        "return replay.denoising",
    ),
    (
        "sign of the reward's gradient",
        "objectives/draft.py",
        "Loss(-self.alpha",
        "Loss(self.alpha",
    ),
    (
        "other noise in the last steps",
        "mdp.py",
        "step_noise, t.key, t.indices",
        "step_noise, (*t.key, 0), t.indices",
    ),
    (
        "a state that the gradient does not pass",
        "mdp.py",
        "action = spread(schedule.mean(eps, x, t)",
        "action = spread(schedule.mean(eps, x.detach(), t)",
    ),
    (
        "the shift from the policy itself",
        "finetune.py",
        "return tuner.reference, partial(",
        "return tuner.model, partial(",
    ),
    (
        "the best of the batch for the best of its text",
        "objectives/rwr.py",
        "fitted.group_size = loop.group_size",
        "fitted.group_size = loop.batch_size",
    ),
    (
        "the reference's log-probability is the policy's",
        "reference.py",
        "return replay(tuner.reference, tuner",
        "return replay(tuner.model, tuner",
    ),
    ("groups that are not texts", "finetune.py", "// c.group_size\n", "% c.group_size\n"),
]


def survives(what, file, old, new):
    """Whether the tests pass with the mutation; the line of the first failure where they do not."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        shutil.copytree(ROOT / "dlpo_nb", copy / "dlpo_nb", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copytree(ROOT / "tests", copy / "tests", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "CONTRIBUTING.md", copy)  # its examples are run
        path = copy / "dlpo_nb" / file
        source = path.read_text(encoding="utf-8")
        if old not in source:
            sys.exit(f"{what}: '{old}' is not in dlpo_nb/{file} any more; bring the mutation up to date")
        path.write_text(source.replace(old, new), encoding="utf-8")
        tests = [str(copy / "tests" / name) for name in TESTS]
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "pytest",
                "-x",
                "-q",
                "-p",
                "no:cacheprovider",
                "--rootdir",
                folder,
                *tests,
            ],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": folder},
            capture_output=True,
            text=True,
        )
    failures = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return done.returncode == 0, (failures or [done.stdout[-200:]])[0]


def main():
    chosen = [m for m in MUTATIONS if not sys.argv[1:] or any(word in m[0] for word in sys.argv[1:])]
    passes, failure = survives("nothing", "__init__.py", "", "")
    if not passes:
        sys.exit(f"the tests fail without a mutation, so they show nothing: {failure}")
    left = 0
    for mutation in chosen:
        alive, failure = survives(*mutation)
        left += alive
        print(
            f"{'SURVIVES' if alive else 'noticed ':8s}  {mutation[0]}"
            + ("" if alive else f"   by {failure.split('::')[-1][:80]}"),
            flush=True,
        )
    print(f"{len(chosen) - left} of {len(chosen)} mutations noticed")
    sys.exit(bool(left))


if __name__ == "__main__":
    main()
