"""The suites of an evaluation: held-out starts, and the same starts in an env with some settings changed.

`evaluate.suites: {training_sentences: {evaluation_sentences: training}}` plays the starts of the suite `heldout` once
more with that setting of `env`. What an env can change so is its own affair (wordings, light, other objects); as the
starts are the same, a difference between two suites is measured in pairs.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from embodied_rl import manifest
from embodied_rl.errors import ConfigError
from embodied_rl.evaluate import Transcriber, evaluate, film
from embodied_rl.recipe import HELDOUT, Recipe
from embodied_rl.results import EvaluationResult
from embodied_rl.schema import suite_env
from embodied_rl.seeding import global_rng_untouched
from embodied_rl.session import build_env
from embodied_rl.types import Env, EnvSpec, Policy
from embodied_rl.video import Clip


class Suite:
    """Evaluation on held-out starts, with an env of its own that is built when first needed."""

    def __init__(self, recipe: Recipe, name: str = HELDOUT, *, copies: int | None = None) -> None:
        """Remember the recipe; build nothing yet.

        Args:
            recipe: The run.
            name: `heldout`, or a key of `evaluate.suites`.
            copies: Of the env; None takes the recipe's evaluate.copies.
        """
        self.name, self.settings, self.seed = name, recipe.evaluate, recipe.seed
        changes = (recipe.evaluate.suites or {}).get(name)
        self.recipe = recipe if changes is None else recipe.model_copy(update={"env": suite_env(recipe.env, changes)})
        self.copies = copies or recipe.evaluate.copies
        self.env: Env | None = None

    def run(
        self, policy: Policy, device: torch.device, episodes: int, *, final: bool = True, greedy: bool | None = None
    ) -> EvaluationResult:
        """Evaluate a policy on `episodes` held-out starts, the same ones every time.

        Args:
            policy: On `device`.
            device: Where the env is built.
            episodes: How many.
            final: The final evaluation has starts of its own: those that chose the best checkpoint would flatter it.
            greedy: None takes the recipe's evaluate.greedy.

        Returns:
            result: One row per episode; of the final evaluation also the first transcripts, where the env gives them.
        """
        mode = self.settings.greedy if greedy is None else greedy
        # Evaluating must not move what training draws from: a generator of its own, and the global ones put back.
        with global_rng_untouched():
            env = self.open(device)
            speaks = final and hasattr(env, "transcript")
            written = Transcriber(self.settings.videos if speaks else 0)
            result = evaluate(
                policy,
                env,
                episodes=episodes,
                run_seed=self.seed,
                stream=0 if final else 1,
                greedy=mode,
                generator=self._generator(mode, device),
                on_frame=written if written.count else None,
            )
        if final and result.manifest is not None:
            manifest.warn_of_departures(result.manifest)
        return replace(result, transcripts=written.texts)

    def film(self, policy: Policy, result: EvaluationResult, numbers: Tensor, folder: Path) -> list[Clip]:
        """Film episodes of a result of this suite (see `embodied_rl.evaluate.film`); none where the env cannot."""
        assert self.env is not None, "run comes first"
        if not (self.env.spec.cameras and self.env.spec.seedable):
            return []
        with global_rng_untouched():
            generator = self._generator(result.greedy, self.env.device)
            return film(policy, self.env, result, numbers, folder=folder, generator=generator)

    def open(self, device: torch.device) -> Env:
        """The env, built when there is none yet."""
        if self.env is None:
            self.env = build_env(self.recipe, num_envs=self.copies, device=device, split="eval")
        return self.env

    def close(self) -> None:
        """Close the env."""
        if self.env is not None:
            self.env.close()
            self.env = None

    def _generator(self, greedy: bool, device: torch.device) -> torch.Generator | None:
        return None if greedy else torch.Generator(device).manual_seed(self.seed)


def suites_of(recipe: Recipe, *, copies: int | None = None) -> list[Suite]:
    """`heldout`, then those of the recipe; nothing is built yet."""
    return [Suite(recipe, name, copies=copies) for name in (HELDOUT, *(recipe.evaluate.suites or {}))]


def evaluation_file(suite: str, *, start: bool = False) -> str:
    """Name of the file with a suite's episodes, of the trained policy or of the one that training starts from.

    Example: evaluation.json, evaluation.training_sentences.json, evaluation_start.json.
    """
    return f"evaluation{'_start' if start else ''}{'' if suite == HELDOUT else f'.{suite}'}.json"


def check_suites(recipe: Recipe, device: torch.device, chunk: int = 1) -> None:
    """Build the env of each suite once, so that one that cannot be played is told before training, not after it.

    Args:
        recipe: The run; nothing is built where it has no suites.
        device: Where it will compute.
        chunk: Control steps of one of the policy's decisions.

    Raises:
        ConfigError: A suite shows, takes or asks for something else than the recipe's env, or its episodes are
            shorter than a decision.
    """
    if not recipe.evaluate.suites:
        return
    specs: dict[str, EnvSpec] = {}
    with global_rng_untouched():
        for suite in suites_of(recipe, copies=1):
            try:
                specs[suite.name] = suite.open(device).spec
            finally:
                suite.close()
    for name, spec in specs.items():
        if spec.max_steps is not None and chunk > spec.max_steps:
            raise ConfigError(
                f"evaluate.suites.{name}: an episode has {spec.max_steps} control steps, and a decision of the policy "
                f"covers {chunk}, so the rest could never be executed: raise its max_steps, or lower the policy's chunk"
            )
        for part in ("observation", "action", "tasks", "has_success"):
            if getattr(spec, part) != getattr(specs[HELDOUT], part):
                raise ConfigError(
                    f"evaluate.suites.{name} changes the env's {part}, so the policy could not play it on the starts "
                    f"of {HELDOUT}; change other settings there, or evaluate it in a recipe of its own"
                )
