"""Section and plots of ``sparsification.py``, made from its results alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.figures import COLOURS, panels, save, tidy
from benchmarks.stats import Difference, difference, listed, markdown_table, mean_of

Results = dict[str, Any]
RATES = ("0", "0.9")
NAMES = {"0": "dense", "0.9": "sparsified at .9"}


def by_image(values: list[float]) -> dict[str, float]:
    """Return figures by image, so that two settings can be paired."""
    return {str(index): value for index, value in enumerate(values)}


def epsilons_of(results: Results) -> list[str]:
    """Return the attacked epsilons, as the file names them, from no noise to the most."""
    return [key.split()[1] for key in results["inversion"]["settings"] if key.startswith("0 ")]


def compare(results: Results, first: str, second: str) -> Difference:
    """Return the paired difference of squared errors; ``guess`` is the mean image in place of an attack."""
    inversion = results["inversion"]
    errors = {**{key: item["mse"] for key, item in inversion["settings"].items()}, "guess": inversion["guess"]["mse"]}
    return difference(by_image(errors[first]), by_image(errors[second]))


def bytes_text(results: Results) -> str:
    """Return the table and the sentences on bytes in collectives."""
    counted = results["bytes"]
    dense, steps = counted["dense"][0]["bytes"], counted["sparsified"]
    chosen = sorted({0, len(steps) - 1, *range(0, len(steps), max(1, len(steps) // 5))})
    rows = [
        [
            f"{steps[i]['masked']:.3f}",
            f"{steps[i]['bytes']:.0f}",
            f"{steps[i]['logged']:.0f}",
            f"{steps[i]['bytes'] / dense:.3f}",
        ]
        for i in chosen
    ]
    off = max(abs(step["bytes"] / dense - (1 - step["masked"])) for step in steps)
    agree = sum(step["bytes"] == step["logged"] for step in steps)
    return "\n\n".join(
        [
            f"**Bytes.** Digits, {counted['parameters']} parameters in float32, two {counted['backend']} processes, "
            "cooling to .9; all collective operations of a step, by whoever they were called:",
            markdown_table(["masked", "bytes counted", "bytes logged", "share of dense"], rows),
            f"A dense step sends {dense:.0f} bytes per rank. The count falls with the rate: it differs from "
            f"(1 - rate) x dense by at most {100 * off:.2f} % of dense, and equals the logged figure in {agree} of "
            f"{len(steps)} masks.",
            "![bytes per step against the rate](sparsification.png)",
        ]
    )


def inversion_text(results: Results) -> str:
    """Return the table and the sentences on the attack."""
    inversion, rows = results["inversion"], []
    higher: dict[str, list[str]] = {"higher": [], "lower": [], "within noise": []}
    useless: dict[str, list[str]] = {rate: [] for rate in RATES}
    for epsilon in epsilons_of(results):
        dense, sparse = (inversion["settings"][f"{rate} {epsilon}"] for rate in RATES)
        change = compare(results, f"0.9 {epsilon}", f"0 {epsilon}")
        higher[change.verdict].append(epsilon)
        for rate in RATES:
            if compare(results, f"{rate} {epsilon}", "guess").verdict != "lower":
                useless[rate].append(epsilon)
        identified = [f"{100 * mean_of(item['identified']).value:.0f} %" for item in (dense, sparse)]
        errors = [mean_of(item["mse"]).text(4) for item in (dense, sparse)]
        rows.append([epsilon, *errors, change.mean.text(4, "+"), change.verdict, *identified])
    header = [
        "epsilon",
        "MSE dense",
        "MSE sparsified",
        "sparsified - dense",
        "so the error is",
        "found dense",
        "found sparsified",
    ]
    named = {verdict: [_named(epsilon) for epsilon in found] for verdict, found in higher.items()}
    guess = mean_of(inversion["guess"]["mse"])
    noiseless = compare(results, "0 none", "guess")
    works = "works" if noiseless.verdict == "lower" else "does NOT work"
    return "\n\n".join(
        [
            f"**Gradient inversion.** {inversion['images']} training images, {inversion['seeds']} seeds each; one step "
            "on one image, delta 1e-5; the attack is in `inversion.py`. MSE of pixels between 0 and 1, mean and "
            'standard error over the images; "found": the reconstruction\'s nearest training image is the right '
            "one.",
            markdown_table(header, rows),
            f"Guessing the mean of other images costs {guess.text(4)}. Without noise the attack {works} (dense "
            f"{rows[0][1]}). At the same epsilon sparsification makes the error higher at: {listed(named['higher'])}; "
            f"lower at: {listed(named['lower'])}; within noise at: {listed(named['within noise'])}.",
            "Noise alone already defeats this attack, that is, the dense error is not below that of guessing, at: "
            f"{listed([_named(e) for e in useless['0']])}. The same holds sparsified at: "
            f"{listed([_named(e) for e in useless['0.9']])}.",
            "![error of the attack against epsilon](inversion.png)",
            "![two training images and what the attack makes of one released gradient](inversion_images.png)",
        ]
    )


def _named(epsilon: str) -> str:
    return "no noise" if epsilon == "none" else f"epsilon {epsilon}"


def section(results: Results) -> str:
    """Return the section of the README, with every study that has results."""
    return "\n\n".join(text(results) for name, text in TEXTS.items() if name in results)


def plot(results: Results, folder: Path) -> None:
    """Draw the pictures of every study that has results."""
    for name, draw in PLOTS.items():
        if name in results:
            draw(results, folder)


def plot_bytes(results: Results, folder: Path) -> None:
    """Plot bytes per step against the rate."""
    figure, ((axis,),) = panels(1, 1, 5.5, 3.6)
    counted = results["bytes"]
    dense = counted["dense"][0]["bytes"]
    axis.plot([0, 1], [dense / 1024, 0], color="tab:grey", linewidth=1, label="(1 - rate) x dense")
    masked = [step["masked"] for step in counted["sparsified"]]
    axis.plot(masked, [step["bytes"] / 1024 for step in counted["sparsified"]], "o", markersize=4, label="counted")
    axis.set_ylim(bottom=0)
    axis.legend()
    tidy(axis, title="Two gloo processes, digits", x="fraction of coordinates left out", y="KiB a rank and step")
    save(figure, folder / "sparsification.png")


def plot_inversion(results: Results, folder: Path) -> None:
    """Plot error against epsilon, and some reconstructed images."""
    inversion, epsilons = results["inversion"], epsilons_of(results)
    figure, ((axis,),) = panels(1, 1, 5.5, 3.6)
    for rate, colour, shift in zip(RATES, COLOURS, (-0.06, 0.06), strict=False):
        means = [mean_of(inversion["settings"][f"{rate} {epsilon}"]["mse"]) for epsilon in epsilons]
        places = [place + shift for place in range(len(epsilons))]
        values, errors = [mean.value for mean in means], [mean.error for mean in means]
        axis.errorbar(places, values, yerr=errors, fmt="o-", color=colour, label=NAMES[rate], markersize=4)
    guess = mean_of(inversion["guess"]["mse"]).value
    axis.axhline(guess, color="tab:grey", linestyle="--", label="guess: mean of other images")
    axis.set_xticks(range(len(epsilons)), epsilons)
    axis.set_ylim(bottom=0)
    axis.legend()
    tidy(
        axis,
        title="Inversion of one released gradient",
        x="epsilon of the step (none: no noise)",
        y="mean squared error",
    )
    save(figure, folder / "inversion.png")

    shown = inversion["shown"]
    count = len(shown["original"])
    figure, axes = panels(2 * count, 1 + len(epsilons), 0.9 * (1 + len(epsilons)), 0.9 * 2 * count + 0.3)
    lines = [(number, rate) for number in range(count) for rate in RATES]
    for line, (number, rate) in zip(axes, lines, strict=True):
        images = [shown["original"][number], *(shown[f"{rate} {epsilon}"][number] for epsilon in epsilons)]
        for axis, image in zip(line, images, strict=True):
            axis.imshow([image[i : i + 8] for i in range(0, 64, 8)], cmap="gray", vmin=-0.3, vmax=0.7)
            axis.set_xticks([])
            axis.set_yticks([])
        line[0].set_ylabel("dense" if rate == "0" else "RS .9", fontsize=8)
    for axis, title in zip(axes[0], ["image", "no noise", *(f"eps {e}" for e in epsilons[1:])], strict=True):
        axis.set_title(title, fontsize=8)
    save(figure, folder / "inversion_images.png")


TEXTS: dict[str, Callable[[Results], str]] = {"bytes": bytes_text, "inversion": inversion_text}
PLOTS: dict[str, Callable[[Results, Path], None]] = {"bytes": plot_bytes, "inversion": plot_inversion}
