"""Remove objects in the browser, and see how the experts were routed.

python app.py                                            bundled model, checkpoint of `make demo`
python app.py --checkpoint outputs/mine/checkpoint-1000  another checkpoint
python app.py --flux_fill_id black-forest-labs/FLUX.1-Fill-dev --checkpoint DIR
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "demo"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "flux_removal"))

import torch

from image_session.removal_session import MOST_STEPS, RemovalSession
from options.train_options import BUNDLED_MODEL
from remove import DTYPES
from sample_photos import sample_photos

DEMO_CHECKPOINT = Path(__file__).resolve().parents[2] / "outputs" / "demo" / "checkpoint"

NO_CHECKPOINT = (
    "No checkpoint is loaded, so that the bundled model works without experts. `make demo` trains "
    "one in a few minutes; then start the app again. `--checkpoint` names another."
)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--flux_fill_id", default=str(BUNDLED_MODEL), help="the base model")
    parser.add_argument(
        "--checkpoint", type=Path, help="a folder checkpoint-N; that of `make demo` by default"
    )
    parser.add_argument("--prompt", help="as in training")
    parser.add_argument("--flux_redux_id", help="as in training")
    parser.add_argument("--redux_scale", type=float, default=1.0, help="as in training")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps, at first")
    parser.add_argument("--device", default="cuda" if cuda else "cpu", help="where to run")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="bf16" if cuda else "fp32", help="of weights"
    )
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in")
    parser.add_argument("--port", type=int, help="the first free one from 7860 up by default")
    parser.add_argument("--most_megapixels", type=float, default=24, help="of a photograph")
    parser.add_argument("--most_megabytes", type=float, default=64, help="of an uploaded file")
    parser.add_argument("--inbrowser", action="store_true", help="open the page in a browser")
    return parser


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; what cannot be honored ends the program with a message."""
    parser = build_parser()
    args = parser.parse_args(arguments)
    if not 1 <= args.steps <= MOST_STEPS:
        parser.error(f"expected --steps to be in [1, {MOST_STEPS}], but got {args.steps}")
    if args.redux_scale != 1 and args.flux_redux_id is None:
        parser.error("--redux_scale needs --flux_redux_id")
    for name in ("most_megapixels", "most_megabytes"):
        if not getattr(args, name) > 0:
            parser.error(f"expected --{name} to be > 0, but got {getattr(args, name)}")
    bundled = args.flux_fill_id == str(BUNDLED_MODEL)
    if args.checkpoint is None and bundled and DEMO_CHECKPOINT.is_dir():
        args.checkpoint = DEMO_CHECKPOINT
    return args


def about(args: argparse.Namespace) -> str:
    """Return Markdown on the model and the checkpoint, without the folders of the server."""
    model = "the bundled tiny model" if args.flux_fill_id == str(BUNDLED_MODEL) else (
        f"`{Path(args.flux_fill_id).name}`"
    )  # fmt: skip
    if args.checkpoint is None:
        return f"Base model: {model}. **{NO_CHECKPOINT}**"
    folder = args.checkpoint.resolve()
    return f"Base model: {model}. Checkpoint: `{folder.parent.name}/{folder.name}`."


def main(arguments: Sequence[str] | None = None) -> None:
    """Run as a program."""
    args = parse(arguments)
    session = RemovalSession(
        args.flux_fill_id,
        args.checkpoint,
        device=args.device,
        dtype=DTYPES[args.dtype],
        prompt=args.prompt,
        flux_redux_id=args.flux_redux_id,
        redux_scale=args.redux_scale,
    )
    if args.checkpoint is None:
        print(NO_CHECKPOINT)
    with tempfile.TemporaryDirectory(prefix="moe_lora_app_", ignore_cleanup_errors=True) as name:
        # Gradio reads it once, when it is imported.
        os.environ["GRADIO_TEMP_DIR"] = name
        from web_page.page import build_page, serve

        folder = Path(name)
        page = build_page(
            session,
            sample_photos(folder / "samples"),
            folder,
            about=about(args),
            steps=args.steps,
            most_megapixels=args.most_megapixels,
        )
        address = serve(
            page,
            folder,
            host=args.host,
            port=args.port,
            most_megabytes=args.most_megabytes,
            inbrowser=args.inbrowser,
            wait=False,
        )
        print(f"Open {address} in a browser. Ctrl-C stops the app.", flush=True)
        page.block_thread()


if __name__ == "__main__":
    main()
