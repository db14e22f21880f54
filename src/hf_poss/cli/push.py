"""`hf-poss push`: specialists on the Hub."""

import argparse

from .card import add_record_arguments, write_records


__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="specialists, saved by this package")
    parser.add_argument("repo_id", help="name or owner/name; made if it is not there")
    add_record_arguments(parser)
    parser.add_argument("--private", action="store_true", default=None, help="for a repository that is made")
    parser.add_argument("--revision", help="branch, made if it is not there (default: main)")
    parser.add_argument("--token", help="of the Hub (default: that of `hf auth login`)")
    parser.add_argument("--commit_message", default="Upload position specialists", help="(default: %(default)s)")
    parser.add_argument("--dry_run", action="store_true", help="complete the folder and print what would be uploaded")


def run(args: argparse.Namespace) -> int:
    from ..hub.folder import read_config
    from ..hub.push import complete_folder, describe_upload, push_folder

    read_config(args.folder)  # before anything is written
    write_records(args)
    if args.dry_run:
        complete_folder(args.folder, args.repo_id)
        print(describe_upload(args.folder))
        return 0
    url = push_folder(
        args.folder,
        args.repo_id,
        private=args.private,
        token=args.token,
        revision=args.revision,
        commit_message=args.commit_message,
        on_plan=print,
    )
    print(url)
    return 0
