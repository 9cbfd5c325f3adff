"""The figure of the study of methods: test perplexity against trained parameters, a line for each family of methods."""

from pathlib import Path

from gpt2lora.evaluation import plots

RANKS = (8, 16, 32, 64, 128)
# For each line the names of its methods, by their rank. A method alone is a point.
FAMILIES = {
    "LoRA, alpha 2 r": ["lora" if r == 16 else f"lora-r{r}" for r in RANKS],
    "LoRA, alpha 32": ["lora" if r == 16 else f"lora-r{r}-alpha32" for r in (8, 16, 64, 128)],
    "LoRA of attention alone": ["lora-attention"],
    "rsLoRA": ["rslora"],
    "DoRA": ["dora"],
    "QLoRA (nf4)": ["qlora-nf4"],
    "QLoRA (8 bits)": ["qlora-8bit"],
    "adapter of 4 bits": ["lora-bits-4"],
    "full": ["full"],
}
COLORS = ("#08519c", "#74a9cf", "#5e3c99", "#1b9e77", "#66a61e", "#d9480f", "#fdae6b", "#e7298a", "#212529")
MARKERS = "oos^vDDPX"


def draw_methods(points: dict[str, tuple[float, float]], file: Path) -> None:
    """Draw the families of which a method was measured that no earlier family has.

    Args:
        points: for each method its trained parameters and its test perplexity.
    """
    with plots.new_picture(file, "Test perplexity by trained parameters, each at its best learning rate") as axes:
        drawn = set()
        for (family, names), color, marker in zip(FAMILIES.items(), COLORS, MARKERS, strict=True):
            measured = [name for name in names if name in points]
            if set(measured) <= drawn:
                continue
            drawn |= set(measured)
            parameters, perplexities = zip(*(points[name] for name in measured), strict=True)
            axes.plot(parameters, perplexities, "-", color=color, marker=marker, label=family)
        axes.set_xscale("log")
        axes.set(xlabel="trained parameters", ylabel="test perplexity")
        axes.xaxis.set_major_formatter(plots.short_number)
        axes.legend(frameon=False)
