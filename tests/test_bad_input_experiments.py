"""Bad input of plan and reproduce: one line names it, and nothing is lost or half-written.

Every case runs in one folder of files good and bad; it has to look afterwards as it did before.
"""

import pytest
from bad_input import check

pytestmark = pytest.mark.usefixtures("inside_given")

PLAN = "--gpu-memory 80 --types 100"

#: What is run, with what it has to say. The status is 1, or stands before that: 2 where argparse refuses the command.
TABLE = {
    # Data folders with something missing, broken or of another preparation
    "plan tiny.yaml task.data=nowhere --gpu-memory 80": "there is no nowhere/dict.txt",
    "plan tiny.yaml task.data=dict-twice --gpu-memory 80": "dict-twice/dict.txt is no dictionary",
    "reproduce --data nowhere": "there is no nowhere/dict.txt",
    "reproduce --data bin-short --subset valid": "valid.bin does not hold",
    # Configs that are none
    "plan nowhere.yaml --gpu-memory 80": "there is no config nowhere.yaml: name a YAML file",
    "plan folder.pt --gpu-memory 80": "there is no config folder.pt: name a YAML file",
    f"plan broken.yaml {PLAN}": "broken.yaml: .*line 1",
    f"plan list.yaml {PLAN}": "list.yaml: .*must be a DictConfig",
    f"plan binary.yaml {PLAN}": "binary.yaml: 'utf-8' codec",
    f"plan unsafe.yaml {PLAN}": "unsafe.yaml: could not determine a constructor .*os.system",
    f"plan empty.yaml {PLAN}": "model._name is None: only alibi_lm can be planned",
    "plan tiny.yaml --gpu-memory 80": "tiny.yaml does not say how large its vocabulary is: pass",
    f"plan aliases.yaml {PLAN}": "aliases.yaml expands to more than 100,000 values: remove its aliases",
    f"plan circle.yaml {PLAN}": "circle.yaml expands to more than 100,000 values",
    f"plan nested.yaml {PLAN}": "nested.yaml: .*recursion",
    f"plan large.yaml {PLAN}": "large.yaml has more than 1,048,576 bytes",
    f"plan /dev/zero {PLAN}": "there is no config /dev/zero: name",
    # Destinations that hold something, or can hold nothing
    "reproduce --data data --output file": "file/settings.json cannot be written",
    "reproduce --data data --output taken": "taken/settings.json is not ours .*: name another --output",
    # Numbers and names that are wrong
    "plan tiny.yaml --gpu-memory nan --types 100": (2, "'nan' is no such number: pass the GiB"),
    "plan tiny.yaml --gpu-memory 0 --types 100": (2, "'0' is no such number: pass the GiB"),
    "plan configs/wikitext103.yaml --gpu-memory 80 --types 50000": "the options make no model: .*vocab",
    "plan configs/wikitext103.yaml --gpu-memory 80 --gpus 7": "7 GPUs cannot share .*: pass --gpus 1, 2, 3",
    "plan configs/wikitext103.yaml --gpu-memory 2": "not one block of 512 tokens fits 2 GiB: try",
    "plan configs/wikitext103.yaml dataset.max_tokens=500 --gpu-memory 80": "max_tokens=500 holds no block of 512",
    "plan configs/wikitext103.yaml dataset.max_tokens=null --gpu-memory 80": "max_tokens is not set: set it",
    "plan configs/wikitext103.yaml common.amp=true --gpu-memory 80": "common.amp cannot be planned: switch it off",
    "plan configs/wikitext103.yaml model._name=alibi_lm_wiki103 --gpu-memory 80": "alibi_lm_wiki103: .*sizes",
    "plan tiny.yaml --gpu-memory much --types 100": (2, "'much' is no such number: pass the GiB"),
    "plan tiny.yaml --gpu-memory 80 --types 4": "4 types are no vocabulary, 4 of which are special: name",
    "plan tiny.yaml --gpu-memory 80 --types 100 --gpus 0": (2, "'0' is no such number"),
    f"plan tiny.yaml nonsense {PLAN}": "tiny.yaml: Error parsing override 'nonsense'",
    f"plan tiny.yaml model=null {PLAN}": "tiny.yaml: Config group override",
    f"plan tiny.yaml model.decoder_layerz=3 {PLAN}": "tiny.yaml: .*decoder_layerz",
    f"plan tiny.yaml +model.decoder_layerz=3 {PLAN}": "tiny.yaml: .*decoder_layerz",
    f"plan tiny.yaml model.position_method=abacus {PLAN}": "'abacus', expected one of .*alibi",
    f"plan tiny.yaml model.decoder_attention_heads=7 {PLAN}": "the options make no model: .*num_heads",
    f"plan tiny.yaml model.decoder_layers=0 {PLAN}": "model.decoder_layers is 0: set it to a whole number",
    f"plan tiny.yaml model.decoder_embed_dim=-4 {PLAN}": "model.decoder_embed_dim is -4: set it",
    f"plan tiny.yaml task.tokens_per_sample=0 {PLAN}": "task.tokens_per_sample is 0: set it",
    f"plan tiny.yaml task.tokens_per_sample=many {PLAN}": "tiny.yaml: Value 'many'",
    f"plan tiny.yaml optimization.update_freq=[] {PLAN}": "optimization.update_freq",
    f"plan tiny.yaml optimization.update_freq=[0] {PLAN}": "optimization.update_freq\\[0\\] is 0: set it",
    f"plan tiny.yaml dataset.max_tokens=-5 {PLAN}": "dataset.max_tokens",
    f"plan tiny.yaml dataset.required_batch_size_multiple=0 {PLAN}": "required_batch_size_multiple is 0: set it",
    f"plan tiny.yaml distributed_training.distributed_world_size=0 {PLAN}": "distributed_world_size is 0: set it",
    f"plan tiny.yaml optimizer._name=adafactor {PLAN}": "optimizer adafactor cannot be planned: use nag or adam",
    f"plan tiny.yaml --gpu-memory 80 --types {10**25}": (2, "is too large: pass a number of at most 12 digits"),
    **{
        f"plan tiny.yaml {option}={size} {PLAN}": f"{option.partition('[')[0]}.* is .*: at most [0-9,]+ can be planned"
        for option, size in (
            *(("model.decoder_layers", 10**25), ("model.decoder_attention_heads", 10**9)),
            *(("model.decoder_embed_dim", 10**12), ("task.tokens_per_sample", 10**15)),
        )
    },
    f"plan tiny.yaml dataset.max_tokens={10**30} {PLAN}": "an update has [0-9,]+ blocks: lower dataset.max_tokens",
    f"plan tiny.yaml {PLAN} --gpus {10**30}": (2, "is too large: pass a number of at most 12 digits"),
    "reproduce --preset desk": (2, "invalid choice: 'desk'"),
    "reproduce --data data --updates 0": (2, "'0' is no such number"),
    "reproduce --data data --seeds 1 4294967296": "4294967296: pass --seeds and --updates below 4294967296",
    "reproduce --data data --methods abacus": (2, "invalid choice: 'abacus'"),
    "reproduce --data data --subset dev": "no subset 'dev'",
    # Options that contradict each other
    "reproduce --preset slice": "--preset slice needs --data",
}


@pytest.mark.parametrize("command", TABLE)
def test_bad_input_is_named_in_one_line_and_nothing_is_lost(given, command, capsys):
    check(capsys, given, command, TABLE[command])
