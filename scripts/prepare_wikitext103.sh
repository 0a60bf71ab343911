#!/usr/bin/env bash
# Downloads WikiText-103, checks it and makes a fairseq data folder of it (190 MB to load; some minutes, 1.5 GB of disk).
#
#   bash scripts/prepare_wikitext103.sh                                   # to data-bin/wikitext-103
#   bash scripts/prepare_wikitext103.sh /data/wikitext-103                # somewhere else
#   bash scripts/prepare_wikitext103.sh DEST --from wikitext-103-v1.zip   # an archive or a folder that you have
#   bash scripts/prepare_wikitext103.sh DEST --url https://mirror/wikitext-103-v1.zip
#
# A download that broke off goes on when this is run again; with nothing to do it ends at once.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
exec fairseq-alibi prepare-wikitext103 "$@"
