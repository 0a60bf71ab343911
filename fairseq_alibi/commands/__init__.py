"""The subcommands of fairseq-alibi, one file each."""
