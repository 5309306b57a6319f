"""TaSL, the first version of KIF (arXiv 2408.09857): its settings, since its code is KIF's."""
