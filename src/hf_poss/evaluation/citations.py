"""Where the measures come from, as BibTeX."""

__all__ = ["LEVIATHAN", "POSS"]

LEVIATHAN = """
@inproceedings{leviathan2023fast,
  title     = {Fast Inference from Transformers via Speculative Decoding},
  author    = {Leviathan, Yaniv and Kalman, Matan and Matias, Yossi},
  booktitle = {International Conference on Machine Learning},
  year      = {2023},
  url       = {https://arxiv.org/abs/2211.17192},
}
"""

POSS = """
@article{huang2025poss,
  title         = {POSS: Position Specialist Generates Better Draft for Speculative Decoding},
  author        = {Huang, Langlin and Huang, Chengsong and Leng, Jixuan and Huang, Di and Huang, Jiaxin},
  year          = {2025},
  eprint        = {2506.03566},
  archivePrefix = {arXiv},
  primaryClass  = {cs.CL},
}
"""
