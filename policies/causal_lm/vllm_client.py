"""Generation by vLLM in a process, and usually in a virtual environment, of its own, since it pins other packages.

The weights go there as a safetensors file whenever they have changed; nothing else of the engine is known there.
"""

from __future__ import annotations

import atexit
import json
import select
import subprocess
import tempfile
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor

from embodied_rl.errors import CapabilityError, MissingExtraError, NotFoundError
from embodied_rl.policies.causal_lm.config import Vllm
from embodied_rl.policies.causal_lm.decode import Written
from embodied_rl.policies.causal_lm.generator import Request, Speaker, in_batches
from embodied_rl.types import PAD

OLDEST = (0, 32)
"""First version of vLLM that this was tried with."""


MEMORY = (
    "lower policy.generator.options.gpu_memory_utilization (on a CPU the environment variable VLLM_CPU_KVCACHE_SPACE, "
    "in GiB), or the env's max_context or length"
)
"""What to do where vLLM has not enough memory."""


class VllmGenerator:
    """A vLLM engine with a copy of the policy's weights; started when it is first asked."""

    def __init__(self, config: Vllm, model: Path, *, dtype: str, longest: int, texts: bool = False) -> None:
        """Remember what to start.

        Args:
            config: The recipe's generator section.
            model: The model's folder.
            dtype: "float32" or "bfloat16".
            longest: Tokens of the longest conversation.
            texts: It will be asked to stop at texts, for which it needs the tokenizer.

        Raises:
            NotFoundError: There is no such interpreter.
        """
        self.config, self.model, self.dtype, self.longest, self.texts = config, model, dtype, longest, texts
        python = Path(config.python).expanduser()
        if not python.is_file():
            raise NotFoundError(
                f"policy.generator.python '{config.python}': no such file; give the Python of an environment that has "
                "vLLM (python -m venv vllm && vllm/bin/pip install vllm), or set policy.generator.kind: builtin"
            )
        self.process: subprocess.Popen[str] | None = None
        self._mark: Tensor | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> VllmGenerator:
        """A copy has a process of its own, if it is ever asked to write."""
        return VllmGenerator(self.config, self.model, dtype=self.dtype, longest=self.longest, texts=self.texts)

    def _ask(self, do: str, **request: Any) -> dict[str, Any]:
        assert self.process is not None and self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps({"do": do, **request}) + "\n")
            self.process.stdin.flush()
            # One answer per request, so nothing waits in the buffer that `select` does not see.
            if not select.select([self.process.stdout], [], [], self.config.seconds)[0]:
                self.process.kill()
                raise CapabilityError(
                    f"vLLM did not answer within {self.config.seconds:g} s when asked for '{do}' "
                    f"(policy.generator.seconds), and was ended; {self._last_words()}"
                )
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = self.process.wait()
            raise CapabilityError(f"vLLM ended with code {code} when asked for '{do}'; {self._last_words()}")
        try:
            return cast(dict[str, Any], json.loads(line))
        except ValueError:
            raise CapabilityError(
                f"policy.generator.python '{self.config.python}' answered '{line.strip()[:60]}' when asked for '{do}', "
                "so it is no Python that has vLLM; give the interpreter of an environment that has it"
            ) from None

    def _last_words(self) -> str:
        assert self._folder is not None
        lines = [x for x in (Path(self._folder.name) / "log").read_text(errors="replace").splitlines() if x.strip()]
        return f"its last line was: {lines[-1].strip()}" if lines else "it said nothing"

    def start(self) -> None:
        """Start the process and let it load the model.

        Raises:
            MissingExtraError: That Python has no vLLM.
            CapabilityError: It cannot be run, is too old, does not answer, or cannot load the model.
        """
        where = f"policy.generator.python '{self.config.python}'"
        self._folder = tempfile.TemporaryDirectory(prefix="vllm_")
        program = [str(Path(self.config.python).expanduser()), str(Path(__file__).with_name("vllm_worker.py"))]
        with (Path(self._folder.name) / "log").open("w") as log:
            try:
                pipe = subprocess.PIPE
                self.process = subprocess.Popen(program, stdin=pipe, stdout=pipe, stderr=log, text=True)
            except OSError as error:
                raise CapabilityError(
                    f"{where} cannot be run ({error.strerror}); give the interpreter of an environment that has vLLM"
                ) from error
        atexit.register(self.close)
        found = self._ask("version")
        if "error" in found:
            raise MissingExtraError(f"{where}: vLLM cannot be imported there ({found['error']}); install it, or set "
                                    "policy.generator.kind: builtin")  # fmt: skip
        version = str(found["version"])
        if tuple(int(x) for x in version.split(".")[:2] if x.isdigit()) < OLDEST:
            oldest = ".".join(map(str, OLDEST))
            raise CapabilityError(f"{where} has vLLM {version}, and {oldest} or newer is needed; upgrade it there")
        ready = self._ask(
            "open", model=str(self.model), dtype=self.dtype, longest=self.longest, rows=self.config.rows,
            texts=self.texts, options=self.config.options,
        )  # fmt: skip
        if "error" in ready:
            advice = f"; {MEMORY}" if ready.get("memory") else ""
            raise CapabilityError(f"vLLM {version} cannot load '{self.model}': {ready['error']}{advice}")

    def sync(self, weights: dict[str, Tensor]) -> None:
        """Send the weights if they are not those that it has.

        Args:
            weights: Names of transformers -> tensors.
        """
        if self.process is None:
            self.start()
        mark = torch.stack([w.detach().double().sum() for w in weights.values()])
        if self._mark is not None and torch.equal(mark, self._mark):
            return
        assert self._folder is not None
        file = Path(self._folder.name) / "weights.safetensors"
        save_file({k: w.detach().to("cpu", getattr(torch, self.dtype)).contiguous() for k, w in weights.items()}, file)
        answer = self._ask("weights", file=str(file))
        file.unlink()
        if answer.get("loaded") != len(weights):
            raise CapabilityError(f"vLLM did not take the weights: {answer.get('error', answer)}")
        self._mark = mark

    def write(self, request: Request, speaker: Speaker) -> Written:
        """See `Generator`; log-probabilities are vLLM's own, and the first number of a row's `uniform` is its seed.

        Raises:
            CapabilityError: Tokens of a reply have temperatures of their own, or vLLM cannot write.
            UserError: It has not enough memory for one reply.
        """
        heat, b = request.temperature.tolist(), len(request.contexts)
        if len(set(heat)) > 1:
            raise CapabilityError("policy.generator.kind vllm has one temperature for all tokens: set it to builtin")
        self.sync(speaker.weights())
        told: dict[str, list[Any]] = {"temperature": [0.0] * b}
        if request.uniform is not None:
            told = {"temperature": heat[:1] * b, "seed": (request.uniform[:, 0] * 2**31).long().tolist()}
            if request.narrow is not None:
                by = request.narrow
                told |= {"top_p": by.top_p.tolist(), "top_k": by.top_k.tolist()}
                told["temperature"] = [heat[0] * x for x in by.temperature.tolist()]
        contexts = [[i for i in row if i != PAD] for row in request.contexts.tolist()]
        sampling = [dict(zip(told, row, strict=True)) for row in zip(*told.values(), strict=True)]

        def some(rows: slice) -> Written:
            answer = self._ask(
                "write", contexts=contexts[rows], sampling=sampling[rows], length=request.length,
                end=request.end.tolist(), stop=request.stop,
            )  # fmt: skip
            if answer.get("memory"):
                raise torch.OutOfMemoryError(answer["error"])
            if "error" in answer:
                raise CapabilityError(f"vLLM could not write: {answer['error']}")
            units = torch.full((len(contexts[rows]), request.length), PAD, dtype=torch.int64)
            logp = torch.zeros(units.shape)
            for i, (ids, values) in enumerate(zip(answer["ids"], answer["logp"], strict=True)):
                units[i, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
                logp[i, : len(ids)] = torch.tensor(values)
            device = request.contexts.device
            return Written(units.to(device), logp.to(device), None)

        return in_batches(some, b, None, setting="policy.generator.rows", advice=MEMORY)

    def close(self) -> None:
        """End the process and remove its folder."""
        if self.process is not None and self.process.poll() is None:
            assert self.process.stdin is not None
            self.process.stdin.close()
            try:
                self.process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                self.process.kill()
        if self._folder is not None:
            self._folder.cleanup()
