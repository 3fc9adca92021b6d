"""`emkum compare`: variants of one recipe, run one after the other at equal numbers of updates, and one table."""

import argparse
import json
import re
from pathlib import Path
from typing import Any

from emkum.commands.kept_run import KeptRun, run_emkum
from emkum.commands.train import LOG_NAME
from emkum.errors import UserError
from emkum.provenance import write_json
from emkum.recipe import PRESET, parse_overrides, read_mapping, read_recipe

COLUMNS = {
    "name": "variant",
    "first_loss": "loss at first",
    "last_loss": "at last",
    "metric": "own metric",
    "first_metric": "at first",
    "last_metric": "at last",
    "mean_recall": "mean recall %",
    "step_ms": "ms an update",
    "memory": "peak MiB",
}
_KEYS = {"recipe", "options", "metrics", "variants"}


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "compare",
        help="run variants of a recipe and compare them in one table",
        description="Train each variant that a YAML file names, one after the other, and write a table of losses, "
        "recall, time and memory. A variant that is finished is not run again; one that was stopped goes on.",
        epilog="example: emkum compare examples/compare/objectives.yaml data=data/scenes --out runs/objectives",
    )
    parser.add_argument("file", type=Path, help="YAML file with recipe, options of all, and variants by name")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="options of all variants")
    parser.add_argument("--out", required=True, type=Path, help="folder for the runs and the table")
    parser.add_argument("--only", default="", metavar="NAME,NAME", help="these variants alone")
    parser.set_defaults(run=run)


def read_variants(path: Path) -> dict[str, Any]:
    """The content of a file of variants, with all its keys.

    Raises:
        UserError: it cannot be read, or is no such file.
    """
    content = read_mapping(path, "file of variants")
    if not {"recipe", "variants"} <= content.keys() <= _KEYS:
        raise UserError(f"{path}: want a mapping with recipe, variants and, if need be, options and metrics")
    content = {"options": {}, "metrics": {}} | {key: value or {} for key, value in content.items()}
    for part in ("options", "metrics", "variants"):
        if not isinstance(content[part], dict):
            raise UserError(f"{path}: {part} is no mapping")
    wrong = [name for name, options in content["variants"].items() if not isinstance(options or {}, dict)]
    wrong += [name for name in content["metrics"] if name not in content["variants"]]
    if wrong:
        raise UserError(f"{path}: {wrong[0]!r} is no variant with a mapping of options")
    return content


def run(args: argparse.Namespace) -> None:
    content = read_variants(args.file)
    variants = content["variants"]
    chosen = [name.strip() for name in args.only.split(",") if name.strip()] or list(variants)
    unknown = [name for name in chosen if name not in variants]
    if unknown:
        raise UserError(f"--only {unknown[0]!r}: {args.file} has the variants {', '.join(variants)}")
    recipe = args.file.parent / content["recipe"]
    common = content["options"] | parse_overrides(args.overrides)
    results = []
    for name in chosen:
        options = common | (variants[name] or {})
        print(f"emkum: variant {name}", flush=True)
        results.append({"name": name, **_result(recipe, options, args.out / _folder_name(name))})
        results[-1] |= _own_metric(results[-1].pop("records", []), content["metrics"].get(name))
    _write_table(args.out, results)
    failed = [result["name"] for result in results if "last_loss" not in result]
    if failed:
        raise UserError(f"did not finish: {', '.join(failed)}; their logs are below {args.out}")


def _folder_name(name: str) -> str:
    return re.sub(r"[^\w.+-]+", "_", name)


def _result(recipe: Path, options: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Train one variant, unless that is done, and read its figures."""
    from emkum.training_log import read_training_log

    # Resolved, so that a recipe which has changed since is run again.
    options = read_recipe(recipe, options.get(PRESET)) | options | {"save_dir": str(folder)}
    kept = KeptRun(folder / "cost.json", {"options": options})
    if not kept.is_finished() or kept.differing():
        words = [f"{key}={json.dumps(value)}" for key, value in options.items()]
        if not kept.carry_out(lambda: run_emkum(["train", str(recipe), *words]))["finished"]:
            return {}
    histories = read_training_log(folder / LOG_NAME)
    records, validations = histories.get("train_inner", []), histories.get("valid", [])
    if not records:
        raise UserError(f"{folder / LOG_NAME} has no losses: give a log_interval below max_update")
    # The first interval has the warming up of caches and workers in it.
    rates = [record["ups"] for record in records[1:] if record.get("ups")]
    return {
        "first_loss": records[0]["loss"],
        "last_loss": records[-1]["loss"],
        "mean_recall": validations[-1].get("mean_recall") if validations else None,
        "step_ms": round(1000 * len(rates) / sum(rates)) if rates else None,
        "memory": kept.record()["memory"],
        "records": records,
    }


def _own_metric(records: list[dict[str, float]], key: str | None) -> dict[str, Any]:
    if key is None or not records:
        return {}
    if key not in records[0]:
        # Hours of training may lie behind it: the table is written all the same.
        return {"metric": f"{key} (is not logged)"}
    return {"metric": key, "first_metric": records[0][key], "last_metric": records[-1][key]}


def _write_table(folder: Path, results: list[dict[str, Any]]) -> None:
    from emkum.evaluation.report import format_table

    columns = {key: title for key, title in COLUMNS.items() if any(key in result for result in results)}
    write_json(folder / "comparison.json", {"results": results})
    table = format_table(results, columns, decimals=3, markdown=True)
    (folder / "comparison.md").write_text(table + "\n", encoding="utf-8")
    print(format_table(results, columns, decimals=3))
    print(f"written to {folder / 'comparison.md'}")
