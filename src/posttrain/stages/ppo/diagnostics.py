"""Words for a policy's figures that leave their healthy range, and what to change."""

from __future__ import annotations

from posttrain.config.schema import PpoConfig
from posttrain.evaluation.calibration import SUSPICIOUS

FAR = 20.0  # nats an answer, where the user gave no target


def alarms(found: dict[str, float], first: dict[str, float], cfg: PpoConfig) -> dict[str, str]:
    """Name -> line, of each alarm of a step. found: its figures, `step`, number of `answers`; first: of the first step."""
    limit = 2 * cfg.target_kl if cfg.target_kl else FAR
    far, risen = found["kl"] > limit, found["reward"] - first["reward"]
    fallen = first["gold"] - found["gold"] if "gold" in found else 0.0
    rules = (
        ("kl", far, f"KL {found['kl']:.1f} is above {limit:.1f} nats an answer: raise ppo.kl_coef, or lower optim.lr"),
        (
            "hacking",
            far and risen > first["reward_std"],
            f"reward has risen by {risen:.2f} while KL leaves its range: read the samples for a trick that the reward "
            "falls for; raise ppo.kl_coef, set reward.clip, or compare with reward.gold",
        ),
        (
            "gold",
            risen > 0 and fallen > first.get("gold_std", 0.0) / 2,
            f"reward has risen by {risen:.2f}, the gold check has fallen by {fallen:.2f}: the reward is being gamed; "
            "stop earlier, raise ppo.kl_coef, or train the reward model anew on these answers",
        ),
        (
            "entropy",
            found["entropy"] < 0.1,
            f"entropy is {found['entropy']:.2f} nats a token: answers are nearly all the same; "
            "raise ppo.kl_coef or ppo.entropy_coef",
        ),
        (
            "clip",
            found["clip_fraction"] > 0.3,
            f"{found['clip_fraction']:.0%} of the ratios are clipped: lower optim.lr, or ppo.epochs",
        ),
        (
            "value",
            found["explained_variance"] < -0.5 and found["step"] > 5 and found["reward_std"] > 0,
            f"the value model foretells less than a constant would (explained variance {found['explained_variance']:.2f}): "
            "raise ppo.value_coef or optim.lr, or use ppo.advantage=rloo",
        ),
        (
            "ended",
            found["ended"] < 0.5,
            f"only {found['ended']:.0%} of the answers come to an end: "
            "raise rollout.max_new_tokens, or reward.missing_eos_penalty",
        ),
        (
            "flat",
            found["reward_std"] == 0 or found.get("informative") == 0,
            "all answers to a prompt got the same reward: there is nothing to learn from; change the reward or raise ppo.samples",
        ),
        (
            "unfilled",
            found.get("filled", 1.0) < 1 and found.get("informative") != 0,
            f"{found.get('prompts_drawn', 0):.0f} prompts were drawn, and only {found.get('prompts_kept', 0):.0f} have answers "
            "of different reward, so the step is smaller: give prompts that are neither too easy nor too hard, raise ppo.samples "
            "or ppo.max_draws",
        ),
        (
            "unscored",
            found.get("unscored", 0.0) > 0,
            f"no reward applies to {found.get('unscored', 0.0):.0%} of the answers, which count 0: give a reward for their rows",
        ),
        (
            "length",
            abs(found["length_correlation"]) >= max(SUSPICIOUS, 3 / found["answers"] ** 0.5),  # of few it is chance
            f"reward and length of the answer correlate with r = {found['length_correlation']:+.2f}: "
            "the policy may learn length alone",
        ),
    )
    return {name: line for name, rings, line in rules if rings}
