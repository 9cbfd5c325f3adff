"""The table of the benchmark of several GPUs. The measurements themselves need GPUs."""

from benchmarks import scaling
from gpt2lora.pipeline.cli import StageError


def test_a_failure_leaves_the_figures_of_fewer_processes(tmp_path):
    def measure(count: int) -> dict:
        if count > 2:
            raise StageError("no GPU")
        return {"windows_per_second": 100.0 * 1.5 ** (count - 1), "memory_gb": 1.0}

    found = scaling.on_each_number((1, 2, 4), measure)
    assert found["error"] == "4 processes: no GPU"
    scaling.write_results(tmp_path, {"evaluate": found})
    lines = (tmp_path / "scaling.md").read_text().splitlines()
    assert lines[2:] == [
        "| evaluate | 1 | 100 | 1.00 | 1.00 |",
        "| evaluate | 2 | 150 | 1.50 | 1.00 |",
        "",
        "- evaluate failed: see scaling.json",
    ]
