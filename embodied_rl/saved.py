"""Saving and restoring what learns: weights, counters, random states, and what the last bits of a result depend on."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from embodied_rl import checkpoint
from embodied_rl.conformance import Side, conform
from embodied_rl.errors import CheckpointError, UserError
from embodied_rl.recipe import Recipe
from embodied_rl.seeding import global_rng_state, set_global_rng_state
from embodied_rl.types import EnvSpec, Policy, State

log = logging.getLogger(__name__)


class Saved:
    """Saving and restoring a session around its own parts."""

    policy: Policy
    device: torch.device
    whole: bool = True
    """False while an iteration changes what is learned: an error there leaves what no checkpoint should hold."""
    _COUNTERS: ClassVar[tuple[str, ...]] = ()

    def common_state(self) -> State:
        """Weights, counters and what the last bits of a result depend on."""
        return {
            "policy": dict(cast(nn.Module, self.policy).state_dict()),
            "meaning": self.meaning().state(),
            "counters": {name: getattr(self, name) for name in self._COUNTERS},
            "rng": global_rng_state(),
            "machine": self._machine(),
        }

    def meaning(self) -> Side:
        """What the policy means by its actions and has seen."""
        raise NotImplementedError

    def _machine(self) -> dict[str, str]:
        return {"device": self.device.type, "torch": str(torch.__version__), "threads": str(torch.get_num_threads())}

    def _restore_parts(self, state: State) -> bool:
        """Restore what `state_dict` adds to `common_state`; False when the run will not continue bit for bit."""
        raise NotImplementedError

    def load_state_dict(self, state: State, where: str) -> bool:
        """Restore `state_dict`.

        Args:
            state: From a checkpoint.
            where: Its path, for messages.

        Returns:
            exact: Whether the run continues bit for bit; where not, the log says why.

        Raises:
            CheckpointError: Weights of another shape, or a state that does not fit this recipe.
        """
        try:
            return self._restore(state, where)
        except UserError as error:
            raise type(error)(str(error) if where in str(error) else f"checkpoint {where}: {error}") from error
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"checkpoint {where} does not fit this run ({type(error).__name__}: {error}); use one that this recipe "
                "wrote with this version, or start the run again under another name"
            ) from error

    def _restore(self, state: State, where: str) -> bool:
        then = Side.restore(f"checkpoint {where}", state.get("meaning"))
        conform(then, self.meaning(), "resume with the version and the simulator that it was begun with")
        load_weights(self.policy, state["policy"], where)
        exact = self._restore_parts(state)
        for name in self._COUNTERS:
            setattr(self, name, state["counters"][name])
        set_global_rng_state(state["rng"])
        before, now = state["machine"], self._machine()
        changed = [f"{name} {before[name]} -> {now[name]}" for name in now if before[name] != now[name]]
        if changed:
            log.warning("not the machine of before (%s): results may differ in the last bits", ", ".join(changed))
        return exact and not changed


def stored_policy(path: str | Path) -> tuple[dict[str, Tensor], Side]:
    """A policy of a run or checkpoint: its weights, and what it means by its actions and has seen.

    Args:
        path: A run folder (its newest checkpoint is taken) or one of its checkpoints.

    Raises:
        UserError: There is no intact checkpoint, or it holds no policy.
    """
    found = checkpoint.resolve(Path(path))
    state = checkpoint.load(found)
    weights = state.get("policy")
    if not isinstance(weights, dict):
        raise CheckpointError(f"checkpoint {found} holds no policy; use one that `embodied-rl train` wrote")
    return cast(dict[str, Tensor], weights), Side.restore(f"checkpoint {path}", state.get("meaning"))


def start_policy(policy: Policy, env: EnvSpec, recipe: Recipe, *, fresh_critic: bool = False) -> tuple[str, ...]:
    """Begin with the policy of `start_from`, if it means the same as the env.

    Args:
        policy: Receives the weights.
        env: It is going to act in.
        recipe: Says where from, and what may differ.
        fresh_critic: See `load_weights`.

    Returns:
        report: See `conform`; empty without `start_from`.

    Raises:
        UserError: See `stored_policy`, `conform` and `load_weights`.
    """
    if not recipe.start_from:
        return ()
    weights, then = stored_policy(recipe.start_from)
    advice = "set env as it was there, or name in start_despite what training is to get over"
    report = conform(then, Side.of("the env", env), advice, despite=recipe.start_despite)
    load_weights(policy, weights, recipe.start_from, fresh_critic=fresh_critic)
    return report


def load_weights(policy: Policy, weights: dict[str, Tensor], where: str, *, fresh_critic: bool = False) -> None:
    """Copy weights into a policy after comparing names and shapes.

    Args:
        policy: Receives them.
        weights: Name -> tensor.
        where: They come from, for messages.
        fresh_critic: A critic that they do not have keeps its first weights, which is said: a policy that has only
            imitated knows no rewards.

    Raises:
        CheckpointError: Names what is missing, left over or of another shape.
    """
    module = cast(nn.Module, policy)
    own = module.state_dict()
    missing = [n for n in own if n not in weights]
    if fresh_critic and missing and all(n.startswith("critic") for n in missing):
        if not any(n.startswith("critic") for n in weights):
            log.info("%s has no critic: a new one begins", where)
            weights = weights | {n: own[n] for n in missing}
            missing = []
    problems = [f"{n} is missing" for n in missing]
    problems += [f"{n} is not part of this policy" for n in weights if n not in own]
    problems += [
        f"{n} is {list(weights[n].shape)}, the policy has {list(x.shape)}"
        for n, x in own.items()
        if n in weights and weights[n].shape != x.shape
    ]
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise CheckpointError(
            f"checkpoint {where} holds another policy: {'; '.join(problems[:4])}{more}. Use the recipe it was trained "
            "with (recipe.yaml in its run folder)"
        )
    module.load_state_dict(weights)
