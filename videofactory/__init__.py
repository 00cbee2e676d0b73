"""VideoFactory: from the open web's videos to a text-to-video model.

The packages stand at the top of the repository (`curation/`, `shards/`, `pipelines/`, `model/`) and are imported from here
(`videofactory.curation`, ...): symbolic links in this folder make it so, for installs and type checkers alike.
"""

__version__ = "0.1.0"
