"""Steered checkpoints by copying files, beside `cp` and beside loading and saving the model.

    python benchmarks/export.py [--gib 2]

A LLaVA of random weights in bfloat16 is written to a temporary folder and exported with one percent of its
neurons and three heads scaled. Each way is a process of its own, timed by the wall clock (disk time counts)
with its peak memory. Two rounds; the second is shown, when the originals are in the system's file cache.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MODULE = [sys.executable, "-m", "hones_eval", "export", "--to", "checkpoint"]
LOADED = """
import sys
from pathlib import Path
from transformers import AutoModelForImageTextToText, AutoProcessor
from hones_eval import Steering
from hones_eval.core.export import export_checkpoint
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], dtype="auto")
processor = AutoProcessor.from_pretrained(sys.argv[1])
export_checkpoint(model, Steering.load(sys.argv[2]), Path(sys.argv[3]), processor.save_pretrained)
"""
PREPARE = """
import sys
import torch
from pathlib import Path
from transformers import AutoProcessor, LlavaConfig, LlavaForConditionalGeneration
from hones_eval.core.anatomy import Anatomy
from hones_eval.core.artifact import Provenance
from hones_eval.core.steering import Steering
from hones_eval.toy import checkpoint_path
layers = int(sys.argv[2])
config = LlavaConfig.from_pretrained(checkpoint_path())
config.text_config.update(
    dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=layers, num_attention_heads=16,
         num_key_value_heads=16, head_dim=128)
)
model = LlavaForConditionalGeneration._from_config(config, dtype=torch.bfloat16)
base = Path(sys.argv[1]) / "base"
model.save_pretrained(base, max_shard_size="500MB")
AutoProcessor.from_pretrained(checkpoint_path()).save_pretrained(base)
shape = Anatomy.of(model).shape
heads, neurons = torch.ones(shape.layers, shape.heads), torch.ones(shape.layers, shape.neurons)
heads[0, :3] = 1.5
neurons[torch.rand(neurons.shape) < 0.01] = 2.0
source = Provenance(str(base), None, shape, "hones", {}, [])
Steering(heads, neurons, source).save(Path(sys.argv[1]) / "steering")
"""
BYTES_PER_LAYER = 2 * (4 * 2048**2 + 3 * 2048 * 8192)


def timed(command: list[str], out: Path) -> tuple[float, float]:
    """Wall seconds of a command and its peak memory in GiB; `out` is removed before."""
    shutil.rmtree(out, ignore_errors=True)
    began = time.monotonic()
    process = subprocess.Popen([*command, str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    os.sync()
    if status:
        raise SystemExit(f"{' '.join(command)} failed: run it by hand to see why")
    return time.monotonic() - began, usage.ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gib", type=float, default=2.0, help="size of the checkpoint")
    layers = max(1, round(parser.parse_args().gib * 2**30 / BYTES_PER_LAYER))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        subprocess.run([sys.executable, "-c", PREPARE, name, str(layers)], check=True, capture_output=True)
        base, steering, out = folder / "base", folder / "steering", folder / "out"
        size = sum(path.stat().st_size for path in base.iterdir()) / 2**30
        ways = {
            "cp -r": ["cp", "-r", str(base)],
            "export": [*MODULE, "--steering", str(steering), "--out"],
            "load and save": [sys.executable, "-c", LOADED, str(base), str(steering)],
        }
        print(f"{size:.2f} GiB in {len(list(base.glob('*.safetensors')))} files")
        print("| way | seconds | compared with cp | peak memory, GiB |")
        print("|---|---:|---:|---:|")
        for _ in range(2):
            found = {way: timed(command, out) for way, command in ways.items()}
        for way, (seconds, memory) in found.items():
            print(f"| {way} | {seconds:.1f} | {seconds / found['cp -r'][0]:.2f} | {memory:.2f} |")


if __name__ == "__main__":
    main()
