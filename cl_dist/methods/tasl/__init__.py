"""TaSL, the first version of KIF (arXiv 2408.09857): its settings; the code is KIF's."""
