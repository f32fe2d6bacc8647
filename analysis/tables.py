"""Tables for people: one row a model, or one row a pair of models, with the notes that belong to them."""

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from analysis import comparison, statistics
from analysis.comparison import AGAINST_BASELINES, ALPHA, NETWORKS, SPREAD, compare, is_better, pairs_of_models
from analysis.evidence import CROSS_FITTED, Evidence
from analysis.groups import group_id, what_is_wrong
from analysis.looks import compare_as_planned, planned_looks
from analysis.tuning import chosen_sentence, is_tuned
from tracking.keys import MEAN
from tracking.scores import SCORES, score_of

PART_NAMES = {
    "all": "cross-fitted validation and test images together",
    "test": "test part at the best epoch",
    "best_val": "validation part at the best epoch, which it chose",
    "cross_val": "validation part, each half at the epoch that the other half chose",
    "last_val": "validation part at the last epoch",
}
NOT_BEATEN = "†"  # marks a network that does not beat every baseline


@dataclass(frozen=True)
class ResultTable:
    """A table with its caption, notes and sources."""

    title: str
    caption: str  # explains the numbers
    cells: pd.DataFrame  # text for people: rounded, scores in per cent
    data: pd.DataFrame  # for programs: full precision, scores as shares
    notes: list[str]  # sentences that a reader of the table must know
    runs: pd.DataFrame  # source of each number: `model`, `split`, the score, `run_id`


def score_table(evidence: Evidence, metric: str, intervals: bool = False) -> ResultTable:
    """Make the table of models, best first: scores with interval, and costs. Errors are those of `comparison_table`.

    With `intervals` its `data` have those of all scores.
    """
    frame = comparison.tabulate(evidence, metric, intervals)
    part, score = metric.split("/")[0], score_of(metric)
    beside = [other for other in SCORES.values() if other.is_share and other != score]
    not_beaten = baselines_not_beaten(evidence, metric)
    rows = []
    for model, row in frame.iterrows():
        runs = evidence.of(str(model))
        rows.append({
            "model": f"{model}{NOT_BEATEN}" if model in not_beaten else str(model),
            "splits": f"{row['n']}/{row['n_expected']}",
            score.label: with_sd(row["mean"], row["sd"], metric),
            "95 % interval": interval(row["low"], row["high"], metric, "–"),
            **{o.label: number(runs[f"{part}/{o.name}"].mean(skipna=False), f"{part}/{o.name}") for o in beside},
            "best epoch": f"{row[MEAN + 'best_epoch']:.0f}" if not row["baseline"] else "",
            "parameters": in_millions(row["parameters"]),
            "MACs": in_millions(row["macs"]),
            "s per split": seconds(row[MEAN + "train_seconds"]),
        })  # fmt: skip
    notes = [chosen_sentence(evidence)] if is_tuned(evidence.group) else []
    if planned_looks(evidence.group) and pairs_of_models(evidence, metric):
        notes += compare_as_planned(evidence, metric)[1]
    notes += [*what_is_wrong(evidence.group), *earlier_version(evidence), *not_beaten.values()]
    if problem := next((e.problem for m in frame.index if (e := evidence.estimate(metric, str(m))).problem), ""):
        notes.append(f"Where there is no interval: {problem}.")
    caption = f"{PART_NAMES[part]}, {score.label} as mean±sd over splits and 95 % interval of the mean, in {score.unit}"
    data = frame.reset_index().assign(**identity(evidence, metric))
    return ResultTable(title(evidence), caption, pd.DataFrame(rows), data, notes, trace(evidence, metric))


def difference_table(
    evidence: Evidence,
    metric: str,
    rope: float,
    looks: Sequence[int] = (),
    pairs: Sequence[tuple[str, str, str]] | None = None,
) -> ResultTable:
    """Make the table of pairs: difference with interval, tests and verdict.

    With `looks`, or those that the runs were planned with, each pair is as it was when it was decided
    (`analysis.looks`). `pairs` and errors are those of `comparison.compare`.
    """
    if pairs:
        tests, about_looks = compare(evidence, metric, rope, pairs=pairs).assign(level=ALPHA), list[str]()
    else:
        tests, about_looks = compare_as_planned(evidence, metric, rope, looks)
    part, score = metric.split("/")[0], score_of(metric)
    rows = []
    for _, row in tests.iterrows():
        rows.append({
            "model": row["model_a"], "against": row["model_b"], "verdict": row["verdict"],
            "difference": number(row["difference"], metric, signed=True),
            "95 % interval": interval(row["low"], row["high"], metric, " to "),
            "p": p_value(row["p"]), "Holm p": p_value(row["p_holm"]),
            "P(worse)": probability(row["p_worse"]), "P(same)": probability(row["p_equivalent"]),
            "P(better)": probability(row["p_better"]),
            **({"McNemar p": p_value(row["mcnemar_p"])} if tests["mcnemar_p"].notna().any() else {}),
            "splits": f"{row['n']}",
        })  # fmt: skip
    unit = score.difference_unit
    caption = (
        f"{PART_NAMES[part]}, paired differences of {score.label} in {unit}; the same: within "
        f"±{number(rope, metric)} {unit}; intervals and P are those of each pair alone"
    )
    data, notes = tests.assign(**identity(evidence, metric)), [*about_looks, *_about_tests(evidence, tests)]
    return ResultTable(title(evidence), caption, pd.DataFrame(rows), data, notes, trace(evidence, metric))


def _about_tests(evidence: Evidence, tests: pd.DataFrame) -> list[str]:
    notes = []
    tested = tests[tests["problem"] == ""]
    if len(tested):
        families = tests.groupby("family", sort=False).size()
        counts = " and, apart from them, ".join(f"{family} ({count})" for family, count in families.items())
        notes.append(
            f"p is two-sided; Holm p, and the probability behind {comparison.SAME!r}, are adjusted over all {counts}."
        )
        if tests["family"].isin((NETWORKS, AGAINST_BASELINES)).all():
            what = (
                "for models that were each tuned with the same budget"
                if is_tuned(evidence.group)
                else ("for these settings, which are the same for all models")
            )
            notes.append(f"Better and worse hold {what}.")
    if ((tested["verdict"] == comparison.OPEN) & (tested["low"].gt(0) | tested["high"].lt(0))).any():
        notes.append(
            f"An interval is that of its pair alone: of many, some exclude 0 by chance, and beside {comparison.OPEN!r} "
            "that is no finding."
        )
    notes += _spread(tests)
    for problem, pairs in tests[tests["problem"] != ""].groupby("problem", sort=False):
        names = ", ".join(f"{row['model_a']} and {row['model_b']}" for _, row in pairs.iterrows())
        notes.append(f"No test{'' if len(pairs) == len(tests) else f' of {names}'}: {problem}.")
    return notes + earlier_version(evidence) + what_is_wrong(evidence.group)


def _spread(tests: pd.DataFrame) -> list[str]:
    """Say where the variance of a difference comes from, in the mean over the pairs without a baseline."""
    parts = tests.loc[tests["family"].ne(AGAINST_BASELINES) & tests["problem"].eq(""), list(SPREAD)]
    parts = parts[parts.sum(axis=1) > 0]
    if parts.empty:
        return []
    images, training, seeds = parts.div(parts.sum(axis=1), axis=0).mean()
    shares = f"{share(images)} is due to the choice of the scored images"
    if pd.isna(seeds):
        return [f"Of the variance of one training's difference {shares}, the rest to training images and seeds, which "
                "--seeds 2 tells apart."]  # fmt: skip
    return [f"Of the variance of one training's difference {shares}, {share(training)} to the training images, "
            f"{share(seeds)} to seeds."]  # fmt: skip


def earlier_version(evidence: Evidence) -> list[str]:
    """Name the models whose runs lack data that this version keeps, in one sentence if there are any."""
    without = sorted(set(evidence.runs.loc[evidence.runs[CROSS_FITTED].isna(), "model"]))
    return [f"Runs of an earlier version ({', '.join(without)}) kept no cross-fitted validation scores, which would "
            "make intervals narrower; --fresh trains them again."] if without else []  # fmt: skip


def baselines_not_beaten(evidence: Evidence, metric: str) -> dict[str, str]:
    """Return a sentence for each network that does not beat every baseline, with the size of the differences."""
    if not any(family == AGAINST_BASELINES for family, _, _ in pairs_of_models(evidence, metric)):
        return {}
    tests, _ = compare_as_planned(evidence, metric, families=(AGAINST_BASELINES,))
    beaten = tests["p_holm"].lt(tests["level"]) & tests["difference"].map(
        lambda difference: is_better(difference, metric)
    )
    unit = f" {score_of(metric).difference_unit}"
    found: dict[str, dict[str, list[str]]] = {}  # baselines by network and relation
    enough = tests["n"] >= statistics.MIN_SPLITS
    for _, row in tests[~beaten & enough].iterrows():
        size = f"{number(row['difference'], metric, signed=True)}{unit}"
        if not row["problem"]:
            size += f", 95 % interval {interval(row['low'], row['high'], metric, ' to ')}, {holm_p(row['p_holm'])}"
        how = "is not shown to beat" if row["problem"] or row["p_holm"] >= row["level"] else "is worse than"
        found.setdefault(row["model_a"], {}).setdefault(how, []).append(f"{row['model_b']} ({size})")
    clauses = {model: [f"{how} {' or '.join(bases)}" for how, bases in ways.items()] for model, ways in found.items()}
    return {model: f"{NOT_BEATEN} {model} {' and '.join(parts)}." for model, parts in clauses.items()}


def verdict_sentences(evidence: Evidence, metric: str, rope: float) -> list[str]:
    """Return a sentence for each pair of networks: the verdict and, if there is none, how many splits it takes."""
    if not any(family == NETWORKS for family, _, _ in pairs_of_models(evidence, metric)):
        return []
    tests, _ = compare_as_planned(evidence, metric, rope, families=(NETWORKS,))
    return [_sentence(row, metric, rope) for _, row in tests.iterrows()]


def _sentence(row: pd.Series, metric: str, rope: float) -> str:
    a, b = row["model_a"], row["model_b"]
    unit, label = f" {score_of(metric).difference_unit}", score_of(metric).label
    size = f"{number(abs(row['difference']), metric)}{unit}"
    if row["problem"]:
        return f"{a} and {b} differ by {size} of {label}, and there is no test: {row['problem']}."
    ends = (row["low"], row["high"]) if row["difference"] >= 0 else (-row["high"], -row["low"])
    detail = f"{size}, 95 % interval {interval(*ends, metric, ' to ')}"
    if row["verdict"] == comparison.SAME:
        real = "; the difference is real but does not matter" if row["p_holm"] < row["level"] else ""
        return (
            f"{a} and {b} are practically the same: they differ by {detail}, and with probability "
            f"{probability(row['p_equivalent'])} by no more than {number(rope, metric)}{unit}{real}."
        )
    if row["verdict"] == comparison.OPEN:
        alone = " (of this pair alone: of many, some exclude 0 by chance)" if ends[0] > 0 or ends[1] < 0 else ""
        return (
            f"{a} and {b} are not distinguishable: they differ by {detail}{alone}, {holm_p(row['p_holm'])}; to find "
            f"such a difference with 80 % power {_what_it_takes(row)}."
        )
    how = "lower" if row["difference"] < 0 else "higher"
    return f"{a} is {row['verdict']} than {b}: its {label} is {how} by {detail}, {holm_p(row['p_holm'])}."


def _what_it_takes(row: pd.Series) -> str:
    if pd.notna(row["splits_needed"]):
        return f"would take about {row['splits_needed']} splits of this kind"
    if row["limit"] == "images":
        return "would take more images to score, not more splits"
    return "would take other training images: those that all splits share set the limit"


def title(evidence: Evidence) -> str:
    """Return the title of a group's tables."""
    first = evidence.runs.iloc[0]
    return f"{first['task']}: {first['dataset']}, {first['protocol']}"


def identity(evidence: Evidence, metric: str) -> dict[str, str]:
    """Return the identity of a table's numbers: task, group and metric."""
    return {"task": evidence.runs["task"].iloc[0], "group": group_id(evidence.group), "metric": metric}


def trace(evidence: Evidence, metric: str) -> pd.DataFrame:
    """Return the runs behind the numbers of a table."""
    return evidence.runs.sort_values(["model", "split"])[["model", "split", metric, "run_id"]].reset_index(drop=True)


def number(value: float, metric: str, signed: bool = False) -> str:
    """Format a score or difference: per cent or points with one digit (below 100), other units with three."""
    sign = "+" if signed else ""
    if pd.isna(value):
        return ""
    if not score_of(metric).is_share:
        return f"{value:{sign}.3f}"
    return f"{100 * value:{sign}.{0 if abs(value) >= 0.9995 else 1}f}"


def with_sd(mean: float, sd: float, metric: str) -> str:
    """Format mean±sd, or the mean if there is no sd."""
    return number(mean, metric) + (f"±{number(sd, metric)}" if pd.notna(sd) else "")


def interval(low: float, high: float, metric: str, between: str) -> str:
    """Format both ends, or return an empty text if there are none; a share cannot differ by more than 100 points."""
    if pd.isna(low):
        return ""
    if score_of(metric).is_share:
        low, high = max(low, -1.0), min(high, 1.0)
    return f"{number(low, metric)}{between}{number(high, metric)}"


def p_value(p: float) -> str:
    """Format a p-value with three digits, never as zero."""
    return "" if pd.isna(p) else "<.001" if p < 0.001 else f"{p:.3f}"


def holm_p(p: float) -> str:
    """Format an adjusted p-value within a sentence."""
    return f"Holm p {p_value(p)}".replace("<", "< 0")


def probability(p: float) -> str:
    """Format with two digits, but never as 0 or 1: no posterior probability is certain."""
    if pd.isna(p):
        return ""
    return "<0.01" if p < 0.005 else ">0.99" if p >= 0.995 else f"{p:.2f}"


def share(value: float) -> str:
    """Format a share in whole per cent."""
    return f"{100 * value:.0f} %"


def seconds(value: float) -> str:
    """Format whole seconds, or tenths below ten."""
    return "" if pd.isna(value) else f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def in_millions(count: float) -> str:
    """Format a count such as 0.24M."""
    if pd.isna(count):
        return ""
    return f"{count:,.0f}" if count < 1e4 else f"{count / 1e6:.2f}M" if count < 1e7 else f"{count / 1e6:,.0f}M"
