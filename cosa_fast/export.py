"""A checkpoint for other programs: `python -m cosa_fast.export CKPT --format safetensors|torch-export|onnx`."""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from cosa_fast.cli import NETWORKS, CommandLine, add_network, require_two_networks, run_cli
from cosa_fast.data_pipeline.datasets.opening import open_dataset
from cosa_fast.errors import UserError, counted, first_line
from cosa_fast.evaluation.exporting import FILES, FORMATS, SMALLEST, export, facts
from cosa_fast.evaluation.networks import Networks, load_networks
from cosa_fast.evaluation.prediction import file_sources, shrunk
from cosa_fast.files import require_place, write_json, write_text
from cosa_fast.report.card import card
from cosa_fast.run.folder import RunFolder

# To check with: so many images, no longer than this.
IMAGES, LONGEST = 4, 640


def main(argv: list[str] | None = None) -> int:
    """Export, check, describe and, where asked to, publish. Returns the exit status."""
    arguments = _parser().parse_args(argv)
    run = RunFolder(arguments.checkpoint.resolve().parent.parent)
    output = arguments.output or _default_output(arguments.checkpoint, run)
    if arguments.output or arguments.checkpoint.is_file():
        require_place(output, "-o", folder=True)
    networks = load_networks(arguments.checkpoint)
    require_two_networks(arguments.network, str(arguments.checkpoint), networks.single)
    name = NETWORKS[arguments.network or "an"]
    images, origin = _images(networks, arguments.images)
    agreement = export(networks, name, arguments.format, output / FILES[arguments.format], images)
    print(
        f"checked on {counted(agreement.images, 'image')} {origin}: {agreement.pixels:.3%} of the pixels as PyTorch's, "
        f"logits within {agreement.largest:.1g}"
    )
    write_json(output / "preprocessing.json", facts(networks))
    write_text(output / "README.md", card(networks, name, arguments.format, run, agreement, arguments.license))
    print(f"written: {output / FILES[arguments.format]}, preprocessing.json, README.md (the model card)")
    if arguments.push_to_hub:
        print(f"published: {push_to_hub(output, arguments.push_to_hub, private=arguments.private)}")
    return 0


def push_to_hub(folder: Path, repository: str, *, private: bool) -> str:
    """Upload the folder's files to OWNER/NAME on the hub of Hugging Face, which is made if absent, with the account
    that huggingface_hub is logged in with; returns the address. UserError where that fails."""
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        address = api.create_repo(repository, private=private, exist_ok=True)
        files = ["README.md", "preprocessing.json", *FILES.values()]
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            allow_patterns=files,
            commit_message="Upload of python -m cosa_fast.export",
        )
    except Exception as error:  # of the network, the account, the name: each library version has its own
        raise UserError(
            f"--push-to-hub {repository}: {first_line(error)}; the files are in {folder}. Log in with: hf auth login"
        ) from error
    return str(address)


def _default_output(checkpoint: Path, run: RunFolder) -> Path:
    """runs/NAME/export for a checkpoint of a run; else a folder beside the file."""
    return run.path / "export" if run.config.is_file() else checkpoint.resolve().parent / f"{checkpoint.stem}_export"


def _images(networks: Networks, places: Sequence[Path]) -> tuple[list[Image.Image], str]:
    """Images to check with, and where they are from: those given, else of the evaluation's split, else noise."""
    if places:
        found = [source.read() for source in file_sources(places)[:IMAGES]]
        return [_fitting(image) for image in found], f"of {places[0]}"
    data = networks.config.data
    try:
        split = data.val_split or data.train_split
        dataset = open_dataset(data.format, data.root, split, classes=data.classes, need_labels=False)
        count = min(IMAGES, len(dataset))
        found = [dataset.image(position * len(dataset) // count) for position in range(count)]
        return [_fitting(image) for image in found], f"of {split}"
    except UserError:
        generator = torch.Generator().manual_seed(0)
        noise = [torch.randint(0, 256, (h, w, 3), generator=generator) for h, w in ((160, 224), (333, 250))]
        return [Image.fromarray(each.byte().numpy()) for each in noise], "of noise (no data set at hand: --images)"


def _fitting(image: Image.Image) -> Image.Image:
    """Within the bounds of the exported graph, and quick to check."""
    image = shrunk(image, LONGEST)
    return image.resize((max(image.width, SMALLEST), max(image.height, SMALLEST)))


def _parser() -> CommandLine:
    parser = CommandLine(
        prog="python -m cosa_fast.export",
        description="A network for other programs, checked on images, with preprocessing.json and a model card.",
    )
    parser.add_argument("checkpoint", type=Path, help="a file of runs/NAME/checkpoints")
    parser.add_argument(
        "--format", choices=FORMATS, default=FORMATS[0], help=f"default: {FORMATS[0]}, which predict takes, too"
    )
    parser.add_argument("-o", "--output", type=Path, metavar="DIR", help="default: runs/NAME/export")
    add_network(parser)
    parser.add_argument(
        "--images",
        type=Path,
        nargs="+",
        default=[],
        metavar="IMAGE",
        help=f"to check with, the first {IMAGES}; default: of the evaluation's split",
    )
    parser.add_argument("--license", default="other", metavar="ID", help="for the card, e.g. apache-2.0")
    parser.add_argument("--push-to-hub", metavar="OWNER/NAME", help="publish the folder on the hub of Hugging Face")
    parser.add_argument(
        "--private", action="store_true", needs="--push-to-hub", help="with --push-to-hub: for yourself alone"
    )
    return parser


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
