"""What a Trainer does about the Hub, for specialists: their card, their files, and no run that a push can end."""

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from transformers.trainer_utils import HubStrategy
from transformers.utils import PushInProgress, logging

from .card import refresh_card
from .folder import publishable_files
from .push import PushError, create_repo, push_command, push_or_explain
from .record import TrainingRecord, write_training_record


__all__ = ["HubMixin"]

logger = logging.get_logger(__name__)


class HubMixin:
    """Mixed into a [`~transformers.Trainer`], before it in the bases, whose `output_dir` is pushed.

    A Hub that cannot be reached never ends a run: the folder is complete, and the log has the command that pushes it
    later. One that refuses the token or the name is told before the first step, where that is known.
    """

    def training_record(self) -> TrainingRecord:
        """What is known of the training now; the card is written from it. For trainers to override."""
        return TrainingRecord()

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Makes the repository `hub_model_id` of the main process, or warns if the Hub cannot be reached.

        Raises:
            PushError: if the Hub refuses.
            ValueError: if it is to be private, and is there and public.
        """
        self.push_in_progress = None
        self.hub_api = HfApi(token=token or self.args.hub_token)  # its jobs run one after another
        if not self.is_world_process_zero():
            return
        args = self.args
        self.hub_model_id = args.hub_model_id or Path(args.output_dir).absolute().name
        private = args.hub_private_repo if private is None else private
        command = push_command(args.output_dir, self.hub_model_id, private, args.hub_revision)
        try:
            self.hub_model_id = create_repo(self.hub_model_id, command, private, token or args.hub_token)
        except PushError as error:
            if error.status is not None and error.status < 500:
                raise
            logger.warning(f"Training goes on without the Hub. {error}")

    def create_model_card(
        self,
        language: str | list[str] | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """Writes the training record, and the card from it, into `output_dir`, in the main process.

        Args:
            language, license: recorded.
            finetuned_from: Hub name of the target, recorded.
            dataset_tags: Hub names of datasets, recorded.
            tags, model_name, tasks, dataset, dataset_args: as in the base class, and not used.
        """
        if self.is_world_process_zero():
            self._write_record(
                language=language, license=license, finetuned_from=finetuned_from, dataset_tags=dataset_tags
            )
            try:
                refresh_card(self.args.output_dir, getattr(self, "hub_model_id", None))
            except FileNotFoundError as error:  # an adapter, or nothing was saved: no reason to end a run
                logger.warning(f"No model card was written. {error}")

    def _write_record(
        self,
        language: str | list[str] | None = None,
        license: str | None = None,
        finetuned_from: str | None = None,
        dataset_tags: str | list[str] | None = None,
        **others: Any,
    ) -> None:
        given = {
            "base_model": finetuned_from,
            "license": license,
            "language": [language] if isinstance(language, str) else language,
            "datasets": [dataset_tags] if isinstance(dataset_tags, str) else dataset_tags,
        }
        record = replace(self.training_record(), **{name: value for name, value in given.items() if value})
        write_training_record(self.args.output_dir, record)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Saves the specialists with record and card, and uploads what [`publishable_files`] names.

        Args:
            commit_message, token, revision, private: as in the base class.
            blocking: waits for the upload.
            kwargs: of [`create_model_card`].

        Returns:
            URL of the repository; None if it was not pushed, which the log explains, or in other processes. With
            `blocking=False` a `Future` of it.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        args = self.args
        if getattr(self, "hub_model_id", None) is None:
            self.init_hf_repo(token, private)
        self._wait_for_pushes()
        self.save_model(_internal_call=True)  # every process takes part, one writes
        if not self.is_world_process_zero():
            return None
        self._write_record(**kwargs)  # the card follows from it with the push
        settings = {
            "private": args.hub_private_repo if private is None else private,
            "token": token or args.hub_token,
            "revision": revision or args.hub_revision,
            "commit_message": commit_message or "End of training",
        }
        if blocking:
            return push_or_explain(args.output_dir, self.hub_model_id, **settings)
        future = self.hub_api.run_as_future(push_or_explain, args.output_dir, self.hub_model_id, **settings)
        self.push_in_progress = PushInProgress([future])
        return future

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Uploads a checkpoint's specialists in the background, as `hub_strategy` says."""
        args = self.args
        if not self.is_world_process_zero() or args.hub_strategy == HubStrategy.END:
            return
        if self.push_in_progress is not None and not self.push_in_progress.is_done() and not args.hub_always_push:
            return
        self.callback_handler.on_push_begin(args, self.state, self.control)
        self._wait_for_pushes()  # which read the files that are written next
        try:
            # Copies: the checkpoint may be deleted while they are uploaded.
            for name in publishable_files(checkpoint_folder):
                copy = Path(args.output_dir) / name
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(Path(checkpoint_folder) / name, copy)
        except FileNotFoundError:  # sharded checkpoints, and those of adapters
            logger.warning_once(
                "Checkpoints hold no model.safetensors and are not pushed while training goes on; the end of it is."
            )
            return
        self._write_record()
        message = f"Training in progress, step {self.state.global_step}"
        settings = {
            "private": args.hub_private_repo,
            "token": args.hub_token,
            "revision": args.hub_revision,
            "commit_message": message,
        }
        jobs = [self.hub_api.run_as_future(push_or_explain, args.output_dir, self.hub_model_id, **settings)]
        if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            last = args.hub_strategy == HubStrategy.CHECKPOINT
            jobs.append(
                self.hub_api.upload_folder(
                    repo_id=self.hub_model_id,
                    folder_path=checkpoint_folder,
                    path_in_repo="last-checkpoint" if last else os.path.basename(checkpoint_folder),
                    commit_message=f"{message}, checkpoint",
                    revision=args.hub_revision,
                    run_as_future=True,
                )
            )
        self.push_in_progress = PushInProgress(jobs)

    def _wait_for_pushes(self) -> None:
        if getattr(self, "push_in_progress", None) is not None and not self.push_in_progress.is_done():
            logger.info("Waiting for the upload of a checkpoint.")
            self.push_in_progress.wait_until_done()
