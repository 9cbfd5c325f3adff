"""The device's matrix product, the ceiling of any training on it, in `train`'s default precision. Prints JSON."""

import json
import time

import click
import torch

from gpt2lora.model import device

TIMES, SECONDS = 10, 0.4  # measured so often for so long; the best counts: others may use the machine, too
SIZES = {"cuda": 8192, "cpu": 2048}


@click.command()
def main() -> None:
    """Measure square matrix products of normal random numbers (zeros would be faster: they use less power)."""
    place = device.pick_device()
    dtype = device.compute_dtype("auto", place)
    size = SIZES[place.type]
    left, right = (torch.randn(size, size, dtype=dtype, device=place) for _ in range(2))
    best = 0.0  # products a second
    for _ in range(TIMES):
        products, started = 0, time.perf_counter()
        while time.perf_counter() - started < SECONDS:
            left @ right
            products += 1
            if place.type == "cuda":
                torch.cuda.synchronize()
        best = max(best, products / (time.perf_counter() - started))
    record = {
        "device": place.type,
        "name": device.device_name(place),
        "precision": str(dtype).removeprefix("torch."),
        "tflops": 2 * size**3 * best / 1e12,
    }
    click.echo(json.dumps(record))


if __name__ == "__main__":
    main()
