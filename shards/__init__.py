"""The dataset on disk: two tables, the index that is its ledger, the tar shards, and the readers that train from them."""
