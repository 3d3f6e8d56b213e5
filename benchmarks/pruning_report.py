"""Section and plots of ``pruning.py``, made from its results alone.

Each claim is cut into parts, each a paired difference that is above zero if the claim is right. A part holds, or is
contradicted, beyond two standard errors; otherwise it is open.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.figures import COLOURS, panels, save, tidy
from benchmarks.stats import Difference, difference, listed, markdown_table, mean_of
from benchmarks.tasks import Classifier, perceptron
from lightning_dp.masks import magnitude_masks, prunable_names

Results = dict[str, Any]
HEAVY = "0.9"
WORDS = {"higher": "holds", "lower": "is contradicted", "within noise": "is open"}


@dataclass(frozen=True)
class Part:
    """One paired difference of a claim."""

    what: str
    difference: Difference

    def __str__(self) -> str:
        return f"- {self.what}: {self.difference}; {WORDS[self.difference.verdict]}."


def verdict(parts: Iterable[Part], *, any_suffices: bool = False) -> str:
    """Return the verdict on a claim from its parts: it needs all of them, or any."""
    found = [part.difference.verdict for part in parts]
    enough = any if any_suffices else all
    if enough(item == "higher" for item in found):
        return "**Holds here.**"
    against = all if any_suffices else any
    if against(item == "lower" for item in found):
        return "**Does not hold here.**"
    return "**Not shown here**: some of it is within noise."


def seedwise(function: Callable[..., float], *arms: Mapping[str, Any]) -> Difference:
    """Compare a figure of several arms with zero, seed by seed."""
    common = sorted(set.intersection(*(set(arm) for arm in arms)))
    return difference({seed: function(*(arm[seed] for arm in arms)) for seed in common}, dict.fromkeys(common, 0.0))


def stages_text(study: Results) -> str:
    """Return the text on claim 1."""
    arms, early, half = study["arms"], study["early"], study["half"]
    last = {name: {seed: curve[-1] for seed, curve in by_seed.items()} for name, by_seed in arms.items()}
    first = {name: {seed: curve[early - 1] for seed, curve in by_seed.items()} for name, by_seed in arms.items()}
    plain, private = last["SGD"], last["DP-SGD"]
    parts = [
        Part(f"early, SGD is ahead of DP-SGD (after {early} epochs)", difference(first["SGD"], first["DP-SGD"])),
        Part(
            "ending with SGD ends nearer to SGD throughout than to DP-SGD throughout (above their midpoint)",
            seedwise(lambda x, s, p: x - (s + p) / 2, last["DP-SGD, then SGD"], plain, private),
        ),
        Part(
            "ending with DP-SGD ends nearer to DP-SGD throughout (below the midpoint)",
            seedwise(lambda x, s, p: (s + p) / 2 - x, last["SGD, then DP-SGD"], plain, private),
        ),
    ]
    rows = [[name, mean_of(first[name].values()), mean_of(last[name].values())] for name in arms]
    return _study(
        "1. DP-SGD is slower early, but the later stage decides on the end.",
        f"One switch after {half} epochs; all at learning rate {study['lr']:g}, the best for DP-SGD; {len(plain)} "
        "seeds.",
        parts,
        markdown_table(["", f"after {early} epochs", "at the end"], rows),
        verdict(parts),
        "pruning_stages.png",
    )


def parts_text(study: Results) -> str:
    """Return the text on claim 2."""
    parts: list[Part] = []
    for bound in _bounds(study):
        clip, noise, both = (study[f"{name}, bound {bound}"]["report"] for name in ("clip only", "noise only", "both"))
        parts += [
            Part(f"bound {bound}: clipping alone costs more than noise alone", difference(noise, clip)),
            Part(f"bound {bound}: with noise, training recovers better without clipping", difference(noise, both)),
        ]
    rows = [[name, f"{arm['lr']:g}", mean_of(arm["report"].values())] for name, arm in study.items()]
    return _study(
        "2. Clipping has the larger impact; gradient descent recovers from noise when it is not clipped.",
        f"Each arm at its own best rate; the noise has the std that DP-SGD with that bound has. {caveat(study)}",
        parts,
        markdown_table(["", "rate", "accuracy"], rows),
        verdict(parts),
        "pruning_parts.png",
    )


def dimensions_text(study: Results) -> str:
    """Return the text on claim 3."""
    narrow, *_, wide = study
    parts = [
        Part(
            f"what {what} costs grows from width {narrow} to {wide}",
            seedwise(
                lambda a, b, c, d: (a - b) - (c - d),
                *(study[width][name]["report"] for width in (wide, narrow) for name in ("neither", arm)),
            ),
        )
        for arm, what in (("both", "DP-SGD"), ("clip only", "clipping"), ("noise only", "noise"))
    ]
    header = ["width", *study[narrow]]
    rows = [[width, *(mean_of(arm["report"].values()) for arm in arms.values())] for width, arms in study.items()]
    return _study(
        "3. The effects are amplified in higher dimensions.",
        "A hidden layer of so many units, bound 1, each arm at its own best rate. "
        + caveat({f"{name}, width {width}": arm for width, arms in study.items() for name, arm in arms.items()}),
        parts,
        markdown_table(header, rows),
        verdict(parts),
        "pruning_dimensions.png",
    )


def masks_text(study: Results) -> str:
    """Return the text on claim 4."""
    dense, kinds = study["dense"]["report"], _kinds(study)
    heavy = {kind: study[kind][HEAVY]["report"] for kind in kinds}
    parts = [
        Part(f"{kind}, {HEAVY} removed, is better than dense", difference(heavy[kind], dense))
        for kind in ("initial magnitude", "public magnitude")
    ]
    controls = [
        Part("initial magnitude is better than random", difference(heavy["initial magnitude"], heavy["random"])),
        Part("public magnitude is better than random", difference(heavy["public magnitude"], heavy["random"])),
        Part(
            "removed weights set to 0 are better than frozen ones",
            difference(heavy["initial magnitude"], heavy["initial magnitude, frozen"]),
        ),
    ]
    amounts = list(study[kinds[0]])
    rows = [["dense", mean_of(dense.values()), *[""] * (len(amounts) - 1)]]
    rows += [[kind, *(mean_of(study[kind][amount]["report"].values()) for amount in amounts)] for kind in kinds]
    better = [
        f"{kind} {amount}"
        for kind in kinds
        for amount in amounts
        if difference(study[kind][amount]["report"], dense).verdict == "higher"
    ]
    text = _study(
        "4. Heavy magnitude pruning can improve the accuracy of DP-SGD.",
        f"Width {study['width']}, so many of the weights removed before training; each arm at its own best rate. "
        + caveat({"dense": study["dense"], **{f"{k} {a}": arm for k in kinds for a, arm in study[k].items()}}),
        parts,
        markdown_table(["", *(f"{amount} removed" for amount in amounts)], rows),
        verdict(parts, any_suffices=True),
        "pruning_masks.png",
    )
    own = "\n".join(str(part) for part in controls)
    left = kept_of_output_layer(study["width"], float(HEAVY))
    why = (
        f"Ranked over the whole network, the initial magnitudes leave {100 * left:.0f} % of the output layer at "
        f"{HEAVY} removed: torch draws the weights of a layer with more inputs from a narrower range. A network "
        "without an output layer learns nothing."
    )
    return (
        f"{text}\n\nControls at {HEAVY} removed:\n\n{own}\n\n{why}\n\n"
        f"Of all kinds and amounts, better than dense: {listed(better)}."
    )


def kept_of_output_layer(width: int, amount: float) -> float:
    """Return the share of the output layer's weights that a global ranking by magnitude keeps, at seed 0."""
    module = Classifier(functools.partial(perceptron, 64, width, 10), lr=0.0)
    names = prunable_names(module)
    masks = magnitude_masks(dict(module.named_parameters()), amount, "global", names, "magnitude", 0)
    return float(masks[names[-1]].float().mean())


def caveat(arms: Mapping[str, Any]) -> str:
    """Return the number of seeds, and the arms that were best at an end of the grid of rates."""
    seeds = sorted({len(arm["report"]) for arm in arms.values()})
    ends = []
    for name, arm in arms.items():
        rates = sorted(float(rate) for rate in arm["choice"])
        if rates and arm["lr"] in (rates[0], rates[-1]):
            ends.append(f"{name} ({arm['lr']:g})")
    return f"{' to '.join(map(str, seeds))} seeds. Best rate at an end of the grid: {listed(ends)}."


def _study(title: str, setting: str, parts: list[Part], table: str, found: str, picture: str) -> str:
    listing = "\n".join(str(part) for part in parts)
    return f"### {title}\n\n{found} {setting}\n\n{table}\n\n{listing}\n\n![{title}]({picture})"


def _bounds(study: Results) -> list[str]:
    return [name.rsplit(" ", 1)[1] for name in study if name.startswith("both")]


def _kinds(study: Results) -> list[str]:
    return [name for name in study if name not in ("width", "dense")]


TEXTS: dict[str, Callable[[Results], str]] = {
    "stages": stages_text,
    "parts": parts_text,
    "dimensions": dimensions_text,
    "masks": masks_text,
}


def section(results: Results) -> str:
    """Return the section of the README."""
    intro = (
        "The claims are those of the abstract of Watson et al. 2023, arXiv 2311.06839; the settings are ours: digits, "
        "a perceptron 64-width-10, SGD, the noise of epsilon 1 at delta 1e-5. Test accuracy after the last epoch, "
        "mean and standard error over seeds; a part of a claim holds if its paired difference is above 0 by more than "
        "two standard errors. Arms without noise or clipping are not private. A small network on 8x8 images says "
        "little about the large ones that the paper is about."
    )
    missing = [name for name in TEXTS if name not in results]
    note = [f"Not run yet (`python benchmarks/pruning.py --studies ...`): {listed(missing)}."] if missing else []
    return "\n\n".join([intro, *(text(results[name]) for name, text in TEXTS.items() if name in results), *note])


def plot(results: Results, folder: Path) -> None:
    """Draw one picture per study."""
    for name, draw in PLOTS.items():
        if name in results:
            figure, ((axis,),) = panels(1, 1, 6.5, 4)
            draw(axis, results[name])
            save(figure, folder / f"pruning_{name}.png")


def plot_stages(axis: Any, study: Results) -> None:
    for colour, (name, by_seed) in zip(COLOURS, study["arms"].items(), strict=False):
        epochs = [mean_of(values) for values in zip(*by_seed.values(), strict=True)]
        numbers, means = range(1, len(epochs) + 1), [mean.value for mean in epochs]
        axis.plot(numbers, means, color=colour, label=name)
        low, high = ([m.value + sign * m.error for m in epochs] for sign in (-1, 1))
        axis.fill_between(numbers, low, high, color=colour, alpha=0.2, linewidth=0)
    axis.axvline(study["half"] + 0.5, color="tab:grey", linestyle=":", linewidth=1)
    axis.legend()
    tidy(axis, title="SGD and DP-SGD, and a switch half-way", x="epoch", y="test accuracy")


def plot_parts(axis: Any, study: Results) -> None:
    means = [mean_of(arm["report"].values()) for arm in study.values()]
    axis.barh(
        range(len(means)),
        [mean.value for mean in means],
        xerr=[mean.error for mean in means],
        color=[COLOURS[0] if "clip" in name else COLOURS[1] if "noise" in name else COLOURS[6] for name in study],
    )
    axis.set_yticks(range(len(means)), list(study))
    axis.invert_yaxis()
    axis.set_xlim(left=max(0.0, min(mean.value for mean in means) - 0.05))
    tidy(axis, title="What clipping and noise cost, each alone and together", x="test accuracy (axis cut)", y="")


def plot_dimensions(axis: Any, study: Results) -> None:
    widths = [int(width) for width in study]
    for colour, name in zip(COLOURS, next(iter(study.values())), strict=False):
        means = [mean_of(arms[name]["report"].values()) for arms in study.values()]
        values, errors = [mean.value for mean in means], [mean.error for mean in means]
        axis.errorbar(widths, values, yerr=errors, fmt="o-", markersize=4, color=colour, label=name)
    axis.set_xscale("log", base=2)
    axis.set_xticks(widths, [str(width) for width in widths])
    axis.legend()
    tidy(axis, title="The four arms over the width", x="width of the hidden layer", y="test accuracy")


def plot_masks(axis: Any, study: Results) -> None:
    for colour, kind in zip(COLOURS, _kinds(study), strict=False):
        means = [mean_of(arm["report"].values()) for arm in study[kind].values()]
        values, errors = [mean.value for mean in means], [mean.error for mean in means]
        axis.errorbar(list(study[kind]), values, yerr=errors, fmt="o-", markersize=4, color=colour, label=kind)
    dense = mean_of(study["dense"]["report"].values())
    axis.axhline(dense.value, color="tab:grey", linestyle="--", label="dense")
    axis.axhspan(dense.value - dense.error, dense.value + dense.error, color="tab:grey", alpha=0.15, linewidth=0)
    axis.legend()
    tidy(axis, title=f"Pruning before DP-SGD, width {study['width']}", x="fraction removed", y="test accuracy")


PLOTS: dict[str, Callable[[Any, Results], None]] = {
    "stages": plot_stages,
    "parts": plot_parts,
    "dimensions": plot_dimensions,
    "masks": plot_masks,
}
