"""The tables of a report, as data: success beside published numbers, cost and notes."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Int

from experiments.report import published
from experiments.report.groups import Group, show_steps
from utils.output.intervals import Statistic, scalar_bootstrap
from utils.output.loggers import MEASURES, SUCCESS

NONE, SINGLE_TASKS = "–", " (single seeds)"


@dataclass(frozen=True)
class Cell:
    """A cell: `text`, marked as 'best', 'close' (to the best) or 'published', then `rest`, which is not marked."""

    text: str
    mark: str = ""
    rest: str = ""


@dataclass
class Table:
    """A table with a header and row names in the first column; `notes` are paragraphs below it."""

    title: str
    header: list[str]
    rows: list[list[Cell]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def upright(self) -> "Table":
        """Returns the table with rows and columns exchanged if it is wider than high, else itself."""
        if len(self.header) <= max(len(self.rows) + 1, 6):
            return self
        columns = zip(*self.rows, strict=True)
        header, *rows = [[Cell(name), *cells] for name, cells in zip(self.header, columns, strict=True)]
        return Table(self.title, ["method", *(cell.text for cell in header[1:])], rows, self.notes)

    def without(self, column: str) -> "Table":
        """Returns the table without a column."""
        index = self.header.index(column)
        kept = [[*row[:index], *row[index + 1 :]] for row in self.rows]
        return Table(self.title, [name for name in self.header if name != column], kept, self.notes)


@dataclass(frozen=True)
class Score:
    """A mean over seeds, its 95 % interval (None for one seed), and its metric."""

    mean: float
    interval: tuple[float, float] | None
    metric: str = SUCCESS

    def text(self, value: float) -> str:
        """Formats a value of this metric."""
        return f"{value:.2f}" if self.metric == SUCCESS else f"{value:.4g}"

    def brackets(self) -> str:
        """Formats the interval; '' without one."""
        return " [{}, {}]".format(*map(self.text, self.interval)) if self.interval else ""


def compared(groups: Iterable[Group]) -> dict[str, dict[str, Group]]:
    """Returns environment → label → group, of the groups that are compared."""
    result: dict[str, dict[str, Group]] = {}
    for group in groups:
        if not group.apart:
            result.setdefault(group.env_name, {})[group.label] = group
    return result


def labels_of(groups: Iterable[Group]) -> dict[str, str]:
    """Returns label → published name of all compared groups, in the order of the columns."""
    labels = {group.label: group.algorithm for group in groups if not group.apart}
    order = sorted(labels, key=published.method_order)
    return {label: labels[label] for label in order}


def marked(scores: dict[str, Score], without_interval: str = " (1 seed)") -> dict[str, Cell]:
    """Returns one row's cells, with the best score and those within its 95 % interval marked.

    If some scores have several seeds, those of one seed are not marked. Scores that print like the best are best too.

    Args:
        without_interval: text after scores without an interval.
    """
    rivals = {label: score for label, score in scores.items() if score.interval} or scores
    best = max(rivals.values(), key=lambda score: score.mean, default=None)

    def mark(label: str) -> str:
        score = scores[label]
        if best is None or len(scores) < 2 or label not in rivals:
            return ""
        if score.text(score.mean) == best.text(best.mean):
            return "best"
        return "close" if best.interval and best.interval[0] <= score.mean <= best.interval[1] else ""

    return {
        label: Cell(score.text(score.mean), mark(label), score.brackets() or without_interval)
        for label, score in scores.items()
    }


def success_table(groups: list[Group], last: int) -> Table:
    """Returns success by task and method, with published numbers in the rows below."""
    labels, environments = labels_of(groups), compared(groups)
    table = Table("Success rate", ["environment", *labels], notes=_success_notes(groups, last))
    domains: dict[str, list[str]] = {}
    for env_name in sorted({group.env_name for group in groups}):
        domains.setdefault(published.domain_of(env_name) or env_name, []).append(env_name)
    for domain, names in domains.items():
        for env_name in names:
            shown = environments.get(env_name, {})
            scores = {k: Score(g.mean, g.interval, g.condition.metric) for k, g in shown.items()}
            others = dict.fromkeys(MEASURES[s.metric] for s in scores.values() if s.metric != SUCCESS)
            _add_row(table, labels, " ".join([env_name, *(f"({name})" for name in others)]), marked(scores))
            _add_published_curve(table, labels, env_name, shown)
        full = _domain_scores([environments.get(name, {}) for name in names])
        if full:
            _add_row(table, labels, f"{domain}, mean of its {published.TASKS} tasks", marked(full, SINGLE_TASKS))
        figures = published.table1().get(domain, {})
        title = f"published: mean of {domain}'s {published.TASKS} tasks, {show_steps(published.STEPS)} (Table 1)"
        _add_published(table, labels, title, {k: f"{figures[m]:.2f}" for k, m in labels.items() if m in figures})
    return table


def _success_notes(groups: list[Group], last: int) -> list[str]:
    """Returns the notes below the success table."""
    seeds = sorted({len(group.runs) for group in groups if not group.apart})
    count = " to ".join(dict.fromkeys(str(pick(seeds)) for pick in (min, max))) if seeds else "no"
    apart = sum(bool(group.apart) for group in groups)
    notes = [
        f"A seed's score is the mean of its last {last} evaluation{'s' if last > 1 else ''}. Shown are means over "
        f"seeds with the 95 % percentile bootstrap interval over seeds in brackets (too narrow below five or so). "
        f"Seeds per score: {count}.",
        "Bold: best of the row; underlined: within the interval of the best, as Table 1 of the paper marks runners-up. "
        "If some scores have several seeds, those of one seed are not marked.",
        "Italics: published results of 4×512 networks. Those of 'this task' are QAM's released data (12 seeds, ± "
        "standard deviation over seeds); those of Table 1 are means over a domain's five tasks.",
    ]
    if apart:
        are = "group of runs is" if apart == 1 else "groups of runs are"
        notes.append(f"{apart} {are} not compared here; the table of runs gives the reasons.")
    return notes


def _add_row(table: Table, labels: Iterable[str], name: str, cells: dict[str, Cell]) -> None:
    table.rows.append([Cell(name), *(cells.get(label, Cell(NONE)) for label in labels)])


def _add_published(table: Table, labels: Iterable[str], name: str, texts: dict[str, str]) -> None:
    """Adds a row of published numbers, if there are any."""
    if texts:
        cells = (Cell(texts[label], "published") if label in texts else Cell("") for label in labels)
        table.rows.append([Cell(name, "published"), *cells])


def _add_published_curve(table: Table, labels: dict[str, str], env_name: str, shown: dict[str, Group]) -> None:
    """Adds the task's published scores, at the updates of these runs if the curves have them, and at the end."""
    known = published.curves().get(env_name, {})
    curves = {label: known[method] for label, method in labels.items() if method in known}
    steps = next(iter(shown.values())).condition.steps if shown else ()
    same = {label: curve.at(steps) for label, curve in curves.items()}
    if steps and steps[-1] != published.STEPS:
        texts = {label: f"{value:.2f}" for label, value in same.items() if value is not None}
        _add_published(table, labels, f"published: this task, at the same updates ({show_steps(steps[-1])})", texts)
    texts = {label: f"{curve.mean[-1]:.2f} ± {curve.std[-1]:.2f}" for label, curve in curves.items()}
    _add_published(table, labels, f"published: this task, {show_steps(published.STEPS)}", texts)


def _domain_scores(tasks: list[dict[str, Group]]) -> dict[str, Score]:
    """Returns label → mean over a domain's tasks, of the methods that have all of them."""
    if len(tasks) < published.TASKS:
        return {}
    result = {}
    for label in set.intersection(*(set(task) for task in tasks)):
        strata = [task[label].scores for task in tasks]
        # Tasks have equal weights, whatever their numbers of seeds.
        mean_of_means = _over_tasks(np.cumsum([len(stratum) for stratum in strata])[:-1])
        result[label] = Score(float(np.mean([s.mean() for s in strata])), scalar_bootstrap(strata, mean_of_means))
    return result


def _over_tasks(ends: Int[np.ndarray, " cuts"]) -> Statistic:
    """Returns the mean over tasks of the mean over runs as a statistic; `ends` splits runs into tasks."""
    return lambda samples: np.mean([part.mean(axis=-1) for part in np.split(samples, ends, axis=-1)], axis=0)


def runs_table(groups: list[Group], last: int) -> Table:
    """Returns a row per group, compared or not: success, cost, and notes."""
    header = "environment, method, success, seeds, updates, evaluations, NFE, N, ms/action, updates/s, notes"
    table = Table("Runs, cost and notes", header.split(", "))
    ranks = {label: index for index, label in enumerate(labels_of(groups))}
    for group in sorted(groups, key=lambda g: (g.env_name, bool(g.apart), ranks.get(g.label, 99), g.label)):
        steps = group.condition.steps
        score = Score(group.mean, group.interval, group.condition.metric)
        text = score.text(score.mean) + score.brackets() if steps else NONE
        rates = [run.rate for run in group.runs if np.isfinite(run.rate)]
        milliseconds = [run.milliseconds for run in group.runs if np.isfinite(run.milliseconds)]
        parallel = max(run.runs_per_program for run in group.runs)
        measure = f" ({MEASURES[score.metric]})" if steps and score.metric != SUCCESS else ""
        apart = [f"Not compared; {'; '.join(group.apart)}"] if group.apart else []
        cells = [
            *(group.env_name, group.label, text + measure),
            *(str(len(group.runs)), show_steps(steps[-1]) if steps else NONE, _evaluations(group, last)),
            _same(run.nfe for run in group.runs),
            _same(run.settings["config"].get("best_of_n") for run in group.runs),
            f"{np.median(milliseconds):.3g}" if milliseconds else NONE,
            (f"{np.median(rates):.3g}" if rates else NONE)
            + (f" ({parallel} runs at once)" if parallel > 1 and rates else ""),
            "; ".join(apart + group.notes),
        ]
        table.rows.append([Cell(cell) for cell in cells])
    table.notes += [
        "NFE: network evaluations of the sampler for one candidate. N: candidates. ms/action: measured at the end of "
        "the run. updates/s: median over the logged intervals, of the whole program if it trained several runs at "
        f"once. Times depend on the machine and on its load. {NONE}: not recorded.",
    ]
    return table


def _same(values: Iterable[object]) -> str:
    """Lists the values of a group's runs, each once."""
    return ", ".join(dict.fromkeys(NONE if value is None else str(value) for value in values))


def _evaluations(group: Group, last: int) -> str:
    """Formats the number of averaged evaluations and of their episodes."""
    episodes = {int(count) for run in group.runs for count in run.episodes[-last:] if np.isfinite(count)}
    count = len(group.condition.steps)
    return f"{count} × {' or '.join(map(str, sorted(episodes)))} episodes" if episodes else str(count)
