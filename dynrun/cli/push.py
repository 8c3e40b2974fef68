"""`dynrun push`: publish a folder of made files on the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dynrun.cli import options
from dynrun.cli.output import emit, megabytes, say

if TYPE_CHECKING:
    from dynrun.publish.plan import PushPlan

License = Annotated[
    str, typer.Option("--license", metavar="ID", help="Of the original model, as apache-2.0, where the card has none.")
]
BaseModel = Annotated[
    str, typer.Option("--base-model", metavar="OWNER/NAME", help="The original model, where the card has none.")
]


def push(
    folder: Annotated[Path, typer.Argument(help="What `make --out FOLDER` wrote: files, schemes, imatrix, report.")],
    repository: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="The repository; made where it is missing.")],
    license_id: License = "",
    base_model: BaseModel = "",
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    message: Annotated[str, typer.Option("--message", help="Of the commit.")] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show files and card; send nothing.")] = False,
    as_json: options.AsJson = False,
) -> None:
    """Publish made files with imatrix, schemes and model card, in one commit; run again, it goes on where it stopped.

    Example: dynrun push quants/ me/Qwen3-4B-GGUF --license apache-2.0 --base-model Qwen/Qwen3-4B --dry-run
    """
    from dynrun.publish.plan import plan_push
    from dynrun.publish.push import push as push_plan

    plan = plan_push(folder.expanduser(), repository, license=license_id, base_model=base_model)
    for note in plan.notes:
        say(f"note: {note}")
    if dry_run:
        emit(as_json, {**_to_json(plan), "url": None, "commit": None}, lambda: _show(plan))
        return
    pushed = push_plan(plan, say, private=private, message=message)
    data = {**_to_json(plan), "url": pushed.url, "commit": pushed.commit}
    emit(as_json, data, lambda: print(f"{len(plan.files)} files, {megabytes(plan.size_bytes)}: {pushed.url}"))


def _to_json(plan: PushPlan) -> dict[str, Any]:
    files = [{"path": file.name, "size_bytes": file.size_bytes, "sha256": file.sha256} for file in plan.files]
    return {
        "repository": plan.repository,
        "files": files,
        "size_bytes": plan.size_bytes,
        "card": dict(plan.front_matter),
        "notes": list(plan.notes),
    }


def _show(plan: PushPlan) -> None:
    for file in plan.files:
        print(f"{file.size_bytes:>15,}  {file.sha256[:12]}  {file.name}")
    print(f"{plan.size_bytes:>15,}  in all, to {plan.repository}; nothing was sent")
    print("\nthe card begins with")
    for key, value in plan.front_matter.items():
        print(f"  {key}: {', '.join(map(str, value)) if isinstance(value, list) else value}")
