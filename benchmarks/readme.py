"""Write what README and docs take from results files and code, or check it.

python benchmarks/readme.py --collect runs/demo   # copy a demo run's results, then write
python benchmarks/readme.py                       # write the pages: README, results, speed, recipe
python benchmarks/readme.py --check               # exit code 1 when one is out of date
"""

import argparse
import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent / "table"))
import render as table_pages
from summary import collect as collect_summary
from summary import table

from ccf_llm_hf.evaluation import format_report
from ccf_llm_hf.hub.card_tables import differences_table, methods_table
from ccf_llm_hf.training.arguments import CTRTrainingArguments
from ccf_llm_hf.training.lora import RECORDED
from ccf_llm_hf.training.recipe import DECIDED, SECTIONS, Recipe, Stage, fields_of

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
RESULTS_PAGE = ROOT / "docs" / "results.md"
RECIPE_PAGE = ROOT / "docs" / "recipe.md"
SPEED_PAGE = ROOT / "docs" / "speed.md"
DEMO = ROOT / "results" / "demo"
TABLE = ROOT / "results" / "ml-1m"
BOOKS = ROOT / "results" / "book-crossing"
RESULTS = ROOT / "benchmarks" / "results"
SCALE = ROOT / "results" / "speed" / "scale.json"
MEASURED = ("training", "ranking", "packing", "same_labels", "same_labels_cf_logit")
WAYS = {  # name in training.json -> what it is
    "packed, slot": "packed, slot-only candidates",
    "packed, title_slot": "packed, title candidates",
    "packed, bare_title": "packed, title candidates without years",
    "alone, slot": "the same slot-only content, one row a sample",
    "alone, title_slot": "the same content with titles, one row a sample",
    "alone, bare_title": "the same content with titles without years, one row a sample",
    "question last": "question last, ten titles of history, one row a sample",
    "CoLLM's way": "the same, padded to the longest, whole vocabulary everywhere (CoLLM's way)",
}
COLLECTED = ("metrics.json", "training.json")
# The README's six rows: track and name in the table, then methods of the demo.
ROWS = ("MF", "gate (MF, joint)", "gate and CF logit (MF, joint)")
DEMO_ROWS = ("CF logit alone", "CCF-LLM", "linear hybrid")
READING = ("gate", "CCF-LLM")  # rows whose names begin so have a language model
PLOTS = {"calibration.png": "calibration.png", "stages/main/curves.png": "curves.png"}


def collect(run: Path) -> None:
    """Copy what a demo run measured, and its plots, into the repository."""
    DEMO.mkdir(parents=True, exist_ok=True)
    for name in COLLECTED:
        shutil.copyfile(run / name, DEMO / name)
    for source, name in PLOTS.items():
        shutil.copyfile(run / source, DEMO / name)


def help_section(metrics: dict[str, Any]) -> list[str]:
    """Six rows: with and without a language model, on the two data sets."""
    table_rows = {
        table_pages.name_of(row): row
        for row in table_pages.read_table(TABLE)
        if row["track"] == "protocol"
    }
    rows = [("MovieLens-1M", name, table_rows[name]) for name in ROWS]
    rows += [("Book-Crossing, demo", name, metrics["methods"][name]) for name in DEMO_ROWS]
    lines = [
        "| test rows of | method | reads words | AUC | UAUC |",
        "| --- | --- | --- | --- | --- |",
    ]
    for data, name, figures in rows:
        reads = "yes" if name.startswith(READING) else "no"
        shown = (
            f"{figures[key]:.4f} ({' to '.join(f'{bound:.3f}' for bound in figures[f'{key}_ci'])})"
            for key in ("auc", "uauc")
        )
        lines.append(f"| {data} | {name} | {reads} | {' | '.join(shown)} |")
    return [*lines, "", "In brackets: 95 % intervals over users."]


def printed_section(metrics: dict[str, Any]) -> list[str]:
    """What `ccf-llm evaluate` prints of the demo, on all rows."""
    _, on_all_rows, *_ = format_report(metrics).split("\n\n")
    return ["```text", *on_all_rows.splitlines(), "```"]


def minutes_section(training: dict[str, Any]) -> list[str]:
    """How long the commands for a table take, as far as it was measured."""
    around = json.loads((RESULTS / "around.json").read_text(encoding="utf-8"))["figures"]
    labels = sum(stage["train_labels"] for stage in training["stages"].values())
    return [
        f"Measured on {training['hardware']['cpus']} CPU cores: `prepare` takes "
        f"{around['prepare'][0]:.0f} seconds and `fit-cf` {around['fit_cf'][0]:.0f} for the "
        "million ratings of MovieLens-1M, "
        f"`train` {training['minutes']:.0f} minutes for the {labels:,} labels of the demo.",
    ]


def fast_section() -> list[str]:
    """What packing gives, in a paragraph."""
    training, scoring, packing, *_ = read_measured()
    rates = {name: rate["median"] for name, rate in training["labels_per_second"].items()}
    rank = {name: found["median"] for name, found in scoring["ranking"]["rank"].items()}
    equal = packing["equality"]
    return [
        "All samples of a user share one pass over the history, and two rows of the head are "
        f"multiplied in place of {49152:,}. On {training['hardware']['cpu_cores']} cores, training "
        f"reads {rates['packed, slot']:.0f} labels a second where the same content one row a "
        f"sample gives {rates['alone, slot']:.1f}; with titles {rates['packed, title_slot']:.0f} "
        f"against {rates['alone, title_slot']:.0f}. A user's 100 candidates are ranked in "
        f"{rank['slot']:.1f} seconds, with titles in {rank['title_slot']:.1f}. Packing is exact: "
        f"over {equal['rows']:,} test rows no logit moves by more than {equal['largest']:.0e}.",
    ]


def read_measured() -> list[dict[str, Any]]:
    """The results files of `make bench` that the pages quote."""
    return [json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8")) for name in MEASURED]


def demo_section(metrics: dict[str, Any], training: dict[str, Any]) -> list[str]:
    """The demo's table, its paired differences, and how it was made."""
    hardware, stages = training["hardware"], training["stages"]
    labels = sum(stage["train_labels"] for stage in stages.values())
    precision = "bfloat16" if hardware["bf16_backbone"] else "fp32"
    return [
        f"Book-Crossing, a sample of the test split: {metrics['rows']:,} rows, "
        f"{metrics['users']:,} users. One run of `make demo`: seed {training['recipe']['seed']}, "
        f"{labels:,} training labels, {training['minutes']:.0f} minutes "
        f"of training on {hardware['cpus']} CPU cores, backbone in {precision} "
        f"(torch {training['versions']['torch']}, transformers "
        f"{training['versions']['transformers']}). In brackets: 95 % intervals over users. "
        "Log loss and ECE: CCF-LLM's with the temperature that training fitted on validation, the "
        "others' as they come.",
        "",
        *methods_table(metrics["methods"]),
        "",
        f"{metrics['name']} minus the other method, paired over users:",
        "",
        *differences_table(metrics["differences"]),
    ]


def speed_section() -> list[str]:
    """Speed against fairly written baselines: the figures, the targets, how they were measured."""
    training, scoring, packing, same, residual = read_measured()
    rates, tokens = training["labels_per_second"], training["tokens_per_label"]
    rows = scoring["test_split"]["rows_per_second"]
    rank = scoring["ranking"]["rank"]
    equal = packing["equality"]
    precision = scoring["backbone_precision"]
    fp32, bf16, int8 = (precision[kind] for kind in ("fp32", "bf16", "int8"))
    lines = [
        f"SmolLM2-135M in fp32 on {training['hardware']['cpu_cores']} cores of a server CPU with "
        f"{widest(training)}, window (20, 16). "
        f"On {training['rows']} training rows, forward and backward, LoRA and fusion trainable, "
        "all ways in turns in one process:",
        "",
        "| training on the same rows | tokens a label | labels/s | min to max |",
        "| --- | ---: | ---: | ---: |",
    ]
    for name, text in WAYS.items():
        rate = rates[name]
        lines.append(
            f"| {text} | {tokens[name]:.1f} | {rate['median']:.1f} | "
            f"{rate['min']:.1f} to {rate['max']:.1f} |"
        )
    return [
        *lines,
        "",
        f"The test split is scored at {rows['slot']['median']:.0f} rows/s slot-only and "
        f"{rows['title_slot']['median']:.0f} rows/s with titles (fair baseline: "
        f"{rows['baseline']['median']:.1f}). One user's 100 candidates are ranked in "
        f"{rank['slot']['median']:.2f} s slot-only and {rank['title_slot']['median']:.2f} s with "
        f"titles (median). Packing is exact: over {equal['rows']:,} real test rows no packed logit "
        f"is further than {equal['largest']:.1e} from the logit of the sample alone (their "
        f"standard deviation is {equal['logit_std']:.2f}).",
        "",
        f"Quality on the same {same['labels']:,} labels, as AUC on {same['validation_rows']:,} "
        "validation rows, one seed:",
        "",
        f"- With the gate alone {same_labels(same)}",
        f"- With the CF logit, as in `benchmarks/workload.yaml`, {same_labels(residual)}",
        "",
        f"Serving in bfloat16 scores {bf16['rows_per_second']:.0f} rows/s where fp32 scores "
        f"{fp32['rows_per_second']:.0f}, with AUC {bf16['auc']:.4f} against {fp32['auc']:.4f} on "
        f"{precision['rows']:,} test rows. Dynamic int8 of the linear layers scores "
        f"{int8['rows_per_second']:.0f} with AUC {int8['auc']:.4f}. That is no faster than "
        "bfloat16, and therefore not offered.",
        "",
        *misses(training),
        *table(collect_summary()),
    ]


def widest(training: dict[str, Any]) -> str:
    """The vector instructions that the matrix products were run with."""
    found = training["hardware"]["instructions"]
    return "AVX-512" if "avx512_f" in found else "AVX2"


def same_labels(same: dict[str, Any]) -> str:
    """What the packed and the peers' prompt reach on the same labels."""
    quality, seconds = same["validation"], same["train_seconds"]
    difference = same["auc_difference"]
    low, high = difference["interval"]
    return (
        f"the packed slot-only prompt reaches {quality['packed']['auc']:.3f} after "
        f"{seconds['packed']:.0f} seconds of training. The question-last prompt with ten titles "
        f"reaches {quality['peers']['auc']:.3f} after {seconds['peers']:.0f}. The difference is "
        f"{difference['value']:+.3f}, with a 95 % interval of {low:+.3f} to {high:+.3f}."
    )


def misses(training: dict[str, Any]) -> list[str]:
    """Where the time goes, when a target is missed."""
    missed = [entry["name"] for entry in collect_summary() if not entry["holds"]]
    if not missed:
        return []
    shares = ", ".join(
        f"{name.removeprefix('aten::').strip('_')} {share:.0%}"
        for name, share in list(training["where_time_goes"].items())[:7]
    )
    tokens = training["tokens_per_label"]
    alone, titled = tokens["alone, title_slot"], tokens["packed, title_slot"]
    asked = tokens["question last"]
    return [
        f"The missed targets with title candidates lack tokens. A candidate with its title "
        f"and year is {titled:.1f} tokens a label, the same row alone {alone:.1f}, question last "
        f"{asked:.1f}. At equal speed per token that is {alone / titled:.2f} and "
        f"{asked / titled:.2f} times. The years alone are six of the tokens, and without them both "
        "targets hold.",
        "",
        f"Where the time of a packed training pass goes: {shares}. Compiling norms and "
        "MLP, other tile sizes, batched products or folded heads instead of sdpa, and other batch "
        "sizes were tried and did not pay.",
        "",
    ]


def between(text: str, name: str, lines: list[str]) -> str:
    """`text` with the section called `name` replaced."""
    begin, end = (f"<!-- {name}: {edge} (benchmarks/readme.py) -->" for edge in ("begin", "end"))
    before, _, rest = text.partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        sys.exit(f"the page has no section {name!r}: restore its two marker lines, {begin}")
    return "\n".join([before + begin, "", *lines, "", end + after])


def render() -> dict[Path, str]:
    """The pages with their sections rewritten from the results files and the code."""
    metrics, training = (
        json.loads((DEMO / name).read_text(encoding="utf-8")) for name in COLLECTED
    )
    sections = {
        README: {
            "printed": printed_section(metrics),
            "help": help_section(metrics),
            "minutes": minutes_section(training),
            "fast": fast_section(),
        },
        RESULTS_PAGE: {
            "demo": demo_section(metrics, training),
            **table_pages.page_sections(TABLE, BOOKS),
        },
        SPEED_PAGE: {"speed": speed_section(), "growth": growth_section()},
        RECIPE_PAGE: {
            "run": keys_table(Recipe),
            "stage": keys_table(Stage),
            "sections": sections_table(),
            "training": keys_table(CTRTrainingArguments),
        },
    }
    pages = {}
    for page, parts in sections.items():
        text = page.read_text(encoding="utf-8")
        for name, lines in parts.items():
            text = between(text, name, lines)
        pages[page] = text
    return pages


def growth_section() -> list[str]:
    """Seconds and memory of the steps of a run against the size of the data."""
    points = json.loads(SCALE.read_text(encoding="utf-8"))
    steps = [
        name for name, found in points[0].items() if isinstance(found, dict) and "peak_gb" in found
    ]
    lines = [
        "## Growth with the data",
        "",
        "`python benchmarks/scale.py` runs each step in a process of its own, on generated ratings "
        "with a realistic skew and a tiny backbone, so that what is measured is everything around "
        "the model. Seconds are of one processor thread; peaks hold the imports, some 0.6 GB.",
        "",
        f"| interactions | | {' | '.join(name.replace('_', '-') for name in steps)} |",
        f"| --- | --- |{' ---: |' * len(steps)}",
    ]
    for point in points:
        for key, unit in (("seconds", "s"), ("peak_gb", "GB")):
            found = (point[step][key] for step in steps)
            shown = " | ".join(f"{one:.0f}" if unit == "s" else f"{one:.2f}" for one in found)
            lines.append(f"| {point['rows']:,} | {unit} | {shown} |")
    return lines


def sections_table() -> list[str]:
    """The sections of a stage: their classes, and the keys that a recipe may set."""
    lines = ["| section | class | keys |", "| --- | --- | --- |"]
    for section, kind in SECTIONS.items():
        names = [name for name in fields_of(section) if name not in DECIDED[section]]
        keys = ", ".join(f"`{name}`" for name in names)
        if section == "lora":
            keys = ", ".join(f"`{name}`" for name in RECORDED)
        if section == "training":
            keys = "those below, and every other of transformers' `TrainingArguments`"
        lines.append(f"| `{section}` | `{kind.__name__}` | {keys} |")
    return lines


def keys_table(config: type) -> list[str]:
    """Key, default and help of the fields that a dataclass adds or changes, as a Markdown table."""
    lines = ["| key | default | what it is |", "| --- | --- | --- |"]
    own = [key for key in dataclasses.fields(config) if key.name in config.__annotations__]
    for key in own:
        if key.name == "use_cpu" or (key.name in DECIDED["training"] and config is not Recipe):
            continue  # the machine's, or the run's
        made = key.default_factory
        default = key.default if made is dataclasses.MISSING else made()
        shown = "" if default in ("", [], {}, None) else f"`{json.dumps(default)}`"
        lines.append(f"| `{key.name}` | {shown} | {key.metadata['help']} |")
    return lines


def main() -> None:
    """Collect, write or check."""
    parser = argparse.ArgumentParser(description="Write README figures from results files.")
    parser.add_argument("--collect", type=Path, help="folder of a finished demo run")
    parser.add_argument("--check", action="store_true", help="only compare; write nothing")
    options = parser.parse_args()
    if options.collect:
        collect(options.collect)
    for page, text in render().items():
        if not options.check:
            page.write_text(text, encoding="utf-8")
        elif text != page.read_text(encoding="utf-8"):
            sys.exit(
                f"{page.relative_to(ROOT)} does not match its results files or the code: run "
                "python benchmarks/readme.py"
            )


if __name__ == "__main__":
    main()
