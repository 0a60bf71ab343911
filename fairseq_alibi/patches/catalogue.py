"""Every function of fairseq 0.12.2 that this package replaces, in one list, and `apply`."""

import logging
import sys

import fairseq

from . import checkpoint_files, compatibility, data, generation, option_checks, restart, sharding, training_state
from .patch import Patch

logger = logging.getLogger(__name__)

FAIRSEQ_VERSION = "0.12.2"  # the version of fairseq that the patches are made for

PATCHES = (
    Patch(
        target="numpy:compat",
        replacement=compatibility.NUMPY_COMPAT,
        what="Gives numpy 2 the `numpy.compat.long` of numpy 1.",
        why="fairseq-interactive and --sample-break-mode eos end with an AttributeError.",
        source="fairseq/data/token_block_dataset.py:125",
        removable="when fairseq no longer uses numpy.compat",
        only_if_missing=True,
    ),
    Patch(
        target="fairseq.modules.transformer_layer:TransformerEncoderLayerBase.can_use_fastpath",
        replacement=compatibility.NO_FAST_PATH,
        what="Lets fairseq's own encoders compute without torch's fused encoder layer.",
        why="Evaluation and generation end with 'Mask Type should be defined', in ensembles with our models too.",
        source="fairseq/modules/transformer_layer.py:110",
        removable="when fairseq passes the type of the mask",
        only_if_missing=True,
    ),
    Patch(
        target="fairseq.distributed.utils:_broadcast_object_slow",
        replacement=compatibility.broadcast_object,
        what="Sends a checkpoint to the other processes through torch's `broadcast_object_list`.",
        why="fairseq sends it as a file of torch's, of which the safe loader refuses the configuration.",
        source="fairseq/distributed/utils.py:749",
        removable="when fairseq broadcasts objects through torch",
    ),
    Patch(
        target="fairseq.data.data_utils:batch_by_size",
        replacement=data.batch_by_size,
        what="Makes a batch of its own of a sample that is longer than --max-tokens.",
        why="fairseq ends with an AssertionError, for validation after the first epoch, before anything is saved.",
        source="fairseq/data/data_utils.py:282",
        removable="when fairseq batches long samples, or refuses them before the first update",
    ),
    Patch(
        target="fairseq.tasks.fairseq_task:FairseqTask.filter_indices_by_size",
        replacement=data.filter_indices_by_size,
        what="Refuses samples that are longer than the model's longest sequence in one line with the remedy.",
        why="fairseq ends with a traceback.",
        source="fairseq/tasks/fairseq_task.py:167",
        removable="when fairseq says it in one line",
    ),
    Patch(
        target="fairseq.tasks.language_modeling:LanguageModelingTask.eval_lm_dataloader",
        replacement=data.eval_lm_dataloader,
        what="Leaves out samples only with --skip-invalid-size-inputs-valid-test, as in validation.",
        why="fairseq-eval-lm leaves them out always and reports the perplexity of the others.",
        source="fairseq/tasks/language_modeling.py:340",
        removable="when fairseq-eval-lm honours the option",
    ),
    Patch(
        target="fairseq.data.iterators:EpochBatchIterator._get_iterator_for_epoch",
        replacement=data.get_iterator_for_epoch,
        what="Leaves out the last batch alone with --skip-remainder-batch, after a restart too.",
        why="An epoch that was resumed ends early by as many batches as were read before.",
        source="fairseq/data/iterators.py:477",
        removable="when fairseq counts from the start of the epoch",
    ),
    Patch(
        target="fairseq.data.iterators:BackgroundConsumer.run",
        replacement=data.consume_batches,
        what="Ends the processes that load batches when the last batch is there.",
        why="They end when the garbage collector finds their loader, which then waits 5 seconds and kills them.",
        source="fairseq/data/iterators.py:666",
        removable="when fairseq's loaders are not persistent, as each is used for one epoch",
    ),
    Patch(
        target="fairseq.models:DistributedFairseqModel",
        replacement=compatibility.wrap_model,
        what="Sets --find-unused-parameters for the models of this package.",
        why="An unused band of an adaptive vocabulary ends training in several processes with an error.",
        source="fairseq/models/distributed_fairseq_model.py:35",
        removable="when DistributedDataParallel finds unused parameters by itself",
    ),
    Patch(
        target="fairseq.checkpoint_utils:overwrite_args_by_name",
        replacement=option_checks.overwrite_args_by_name,
        what="Sets options of --model-overrides that an older checkpoint lacks; refuses values of another kind.",
        why="fairseq ignores them silently, and takes 'False' for true.",
        source="fairseq/dataclass/utils.py:453",
        removable="when fairseq sets or refuses every override",
    ),
    Patch(
        target="fairseq.checkpoint_utils:load_checkpoint_to_cpu",
        replacement=checkpoint_files.load_checkpoint_to_cpu,
        what="Compares a checkpoint's checksums, always uses torch's safe loader, and refuses in one line.",
        why="A flipped bit is evaluated silently, TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD lets files run code.",
        source="fairseq/checkpoint_utils.py:281",
        removable="when fairseq checks what it reads",
    ),
    Patch(
        target="fairseq.checkpoint_utils:load_model_ensemble_and_task",
        replacement=checkpoint_files.load_model_ensemble_and_task,
        what="Refuses a checkpoint whose options and weights do not fit each other, or that is missing, in one line.",
        why="fairseq ends with a traceback.",
        source="fairseq/checkpoint_utils.py:394",
        removable="when fairseq says it in one line",
    ),
    Patch(
        target="fairseq.models:build_model",
        replacement=checkpoint_files.build_known_model,
        what="Names the architecture that is not known.",
        why="fairseq ends with a KeyError: '_name'.",
        source="fairseq/models/__init__.py:56",
        removable="when fairseq names it",
    ),
    Patch(
        target="fairseq.trainer:Trainer.load_checkpoint",
        replacement=checkpoint_files.load_training_checkpoint,
        what="Refuses a checkpoint of another model or optimizer than the run's in one line.",
        why="fairseq ends with several tracebacks.",
        source="fairseq/trainer.py:448",
        removable="when fairseq says it in one line",
    ),
    Patch(
        target="fairseq.checkpoint_utils:torch_persistent_save",
        replacement=checkpoint_files.torch_persistent_save,
        what="Writes under a name of the process's own, renames what is on the disk, and removes what failed.",
        why="A crash of the system can leave half a file; a full disk ends in tracebacks and leaves a .tmp file.",
        source="fairseq/checkpoint_utils.py:549",
        removable="when fairseq syncs and cleans up",
    ),
    Patch(
        target="fairseq.file_io:PathManager.copy",
        replacement=checkpoint_files.copy,
        what="Copies under a temporary name and renames.",
        why="fairseq copies onto checkpoint_last.pt, so that a kill leaves half a file.",
        source="fairseq/file_io.py:71",
        removable="when fairseq copies atomically",
    ),
    Patch(
        target="fairseq.checkpoint_utils:load_checkpoint",
        replacement=restart.load_checkpoint,
        what="Resumes from the newest good checkpoint, exactly at the end of an epoch too; handles SIGTERM from now on",
        why="fairseq ends with a traceback at a broken checkpoint_last.pt and skips one step of the learning rate.",
        source="fairseq/checkpoint_utils.py:188",
        removable="when fairseq restarts exactly",
    ),
    Patch(
        target="fairseq.options:parse_args_and_arch",
        replacement=option_checks.parse_args_and_arch,
        what="Adds the options of --arch to the help of fairseq's commands, and refuses a model in a wrong task.",
        why="fairseq-train --help shows no option of a model; other tasks, and --fp16 with --bf16, end in tracebacks.",
        source="fairseq/options.py:88",
        removable="when fairseq parses --help after it has added the options of the model",
    ),
    Patch(
        target="fairseq.distributed.utils:call_main",
        replacement=option_checks.call_main,
        what="Refuses options that cannot work, and lets --bf16 run on a GPU.",
        why="fairseq sets --tpu for --bf16, and ends with tracebacks after the model is built.",
        source="fairseq/distributed/utils.py:334",
        removable="when fairseq checks its options",
    ),
    Patch(
        target="fairseq_cli.generate:main",
        replacement=generation.generate,
        what="Refuses options that cannot work, as `call_main` does for the other commands.",
        why="fairseq-generate does not go through `call_main`: made-up --model-overrides are ignored silently.",
        source="fairseq_cli/generate.py:28",
        removable="when fairseq-generate calls `call_main`",
        in_command=True,
    ),
    Patch(
        target="fairseq.tasks.denoising:DenoisingTask.add_args",
        replacement=option_checks.add_denoising_args,
        what="Lets transformers be trained in the tasks denoising and multilingual_denoising.",
        why="argparse refuses --max-source-positions, which the model has added already.",
        source="fairseq/tasks/denoising.py:39",
        removable="when the task does not add it",
    ),
    Patch(
        target="fairseq_cli.eval_lm:eval_lm",
        replacement=option_checks.eval_lm,
        what="Ends with an error if no token was scored.",
        why="fairseq reports a perplexity of 1.00.",
        source="fairseq_cli/eval_lm.py:37",
        removable="when fairseq counts what it scored",
        in_command=True,
    ),
    Patch(
        target="fairseq.data.bucket_pad_length_dataset:get_buckets",
        replacement=data.get_buckets,
        what="Calls numpy.percentile as numpy 2 wants it.",
        why="--num-batch-buckets ends with a TypeError.",
        source="fairseq/data/data_utils.py:555",
        removable="when fairseq calls it so",
    ),
    Patch(
        target="fairseq.data.indexed_dataset:infer_dataset_impl",
        replacement=data.infer_dataset_impl,
        what="Reads data of --dataset-impl lazy and cached lazily.",
        why="Training with fairseq's cached reader ends with a KeyError.",
        source="fairseq/data/indexed_dataset.py:42",
        removable="when fairseq's cached reader works in training",
    ),
    Patch(
        target="fairseq.data.indexed_dataset:get_indexed_dataset_to_local",
        replacement=data.get_indexed_dataset_to_local,
        what="Finds the files that `fairseq-preprocess --only-source --dataset-impl raw` writes.",
        why="Their names end in .None-None, and language modelling does not find them.",
        source="fairseq/data/indexed_dataset.py:546",
        removable="when fairseq writes the names that it reads",
    ),
    Patch(
        target="fairseq.data.indexed_dataset:make_dataset",
        replacement=data.make_dataset,
        what="Names the files of a subset that are broken or hold no text.",
        why="fairseq ends with a traceback.",
        source="fairseq/data/indexed_dataset.py:77",
        removable="when fairseq names them",
    ),
    Patch(
        target="fairseq.tasks.masked_lm:get_whole_word_mask",
        replacement=data.get_whole_word_mask,
        what="Finds the words for --mask-whole-words by the marks of subwords in dict.txt.",
        why="fairseq asks the BPE of the options, which has no such method for subword-nmt.",
        source="fairseq/tasks/masked_lm.py:182",
        removable="when fairseq's masked_lm knows the BPE",
    ),
    Patch(
        target="fairseq.tasks.masked_lm:MaskedLMTask.args",
        replacement=False,
        what="Lets the task have the attribute `args`, which `get_whole_word_mask` no longer reads.",
        why="--mask-whole-words ends with an AttributeError.",
        source="fairseq/tasks/masked_lm.py:182",
        removable="when fairseq's masked_lm no longer reads it",
        only_if_missing=True,
    ),
    Patch(
        target="fairseq.trainer:Trainer._build_optimizer",
        replacement=option_checks.build_optimizer,
        what="Refuses options that the optimizer or its scheduler cannot use, and overrides that it does not have.",
        why="fairseq ends with a traceback, and ignores made-up names in --optimizer-overrides.",
        source="fairseq/trainer.py:290",
        removable="when fairseq checks its options",
    ),
    Patch(
        target="fairseq.trainer:Trainer.save_checkpoint",
        replacement=training_state.save_checkpoint,
        what="Saves the counters of --patience, reduce_lr_on_plateau, the loss scaler and --ema-update-freq too.",
        why="They start from 0 at a restart, and the run ends with other parameters.",
        source="fairseq/trainer.py:433",
        removable="when fairseq saves them",
    ),
    Patch(
        target="fairseq_cli.train:Trainer",
        replacement=sharding.make_trainer,
        what="Trains models of this package with --ddp-backend fully_sharded on torch's FSDP2.",
        why="fairseq needs fairscale, which had its last release in 2022, and refuses --bf16.",
        source="fairseq/trainer.py:37",
        removable="when fairseq shards with torch",
        in_command=True,
    ),
    Patch(
        target="fairseq_cli.train:fsdp_enable_wrap",
        replacement=sharding.fsdp_enable_wrap,
        what="Does nothing without fairscale.",
        why="fairseq ends with an ImportError.",
        source="fairseq/distributed/fully_sharded_data_parallel.py:80",
        removable="with that of Trainer",
        in_command=True,
    ),
    Patch(
        target="fairseq_cli.train:fsdp_wrap",
        replacement=sharding.fsdp_wrap,
        what="Leaves models of this package as they are, and refuses others in one line without fairscale.",
        why="fairseq ends with an ImportError, or wraps the model in fairscale's class.",
        source="fairseq/distributed/fully_sharded_data_parallel.py:114",
        removable="with that of Trainer",
        in_command=True,
    ),
    Patch(
        target="fairseq_cli.train:train",
        replacement=restart.train,
        what="Makes no update in a run that has them all or was ended by --patience; shuffles after --curriculum.",
        why="fairseq makes one more at each restart, and shuffles after --curriculum only in a run that was restarted.",
        source="fairseq_cli/train.py:246",
        removable="when fairseq looks at --max-update before an update",
        in_command=True,
    ),
    Patch(
        target="fairseq_cli.train:validate_and_save",
        replacement=restart.validate_and_save,
        what="Saves and stops after SIGTERM.",
        why="fairseq dies at once and loses the updates since the last checkpoint.",
        source="fairseq_cli/train.py:360",
        removable="when fairseq handles SIGTERM",
        in_command=True,
    ),
)


def apply(in_command: bool = False) -> None:
    """Applies the patches, once; with `in_command` also those that need one of fairseq's commands under way.

    Under fairseq-hydra-train a command is under way when it imports this package.
    """
    if not in_command:
        if fairseq.__version__ != FAIRSEQ_VERSION:
            logger.warning(
                "fairseq %s is installed, but the patches of fairseq_alibi are made for %s and may not fit: "
                "pip install --no-deps fairseq==%s",
                *(fairseq.__version__, FAIRSEQ_VERSION, FAIRSEQ_VERSION),
            )
        compatibility.silence_known_warnings()
        compatibility.allow_fairseq_checkpoints()
    for patch in PATCHES:
        command = sys.modules.get(patch.target.partition(":")[0])
        if in_command or not patch.in_command or hasattr(command, "cli_main"):  # the last function of its module
            patch.apply()
